//! The worker behind every proxy: says as many tokens as the prompt asks for, at the pace that it asks for. gRPC on
//! the ports of two revisions, OpenAI's events over HTTP on two more, and a collector of spans.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use futures_util::{Stream, stream};
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt as _, Either, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use penstock_proto::{
    metadata,
    v1::{self, FinishReason, generate_request::Input},
};
use prost::Message as _;
use tokio::{net::TcpListener, task::spawn_local, time::Instant};

use crate::wire;

/// Where the worker listens.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct Ports {
    /// gRPC: the stable revision
    #[arg(long)]
    pub(crate) grpc: SocketAddr,
    /// gRPC: the canary
    #[arg(long)]
    pub(crate) grpc_canary: SocketAddr,
    /// HTTP: the stable revision
    #[arg(long)]
    pub(crate) http: SocketAddr,
    /// HTTP: the canary
    #[arg(long)]
    pub(crate) http_canary: SocketAddr,
    /// OTLP over gRPC
    #[arg(long)]
    pub(crate) otlp: SocketAddr,
}

/// What a prompt asks for: "64 tokens, 20 ms apart: …".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) tokens: u32,
    pub(crate) pace: Duration,
}

/// What the collector counted.
type Spans = Arc<AtomicU64>;

/// Serves until the process is killed.
pub(crate) async fn serve(ports: Ports) -> Result<()> {
    let spans = Spans::default();
    for address in [ports.grpc, ports.grpc_canary, ports.otlp] {
        let listener = TcpListener::bind(address).await?;
        spawn_local(accept_grpc(listener, spans.clone()));
    }
    for address in [ports.http, ports.http_canary] {
        let listener = TcpListener::bind(address).await?;
        spawn_local(accept_http(listener, spans.clone()));
    }
    std::future::pending().await
}

impl Asked {
    /// The prompt that asks for this.
    pub(crate) fn prompt(self) -> String {
        let filler = "Tell me what a river does with the water that a mill has used. ".repeat(6);
        format!(
            "{} tokens, {} ms apart: {filler}",
            self.tokens,
            self.pace.as_millis()
        )
    }

    fn read(prompt: &str) -> Self {
        let mut numbers = prompt.split_whitespace().filter_map(|word| word.parse().ok());
        let mut next = || numbers.next().unwrap_or_default();
        Self {
            tokens: u32::try_from(next()).unwrap_or(1).max(1),
            pace: Duration::from_millis(next()),
        }
    }

    /// When the token of this index is due.
    async fn wait(self, began: Instant, index: u32) {
        if !self.pace.is_zero() {
            tokio::time::sleep_until(began + self.pace * (index + 1)).await;
        }
    }
}

// === gRPC ===

async fn accept_grpc(listener: TcpListener, spans: Spans) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let _ = stream.set_nodelay(true);
        let spans = spans.clone();
        spawn_local(async move {
            let mut builder = h2::server::Builder::new();
            builder
                .initial_window_size(1 << 20)
                .initial_connection_window_size(16 << 20)
                .max_concurrent_streams(4096);
            let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else {
                return;
            };
            while let Some(Ok((request, respond))) = connection.accept().await {
                // A client that leaves ends its stream: nothing to be told here.
                spawn_local(call(request, respond, spans.clone()));
            }
        });
    }
}

async fn call(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    spans: Spans,
) -> Result<(), h2::Error> {
    let exports = request.uri().path().starts_with("/opentelemetry.");
    let traces = request.uri().path().ends_with("TraceService/Export");
    let message = wire::read(request.into_body()).await?;
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    if exports {
        if traces {
            spans.fetch_add(wire::spans(&message), Ordering::Relaxed);
        }
        let mut body = respond.send_response(response, false)?;
        body.send_data(wire::frame(&[]), false)?;
        return body.send_trailers(trailers(None));
    }
    headers.insert(metadata::SEED, HeaderValue::from_static("7"));
    let body = respond.send_response(response, false)?;
    generate(asked(&message), body).await
}

fn asked(message: &[u8]) -> Asked {
    let request = v1::GenerateRequest::decode(message).unwrap_or_default();
    match &request.input {
        Some(Input::Prompt(prompt)) => Asked::read(prompt),
        Some(Input::Chat(chat)) => chat
            .messages
            .last()
            .map_or(Asked::read(""), |message| Asked::read(&message.content)),
        _ => Asked::read(""),
    }
}

