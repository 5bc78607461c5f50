//! `/v1/completions`.

use penstock_proto::v1::{self, generate_request::Input};
use serde_json::{Map, Value, json};
use tonic::Status;

use super::{
    Shape,
    reply::{Head, finish_reason, token_text, usage},
    request::{self, Asked},
};
use crate::{
    error::bad_request,
    fields::{self, Fields},
};

/// How text completions are asked and answered.
pub(crate) struct CompletionShape {
    logprobs: bool,
    /// Characters of the reply so far, for `text_offset`.
    offset: usize,
}

impl Shape for CompletionShape {
    const OPERATION: &'static str = "text_completion";
    const PREFIX: &'static str = "cmpl-";

    fn read(fields: Fields<'_>) -> Result<(Asked, Self), Status> {
        let mut asked = request::common(fields)?;
        asked.request.input = Some(prompt(fields)?);
        asked.request.echo = fields.flag("echo")?;
        asked.request.top_logprobs = fields.integer("logprobs", 0, 20)?;
        if asked.request.echo && asked.request.top_logprobs.is_some() {
            return Err(bad_request(
                "logprobs",
                "cannot be given for the prompt: leave out echo",
            ));
        }
        let logprobs = asked.request.top_logprobs.is_some();
        Ok((asked, Self { logprobs, offset: 0 }))
    }

    fn whole(&self, head: &Head, reply: &v1::GenerateResponse) -> Value {
        let logprobs = self.logprobs.then(|| logprobs(&reply.logprobs, 0));
        let mut whole = text(head, &reply.text, logprobs.into(), &finish_reason(reply).into());
        whole["usage"] = usage(reply.usage.as_ref());
        whole
    }

    fn opening(&self, _: &Head) -> Option<Value> {
        None
    }

    fn chunks(&mut self, head: &Head, reply: &v1::GenerateResponse) -> Vec<Value> {
        let ended = reply.usage.is_some();
        if !ended && reply.text.is_empty() && (!self.logprobs || reply.logprobs.is_empty()) {
            return Vec::new();
        }
        let logprobs = self.logprobs.then(|| logprobs(&reply.logprobs, self.offset));
        self.offset += reply.text.chars().count();
        let reason = if ended {
            finish_reason(reply).into()
        } else {
            Value::Null
        };
        vec![text(head, &reply.text, logprobs.into(), &reason)]
    }

    fn usage(&self, head: &Head, usage: Value) -> Value {
        let mut last = text(head, "", Value::Null, &Value::Null);
        last["choices"] = json!([]);
        last["usage"] = usage;
        last
    }
}

fn text(head: &Head, text: &str, logprobs: Value, finish_reason: &Value) -> Value {
    json!({
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": [{ "index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason }],
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
