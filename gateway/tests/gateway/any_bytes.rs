//! Whatever is sent, the sender is told that it is wrong, and nobody else notices.

use std::net::SocketAddr;

use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client as HttpClient, rt::TokioExecutor};
use penstock_proto::v1;
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};
use prost::Message as _;
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    runtime::Runtime,
};
use tonic::{Code, Status};

use crate::support::{Behaviour, TestGateway, TestWorker, generate, http, prompt, view, with};

const HTTP: [&str; 4] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/generate",
    "/v1/feedback",
];
const GRPC: [&str; 5] = ["Generate", "Score", "Tokenize", "ListModels", "Feedback"];
/// Names that requests have, so that made-up ones get far.
const NAMES: [&str; 34] = [
    "model",
    "messages",
    "role",
    "content",
    "prompt",
    "text",
    "input_ids",
    "sampling_params",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "max_tokens",
    "max_completion_tokens",
    "max_new_tokens",
    "stream",
    "stream_options",
    "include_usage",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "response_format",
    "json_schema",
    "tools",
    "tool_choice",
    "user",
    "n",
    "id",
    "thumb",
    "score",
    "type",
];

/// A gateway before one worker, on threads of its own.
struct Target {
    runtime: Runtime,
    gateway: TestGateway,
    _worker: TestWorker,
}

impl Target {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let (gateway, worker) = runtime.block_on(async {
            let worker = TestWorker::start(Behaviour::Speak).await;
            let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1"])])).await;
            (gateway, worker)
        });
        Self {
            runtime,
            gateway,
            _worker: worker,
        }
    }

    /// Tries what `strategy` makes up; afterwards all is as it was.
    fn hold<S: Strategy>(
        self,
        cases: u32,
        strategy: S,
        check: impl AsyncFn(SocketAddr, S::Value) -> Result<(), TestCaseError>,
    ) {
        let default = Config::default();
        let mut runner = TestRunner::new(Config {
            failure_persistence: None,
            // More with PROPTEST_CASES, for longer hunts.
            cases: (default.cases * cases / 256).max(1),
            ..default
        });
        let address = self.gateway.address;
        let tried = runner.run(&strategy, |value| {
            self.runtime.block_on(async {
                check(address, value).await?;
                let mut client = self.gateway.client().await;
                let reply = generate(&mut client, with(prompt("demo"), &[])).await;
                prop_assert!(reply.is_ok(), "somebody else's request: {reply:?}");
                Ok(())
            })
        });
        if let Err(error) = tried {
            panic!("{error}");
        }
    }
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![vec(any::<u8>(), 0..200), ".{0,80}".prop_map(String::into_bytes)]
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2i64..200).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        select(
            &[
                "demo",
                "user",
                "system",
                "text",
                "json_object",
                "auto",
                "up",
                "demo@v1",
                "x@y@z"
            ][..]
        )
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Value::from),
            vec((name(), inner), 0..6).prop_map(|fields| Value::Object(Map::from_iter(fields))),
        ]
    })
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![9 => select(&NAMES[..]).prop_map(str::to_owned), 1 => ".{0,8}".prop_map(String::from)]
}

/// A request that would be served.
fn served(path: &str) -> Value {
    match path {
        "/generate" => json!({ "text": "Hello", "sampling_params": { "max_new_tokens": 3 } }),
        "/v1/completions" => json!({ "model": "demo", "prompt": "Hello", "max_tokens": 3 }),
        "/v1/feedback" => json!({ "id": "rep-0", "score": 0.5 }),
        _ => json!({ "model": "demo", "messages": [{ "role": "user", "content": "Hello" }] }),
    }
}

