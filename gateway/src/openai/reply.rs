//! What chat and text completions have in common in a reply.

use std::time::{SystemTime, UNIX_EPOCH};

use penstock_proto::v1::{self, FinishReason};
use serde_json::{Value, json};

use crate::replies::Origin;

/// What stays the same in all chunks of a reply.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    /// Seconds since the Unix epoch.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Changes with the revision: what else decides a reply is in the request.
    pub(crate) fingerprint: String,
}

impl Head {
    pub(crate) fn new(origin: &Origin) -> Self {
        let assigned = &origin.assigned;
        let digest: String = assigned.revision.digest.chars().take(8).collect();
        Self {
            id: origin.id.clone(),
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
            model: assigned.model.clone(),
            fingerprint: format!("fp_{}_{digest}", assigned.revision.name),
        }
    }
}

/// Why a reply ended.
pub(crate) fn finish_reason(reply: &v1::GenerateResponse) -> &'static str {
    match reply.finish_reason() {
        FinishReason::Length => "length",
        FinishReason::Stop | FinishReason::Unspecified => "stop",
    }
}

/// Usage of a reply.
pub(crate) fn usage(usage: Option<&v1::Usage>) -> Value {
    let usage = usage.copied().unwrap_or_default();
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

/// Log-probabilities of a chat's tokens.
pub(crate) fn content_logprobs(tokens: &[v1::TokenLogprob]) -> Vec<Value> {
    let entry = |bytes: &[u8], logprob: f32| json!({ "token": token_text(bytes), "logprob": logprob, "bytes": bytes });
    let token = |token: &v1::TokenLogprob| {
        let mut value = entry(&token.bytes, token.logprob);
        value["top_logprobs"] = token
            .top
            .iter()
            .map(|top| entry(&top.bytes, top.logprob))
            .collect();
        value
    };
    tokens.iter().map(token).collect()
}

/// A token as text; one that is part of a character shows a replacement character.
pub(crate) fn token_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
