//! What chat and text completions have in common in a request.

use http::{HeaderMap, HeaderValue};
use penstock_proto::{metadata, v1};
use tonic::Status;

use crate::{
    choices,
    error::bad_request,
    fields::{Fields, is_empty},
    grammar,
};

/// Stop texts of one request at most.
const MAX_STOPS: usize = 4;
const MAX_STOP_TOKEN_IDS: usize = 64;

/// A request that was read.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) request: v1::GenerateRequest,
    pub(crate) stream: bool,
    /// Replies to give.
    pub(crate) choices: usize,
    /// Replies to generate, of which the best are given.
    pub(crate) candidates: usize,
    pub(crate) include_usage: bool,
}

/// Reads everything but the input and the log-probabilities.
pub(crate) fn common(fields: Fields<'_>) -> Result<Asked, Status> {
    refuse_unsupported(fields)?;
    let stream = fields.flag("stream")?;
    let options = fields.object("stream_options")?;
    if options.is_some() && !stream {
        return Err(bad_request(
            "stream_options",
            "is for replies that stream: set stream",
        ));
    }
    let request = v1::GenerateRequest {
        model: fields.text("model")?.unwrap_or_default().to_owned(),
        sampling: Some(sampling(fields)?),
        grammar: grammar::of_completion(fields)?,
        priority: fields.signed("priority", -100, 100)?.unwrap_or(0),
        cache_salt: fields.text("cache_salt")?.unwrap_or_default().to_owned(),
        ..Default::default()
    };
    let choices = fields.integer("n", 1, choices::MOST)?.unwrap_or(1) as usize;
    Ok(Asked {
        request,
        stream,
        choices,
        candidates: choices,
        include_usage: options
            .map(|options| options.flag("include_usage"))
            .transpose()?
            .unwrap_or(false),
    })
}

fn sampling(fields: Fields<'_>) -> Result<v1::SamplingParams, Status> {
    let stop_token_ids = fields.ids("stop_token_ids")?.unwrap_or_default();
    if stop_token_ids.len() > MAX_STOP_TOKEN_IDS {
        return Err(bad_request(
            "stop_token_ids",
            format!("must be at most {MAX_STOP_TOKEN_IDS} ids"),
        ));
    }
    let max_tokens = fields.integer("max_completion_tokens", 1, u32::MAX)?;
    Ok(v1::SamplingParams {
        temperature: fields.number("temperature")?,
        top_p: fields.number("top_p")?,
        top_k: fields.integer("top_k", 0, u32::MAX)?,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        seed: fields.seed("seed")?,
        max_tokens: max_tokens.or(fields.integer("max_tokens", 1, u32::MAX)?),
        stop: fields.texts("stop", MAX_STOPS)?,
        stop_token_ids,
        ignore_eos: fields
            .get("ignore_eos")
            .map(|_| fields.flag("ignore_eos"))
            .transpose()?,
        logit_bias: grammar::logit_bias(fields)?,
        min_tokens: fields.integer("min_tokens", 0, u32::MAX)?,
    })
}

/// What would change the reply and is not done must not be ignored. Other keys that are not known are.
fn refuse_unsupported(fields: Fields<'_>) -> Result<(), Status> {
    for name in [
        "tools",
        "functions",
        "suffix",
        "audio",
        "prediction",
        "web_search_options",
        "structured_outputs",
        "structural_tag",
    ] {
        fields.refuse(name, is_empty)?;
    }
    for name in ["tool_choice", "function_call"] {
        fields.refuse(name, |value| value == "none" || value == "auto")?;
    }
    fields.refuse("modalities", |value| {
        value
            .as_array()
            .is_some_and(|list| list.iter().all(|v| v == "text"))
    })
}

/// `user` stands in for `x-user-id`, so that clients that cannot set headers keep their side of a split.
pub(crate) fn identify(fields: Fields<'_>, headers: &mut HeaderMap) -> Result<(), Status> {
    let Some(user) = fields.text("user")? else {
        return Ok(());
    };
    if user.is_empty() || headers.contains_key(metadata::USER_ID) {
        return Ok(());
    }
    let value = HeaderValue::from_bytes(user.as_bytes())
        .map_err(|_| bad_request("user", "has control characters"))?;
    headers.insert(metadata::USER_ID, value);
    Ok(())
}
