//! `ctl generate`.

use crate::{
    config::{Connection, Generate},
    connect::Gateway,
    console::Console,
    error::CtlError,
    output::{Format, View, emit},
};
use penstock_proto::{
    metadata,
    v1::{
        Chat, ChatMessage, FinishReason, GenerateRequest, GenerateResponse, SamplingParams, generate_request,
    },
};
use serde::Serialize;
use std::time::Duration;
use tonic::{
    Request, Status, Streaming,
    metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap},
};

pub(crate) async fn run(
    args: Generate,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let mut gateway = Gateway::connect(connection).await?;
    let response = gateway
        .rpc
        .generate(request(args)?)
        .await
        .map_err(|status| gateway.failed(status))?;
    let mut reply = Reply::new(response.metadata());
    console.progress(&reply.assignment());
    let stream = response.into_inner();
    read(stream, connection.timeout(), &mut reply, console, output)
        .await?
        .map_err(|status| gateway.failed(status))?;
    if output == Format::Table {
        console.data("\n")?;
    } else {
        emit(console, output, &reply)?;
    }
    console.progress(&reply.usage());
    Ok(())
}

/// Reads the stream into `reply`; in a table the text appears as it comes. The inner error is the stream's.
async fn read(
    mut stream: Streaming<GenerateResponse>,
    limit: Duration,
    reply: &mut Reply,
    console: &mut Console,
    output: Format,
) -> Result<Result<(), Status>, CtlError> {
    loop {
        let chunk = match tokio::time::timeout(limit, stream.message()).await {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) => return Ok(Ok(())),
            Ok(Err(status)) => return Ok(Err(status)),
            Err(_) => return Ok(Err(Status::deadline_exceeded("the stream stands still"))),
        };
        if output == Format::Table {
            console.data(&chunk.text)?;
        }
        reply.push(chunk);
    }
}

fn request(args: Generate) -> Result<Request<GenerateRequest>, CtlError> {
    let input = if args.raw {
        generate_request::Input::Prompt(args.prompt)
    } else {
        let message = ChatMessage {
            role: "user".to_owned(),
            content: args.prompt,
        };
        generate_request::Input::Chat(Chat {
            messages: vec![message],
        })
    };
    let mut request = Request::new(GenerateRequest {
        model: args.model.unwrap_or_default(),
        input: Some(input),
        sampling: Some(SamplingParams {
            temperature: args.temperature,
            seed: args.seed,
            max_tokens: args.max_tokens,
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    });
    for (name, value) in args.request.metadata() {
        let refused = || CtlError::Usage(format!("`{name}={value}` cannot be sent as request metadata"));
        let key = AsciiMetadataKey::from_bytes(name.as_bytes()).map_err(|_| refused())?;
        let value = AsciiMetadataValue::try_from(value).map_err(|_| refused())?;
        request.metadata_mut().append(key, value);
    }
    Ok(request)
}

/// A whole reply.
#[derive(Debug, Default, Serialize)]
struct Reply {
    /// What `ctl feedback` names it by; empty where the gateway gave none.
    reply_id: String,
    revision: String,
    epoch: Option<u64>,
    reason: String,
    seed: Option<u64>,
    text: String,
    finish_reason: &'static str,
    prompt_tokens: u32,
    cached_tokens: u32,
    completion_tokens: u32,
}

impl Reply {
    fn new(from: &MetadataMap) -> Self {
        let get = |name: &str| {
            from.get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
        };
        Self {
            reply_id: get(metadata::REPLY_ID).to_owned(),
            revision: get(metadata::MODEL_VERSION).to_owned(),
            epoch: get(metadata::ROLLOUT_EPOCH).parse().ok(),
            reason: get(metadata::ASSIGNMENT_REASON).to_owned(),
            seed: get(metadata::SEED).parse().ok(),
            ..Self::default()
        }
    }

    fn push(&mut self, chunk: GenerateResponse) {
        let finish = chunk.finish_reason();
        self.text += &chunk.text;
        if let Some(usage) = chunk.usage {
            self.prompt_tokens = usage.prompt_tokens;
            self.cached_tokens = usage.cached_tokens;
            self.completion_tokens = usage.completion_tokens;
        }
        match finish {
            FinishReason::Unspecified => {}
            FinishReason::Stop => self.finish_reason = "stop",
            FinishReason::Length => self.finish_reason = "length",
        }
    }

    fn assignment(&self) -> String {
        let epoch = self
            .epoch
            .map_or_else(|| "unknown".to_owned(), |epoch| epoch.to_string());
        let reply = match self.reply_id.as_str() {
            "" => String::new(),
            id => format!("; reply {id}"),
        };
        format!(
            "revision {}; epoch {epoch}; reason {}{reply}",
            self.revision, self.reason
        )
    }

    fn usage(&self) -> String {
        let Self {
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            finish_reason,
            ..
        } = self;
        let seed = self
            .seed
            .map_or_else(String::new, |seed| format!("; seed {seed}"));
        format!(
            "{prompt_tokens} prompt tokens ({cached_tokens} cached), {completion_tokens} generated; {finish_reason}{seed}"
        )
    }
}

impl View for Reply {
    fn table(&self) -> String {
        format!("{}\n", self.text)
    }
}
