//! `/v1/completions`.

use penstock_proto::v1::{self, generate_request::Input};
use serde_json::{Map, Value, json};
use tonic::Status;

use super::{
    Shape,
    reply::{Head, finish_reason, token_text},
    request::{self, Asked},
};
use crate::{
    choices,
    error::bad_request,
    fields::{self, Fields},
};

/// How text completions are asked and answered.
pub(crate) struct CompletionShape {
    logprobs: bool,
    /// Characters of each reply so far, for `text_offset`.
    offsets: Vec<usize>,
}

impl Shape for CompletionShape {
    const OPERATION: &'static str = "text_completion";
    const PREFIX: &'static str = "cmpl-";
    const OBJECT: &'static str = "text_completion";

    fn read(fields: Fields<'_>) -> Result<(Asked, Self), Status> {
        let mut asked = request::common(fields)?;
        asked.request.input = Some(prompt(fields)?);
        asked.request.echo = fields.flag("echo")?;
        asked.request.top_logprobs = fields.integer("logprobs", 0, 20)?;
        let logprobs = asked.request.top_logprobs.is_some();
        if let Some(candidates) = fields.integer("best_of", asked.choices as u32, choices::MOST)? {
            asked.candidates = candidates as usize;
        }
        if asked.candidates > asked.choices {
            if asked.stream {
                return Err(bad_request(
                    "best_of",
                    "is not for replies that stream: the best is known at the end",
                ));
            }
            if asked.request.echo {
                return Err(bad_request(
                    "best_of",
                    "is not for prompts that are echoed: leave out echo",
                ));
            }
            // They say which is best.
            asked.request.top_logprobs.get_or_insert(0);
        }
        let offsets = vec![0; asked.choices];
        Ok((asked, Self { logprobs, offsets }))
    }

    fn choice(&self, index: usize, reply: &v1::GenerateResponse) -> Value {
        let logprobs = self.logprobs.then(|| logprobs(&reply.logprobs, 0));
        choice(index, &reply.text, logprobs.into(), &finish_reason(reply).into())
    }

    fn opening(&self, _: &Head, _: usize) -> Option<Value> {
        None
    }

    fn chunks(&mut self, head: &Head, index: usize, reply: &v1::GenerateResponse) -> Vec<Value> {
        let ended = reply.usage.is_some();
        if !ended && reply.text.is_empty() && (!self.logprobs || reply.logprobs.is_empty()) {
            return Vec::new();
        }
        let offset = &mut self.offsets[index];
        let logprobs = self.logprobs.then(|| logprobs(&reply.logprobs, *offset));
        *offset += reply.text.chars().count();
        let reason = if ended {
            finish_reason(reply).into()
        } else {
            Value::Null
        };
        vec![text(
            head,
            &[choice(index, &reply.text, logprobs.into(), &reason)],
        )]
    }

    fn usage(&self, head: &Head, usage: Value) -> Value {
        let mut last = text(head, &[]);
        last["usage"] = usage;
        last
    }
}

fn choice(index: usize, text: &str, logprobs: Value, finish_reason: &Value) -> Value {
    json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason })
}

fn text(head: &Head, choices: &[Value]) -> Value {
    json!({
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": choices,
    })
}

/// A text, token ids, or a list of one of them.
fn prompt(fields: Fields<'_>) -> Result<Input, Status> {
    let value = fields
        .get("prompt")
        .ok_or_else(|| bad_request("prompt", "is missing"))?;
    let single = match value {
        Value::Array(list) if matches!(list.as_slice(), [Value::String(_) | Value::Array(_)]) => &list[0],
        other => other,
    };
    match single {
        Value::String(text) => Ok(Input::Prompt(text.clone())),
        Value::Array(list) if !list.is_empty() && fields::ids(single).is_some() => {
            Ok(Input::InputIds(v1::TokenIds {
                ids: fields::ids(single).unwrap_or_default(),
            }))
        }
        _ => Err(bad_request(
            "prompt",
            "must be one string or one list of token ids",
        )),
    }
}

fn logprobs(tokens: &[v1::TokenLogprob], start: usize) -> Value {
    let texts: Vec<String> = tokens.iter().map(|token| token_text(&token.bytes)).collect();
    let mut at = start;
    let offsets: Vec<usize> = texts
        .iter()
        .map(|text| {
            let offset = at;
            at += text.chars().count();
            offset
        })
        .collect();
    let top = |token: &v1::TokenLogprob| -> Map<String, Value> {
        token
            .top
            .iter()
            .map(|top| (token_text(&top.bytes), top.logprob.into()))
            .collect()
    };
    json!({
        "tokens": texts,
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}