/// Sends bytes as the body of a gRPC call.
async fn call(address: SocketAddr, method: &str, body: Vec<u8>) -> Status {
    let client = HttpClient::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http::<Full<bytes::Bytes>>();
    let request = http::Request::post(format!("http://{address}/penstock.v1.Inference/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body.into()))
        .unwrap();
    let (parts, body) = client.request(request).await.unwrap().into_parts();
    assert_eq!(parts.status, 200);
    let trailers = body.collect().await.unwrap().trailers().cloned();
    let at_once = Status::from_header_map(&parts.headers);
    at_once.unwrap_or_else(|| Status::from_header_map(&trailers.unwrap()).unwrap())
}

fn framed(flag: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[flag][..], &length, payload].concat()
}

#[test]
fn bytes_that_are_no_json_are_a_bad_request_on_every_route() {
    let routes = select(&HTTP[..]);
    Target::start().hold(200, (routes, bytes()), async |address, (path, body)| {
        let is_json = serde_json::from_slice::<Value>(&body).is_ok();
        let reply = http("POST", address, path, &[], body).await;
        prop_assert!(
            (400..500).contains(&reply.status),
            "{} {}",
            reply.status,
            reply.body
        );
        prop_assert!(is_json || reply.json()["error"]["message"].is_string());
        Ok(())
    });
}

#[test]
fn made_up_json_is_served_or_refused_with_the_reason() {
    let routes = select(&HTTP[..]);
    let fields = vec((name(), value()), 0..4);
    Target::start().hold(
        400,
        (routes, fields, any::<bool>()),
        async |address, (path, fields, valid)| {
            let mut body = if valid { served(path) } else { json!({}) };
            for (name, value) in fields {
                body[name] = value;
            }
            let reply = http("POST", address, path, &[], body.to_string()).await;
            prop_assert!(
                reply.status == 200 || (400..500).contains(&reply.status),
                "{} {} for {body}",
                reply.status,
                reply.body
            );
            Ok(())
        },
    );
}

#[test]
fn bytes_that_are_no_frame_are_an_invalid_argument_of_every_method() {
    // ListModels has nothing to say, and does not read what it is told.
    let methods = select(&["Generate", "Score", "Tokenize", "Feedback"][..]);
    Target::start().hold(200, (methods, bytes()), async |address, (method, body)| {
        let compressed = body.len() >= 5 && body[0] == 1;
        let status = call(address, method, body).await;
        let expected = if compressed {
            // `call` names no encoding.
            Code::Internal
        } else {
            Code::InvalidArgument
        };
        prop_assert_eq!(status.code(), expected, "{}", status);
        Ok(())
    });
}

#[test]
fn a_frame_around_any_bytes_is_served_or_the_senders_fault() {
    let message = (
        vec(any::<u8>(), 0..60),
        any::<bool>(),
        any::<prop::sample::Index>(),
    );
    Target::start().hold(
        400,
        (select(&GRPC[..]), message),
        async |address, (method, (noise, valid, at))| {
            let mut payload = match valid {
                true => prompt("demo").encode_to_vec(),
                false => Vec::new(),
            };
            let at = at.index(payload.len() + 1);
            payload.splice(at..at, noise);
            let reads = match method {
                "Generate" => v1::GenerateRequest::decode(payload.as_slice()).is_ok(),
                "Tokenize" => v1::TokenizeRequest::decode(payload.as_slice()).is_ok(),
                "Score" => v1::ScoreRequest::decode(payload.as_slice()).is_ok(),
                "Feedback" => v1::FeedbackRequest::decode(payload.as_slice()).is_ok(),
                _ => true,
            };
            let status = call(address, method, framed(0, &payload)).await;
            let fault = matches!(status.code(), Code::InvalidArgument | Code::NotFound);
            prop_assert!(
                fault || reads && status.code() == Code::Ok,
                "{status} for {payload:?}"
            );
            prop_assert!(reads || fault, "{status} for {payload:?}");
            Ok(())
        },
    );
}

#[test]
fn headers_of_any_bytes_are_read_or_refused() {
    let names = select(
        &[
            "x-user-id",
            "x-model-version",
            "x-session-id",
            "x-tenant-id",
            "x-forwarded-for",
            "grpc-timeout",
            "traceparent",
            "authorization",
        ][..],
    );
    let value = vec(prop_oneof![32u8..127, 128u8..=255], 0..60);
    Target::start().hold(200, (names, value), async |address, (name, value)| {
        let client = HttpClient::builder(TokioExecutor::new()).build_http::<Full<bytes::Bytes>>();
        let request = http::Request::post(format!("http://{address}/v1/completions"))
            .header(name, http::HeaderValue::from_bytes(&value).unwrap())
            .body(Full::new(served("/v1/completions").to_string().into()))
            .unwrap();
        let status = client.request(request).await.unwrap().status().as_u16();
        prop_assert!(status == 200 || (400..500).contains(&status), "{status}");
        Ok(())
    });
}

#[test]
fn what_is_no_http_ends_its_own_connection_only() {
    let preface = prop_oneof![
        Just(&b""[..]),
        Just(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..]),
        Just(&b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\n\r\n"[..]),
    ];
    Target::start().hold(100, (preface, bytes()), async |address, (preface, noise)| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Whichever of these fails, the gateway had enough of it.
        stream.write_all(&[preface, &noise].concat()).await.ok();
        stream.shutdown().await.ok();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok();
        let answer = String::from_utf8_lossy(&answer);
        prop_assert!(!answer.starts_with("HTTP/1.1 5"), "{answer}");
        Ok(())
    });
}
