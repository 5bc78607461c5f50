//! `/v1/chat/completions`.

use penstock_proto::v1::{self, generate_request::Input};
use serde_json::{Value, json};
use tonic::Status;

use super::{
    Shape,
    reply::{Head, content_logprobs, finish_reason},
    request::{self, Asked},
};
use crate::{error::bad_request, fields::Fields};

/// How chats are asked and answered.
pub(crate) struct ChatShape {
    logprobs: bool,
}

impl Shape for ChatShape {
    const OPERATION: &'static str = "chat";
    const PREFIX: &'static str = "chatcmpl-";
    const OBJECT: &'static str = "chat.completion";

    fn read(fields: Fields<'_>) -> Result<(Asked, Self), Status> {
        let mut asked = request::common(fields)?;
        asked.request.input = Some(Input::Chat(v1::Chat {
            messages: messages(fields)?,
        }));
        let logprobs = fields.flag("logprobs")?;
        let top = fields.integer("top_logprobs", 0, 20)?;
        if top.is_some() && !logprobs {
            return Err(bad_request(
                "top_logprobs",
                "is for replies with logprobs: set logprobs to true",
            ));
        }
        asked.request.top_logprobs = logprobs.then(|| top.unwrap_or(0));
        fields.refuse("best_of", |count| count.as_u64() == Some(1))?;
        Ok((asked, Self { logprobs }))
    }

    fn choice(&self, index: usize, reply: &v1::GenerateResponse) -> Value {
        json!({
            "index": index,
            "message": { "role": "assistant", "content": reply.text, "refusal": null },
            "logprobs": self.logprobs(reply),
            "finish_reason": finish_reason(reply),
        })
    }

    fn opening(&self, head: &Head, index: usize) -> Option<Value> {
        Some(chunk(
            head,
            index,
            &json!({ "role": "assistant", "content": "", "refusal": null }),
            &Value::Null,
            &Value::Null,
        ))
    }

    fn chunks(&mut self, head: &Head, index: usize, reply: &v1::GenerateResponse) -> Vec<Value> {
        let mut chunks = Vec::new();
        if !reply.text.is_empty() || (self.logprobs && !reply.logprobs.is_empty()) {
            chunks.push(chunk(
                head,
                index,
                &json!({ "content": reply.text }),
                &self.logprobs(reply),
                &Value::Null,
            ));
        }
        if reply.usage.is_some() {
            chunks.push(chunk(
                head,
                index,
                &json!({}),
                &Value::Null,
                &finish_reason(reply).into(),
            ));
        }
        chunks
    }

    fn usage(&self, head: &Head, usage: Value) -> Value {
        let mut last = chunk(head, 0, &Value::Null, &Value::Null, &Value::Null);
        last["choices"] = json!([]);
        last["usage"] = usage;
        last
    }
}

impl ChatShape {
    fn logprobs(&self, reply: &v1::GenerateResponse) -> Value {
        match self.logprobs {
            true => json!({ "content": content_logprobs(&reply.logprobs), "refusal": null }),
            false => Value::Null,
        }
    }
}

fn chunk(head: &Head, index: usize, delta: &Value, logprobs: &Value, finish_reason: &Value) -> Value {
    json!({
        "id": head.id,
        "object": "chat.completion.chunk",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": [{ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason }],
    })
}

fn messages(fields: Fields<'_>) -> Result<Vec<v1::ChatMessage>, Status> {
    let list = fields
        .list("messages")?
        .ok_or_else(|| bad_request("messages", "is missing"))?;
    if list.is_empty() {
        return Err(bad_request(
            "messages",
            "is empty: a chat needs at least one message",
        ));
    }
    list.iter()
        .enumerate()
        .map(|(index, value)| message(&format!("messages[{index}]"), value))
        .collect()
}

fn message(path: &str, value: &Value) -> Result<v1::ChatMessage, Status> {
    let fields = Fields::of(value).ok_or_else(|| bad_request(path, "must be an object"))?;
    let role = match value["role"].as_str() {
        // The name that newer clients use.
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role,
        Some(role) => {
            let why = format!("must be system, developer, user, assistant or tool, not {role:?}");
            return Err(bad_request(&format!("{path}.role"), why));
        }
        None => return Err(bad_request(&format!("{path}.role"), "is missing or not a string")),
    };
    for name in ["tool_calls", "function_call", "audio"] {
        if fields
            .get(name)
            .is_some_and(|value| !crate::fields::is_empty(value))
        {
            return Err(bad_request(&format!("{path}.{name}"), "is not supported"));
        }
    }
    Ok(v1::ChatMessage {
        role: role.into(),
        content: content(&format!("{path}.content"), &value["content"])?,
    })
}

/// Text, or a list of parts that are text.
fn content(path: &str, value: &Value) -> Result<String, Status> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        _ => return Err(bad_request(path, "must be a string or a list of text parts")),
    };
    let text = |(index, part): (usize, &Value)| match (&part["type"], &part["text"]) {
        (Value::String(kind), Value::String(text)) if kind == "text" => Ok(text.clone()),
        _ => Err(bad_request(
            &format!("{path}[{index}]"),
            "is not a text part; only text is supported",
        )),
    };
    parts.iter().enumerate().map(text).collect()
}