async fn generate(asked: Asked, mut body: SendStream<Bytes>) -> Result<(), h2::Error> {
    let began = Instant::now();
    for index in 0..asked.tokens {
        asked.wait(began, index).await;
        let last = index + 1 == asked.tokens;
        let chunk = v1::GenerateResponse {
            token_ids: vec![1000 + index],
            text: " word".into(),
            text_offset: u64::from(index) * 5,
            finish_reason: if last { FinishReason::Length.into() } else { 0 },
            usage: last.then(|| usage(asked)),
            ..Default::default()
        };
        body.send_data(wire::frame(&chunk.encode_to_vec()), false)?;
    }
    body.send_trailers(trailers(Some(asked)))
}

fn usage(asked: Asked) -> v1::Usage {
    v1::Usage {
        prompt_tokens: 100,
        completion_tokens: asked.tokens,
        cached_tokens: 0,
    }
}

fn trailers(asked: Option<Asked>) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    if let Some(asked) = asked {
        let stats = v1::RequestStats {
            ttft_us: 1000,
            tpot_us: u64::try_from(asked.pace.as_micros()).unwrap_or(0),
            prompt_tokens: 100,
            completion_tokens: asked.tokens,
            finish_reason: FinishReason::Length.into(),
            running: 1,
            ..Default::default()
        };
        let mut metadata = tonic::metadata::MetadataMap::new();
        let value = tonic::metadata::MetadataValue::from_bytes(&stats.encode_to_vec());
        metadata.insert_bin(metadata::STATS_TRAILER, value);
        trailers.extend(metadata.into_headers());
    }
    trailers
}

// === HTTP ===

type Answer = Response<Either<Full<Bytes>, StreamBody<Events>>>;
type Events = std::pin::Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Infallible>>>>;

async fn accept_http(listener: TcpListener, spans: Spans) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let _ = stream.set_nodelay(true);
        let spans = spans.clone();
        let service = hyper::service::service_fn(move |request| answer(request, spans.clone()));
        spawn_local(async move {
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // A proxy closes its connections as it likes.
            let _ = connection.await;
        });
    }
}

async fn answer(request: Request<Incoming>, spans: Spans) -> Result<Answer, hyper::Error> {
    if request.method() == Method::GET {
        let body = match request.uri().path() {
            "/spans" => spans.load(Ordering::Relaxed).to_string(),
            // What routers ask of a worker before they send it anything.
            _ => r#"{"status":"ok","object":"list","data":[{"id":"demo","object":"model"}]}"#.into(),
        };
        return Ok(typed("application/json", Either::Left(Full::new(body.into()))));
    }
    let body = request.into_body().collect().await?.to_bytes();
    let value: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let asked = Asked::read(value["messages"][0]["content"].as_str().unwrap_or_default());
    let began = Instant::now();
    let events: Events = Box::pin(stream::unfold(0, move |index| async move {
        if index > asked.tokens {
            return None;
        }
        if index < asked.tokens {
            asked.wait(began, index).await;
        }
        Some((Ok(Frame::data(event(asked, index))), index + 1))
    }));
    Ok(typed("text/event-stream", Either::Right(StreamBody::new(events))))
}

fn typed(kind: &'static str, body: Either<Full<Bytes>, StreamBody<Events>>) -> Answer {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(HeaderName::from_static("x-seed"), HeaderValue::from_static("7"));
    response
}

/// The token of this index; the first with the chunk before it, and the end after the last.
fn event(asked: Asked, index: u32) -> Bytes {
    let chunk = |delta: &str, finish: &str| {
        format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"demo\",\
             \"system_fingerprint\":\"fp\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\
             \"finish_reason\":{finish}}}]}}\n\n"
        )
    };
    let token = chunk(r#"{"content":" word"}"#, "null");
    match index {
        0 => chunk(r#"{"role":"assistant","content":"","refusal":null}"#, "null") + &token,
        index if index == asked.tokens => chunk("{}", "\"length\"") + "data: [DONE]\n\n",
        _ => token,
    }
    .into()
}
