//! gRPC load: the generated client, as a user of the proto files would have it.

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use penstock_proto::{
    metadata,
    v1::{self, generate_request::Input, inference_client::InferenceClient},
};
use std::{collections::BTreeMap, time::Duration};
use tonic::{Request, Status, transport::Channel};

/// A client of `Inference`.
pub type Client = InferenceClient<Channel>;

/// A whole reply.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Generated {
    /// Token ids.
    pub token_ids: Vec<u32>,
    /// Text.
    pub text: String,
    /// `x-model-version`.
    pub revision: String,
    /// `x-rollout-epoch`.
    pub epoch: String,
    /// `x-assignment-reason`.
    pub reason: String,
    /// Whether the last chunk with usage and finish reason came.
    pub complete: bool,
}

/// Connects to a gateway or a worker on `port`.
pub async fn connect(port: u16) -> Result<Client> {
    let channel = Channel::from_shared(format!("http://127.0.0.1:{port}"))?
        .connect()
        .await?;
    Ok(InferenceClient::new(channel))
}

/// A greedy chat of one user message.
pub fn chat(model: &str, question: &str, max_tokens: u32) -> v1::GenerateRequest {
    let message = v1::ChatMessage {
        role: "user".into(),
        content: question.into(),
    };
    v1::GenerateRequest {
        model: model.into(),
        input: Some(Input::Chat(v1::Chat {
            messages: vec![message],
        })),
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(max_tokens),
            ..v1::SamplingParams::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

/// Sends one request with metadata and reads the stream to its end.
pub async fn generate(
    client: &mut Client,
    request: v1::GenerateRequest,
    headers: &[(&'static str, &str)],
) -> Result<Generated, Status> {
    let mut request = Request::new(request);
    request.set_timeout(Duration::from_secs(60));
    for (name, value) in headers {
        let value = value.parse().map_err(|_| Status::internal("metadata value"))?;
        request.metadata_mut().insert(*name, value);
    }
    let response = client.generate(request).await?;
    let field = |name: &str| {
        let value = response
            .metadata()
            .get(name)
            .and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let mut generated = Generated {
        revision: field(metadata::MODEL_VERSION),
        epoch: field(metadata::ROLLOUT_EPOCH),
        reason: field(metadata::ASSIGNMENT_REASON),
        ..Generated::default()
    };
    let mut chunks = response.into_inner();
    while let Some(chunk) = chunks.message().await? {
        generated.token_ids.extend(&chunk.token_ids);
        generated.text.push_str(&chunk.text);
        generated.complete |= chunk.usage.is_some();
    }
    Ok(generated)
}

/// Gap in seconds before request `index` of a Poisson process of one a second; the same at each run.
pub fn gap(index: usize) -> f64 {
    // Weyl's sequence with the golden ratio, scrambled, is as good as random here.
    let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ (mixed >> 32);
    let uniform = ((mixed >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -uniform.ln()
}

/// Asks once for every user `u{n}` and tells which revision served each.
pub async fn revisions_by_user(port: u16, users: std::ops::Range<u32>) -> Result<BTreeMap<u32, String>> {
    let client = connect(port).await?;
    stream::iter(users)
        .map(|user| {
            let mut client = client.clone();
            async move {
                let name = format!("u{user}");
                let headers = [(metadata::USER_ID, name.as_str())];
                let reply = generate(&mut client, chat("demo", "Hello", 1), &headers).await;
                let reply = reply.with_context(|| format!("user {name}"))?;
                anyhow::ensure!(reply.complete, "user {name}: the reply did not end");
                Ok((user, reply.revision))
            }
        })
        .buffer_unordered(16)
        .try_collect()
        .await
}
