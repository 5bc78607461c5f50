//! Whatever comes over the wire, held against what must be true of it. As tests these replay the corpora below
//! `__fuzz__` and try some random bytes; `cargo bolero` hunts on from there (see the README).

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::Full;
use penstock_client::View;
use penstock_plan::{Canary, FORWARDED_FOR, Mirror, Ppm, Revision, Route, Rule, Snapshot, Sticky, StickyKey};
use penstock_proto::v1;
use prost::Message as _;
use tokio::runtime::{Builder, Runtime};
use tonic::{Code, Status};

use crate::{
    admission,
    balance::Glance,
    feedback,
    fields::{self, Fields},
    frames::{Decoder, Message},
    held::{Held, Rest},
    openai::{self, Shape, chat::ChatShape, completions::CompletionShape, reply::Head, sse::Events as _},
    overrides::Overrides,
    reply_id::ReplyId,
    routing::{self, Caller},
    sglang, timeout,
};

/// Reading a body takes a clock.
static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_time().build().unwrap());

/// The sender is at fault, and the status says so over HTTP as well.
fn is_told(status: &Status) {
    let response = openai::error::response(status);
    assert!(response.status().is_client_error(), "{status}");
    assert!(!status.message().is_empty());
}

/// Reads the body of a request to an OpenAI route.
fn openai<S: Shape>(body: &[u8]) -> Result<(openai::request::Asked, S), Status> {
    let value = fields::parse(body)?;
    S::read(Fields::of(&value).unwrap())
}

/// A request that HTTP made is one that workers can read, and that routing understands without reading.
fn is_sound(request: &v1::GenerateRequest) {
    let message = Message::encode(request);
    assert_eq!(message.model().unwrap(), request.model);
    assert_eq!(
        v1::GenerateRequest::decode(message.payload())
            .unwrap()
            .encode_to_vec()
            .len(),
        message.payload().len()
    );
    let glance = Glance::of(message.payload()).unwrap();
    let asked = request.sampling.as_ref().and_then(|sampling| sampling.max_tokens);
    assert_eq!(glance.max_tokens(), asked);
}

#[test]
fn http_bodies() {
    bolero::check!().for_each(|input: &[u8]| {
        let Some((route, body)) = input.split_first() else {
            return;
        };
        let read = match route % 4 {
            0 => openai::<ChatShape>(body).map(|(asked, _)| Some(asked.request)),
            1 => openai::<CompletionShape>(body).map(|(asked, _)| Some(asked.request)),
            2 => sglang::understand(body).map(|asked| Some(asked.request)),
            _ => feedback::read(body).map(|_| None),
        };
        match read {
            Ok(request) => request.iter().for_each(is_sound),
            Err(status) => is_told(&status),
        }
    });
}

#[test]
fn grpc_frames() {
    bolero::check!().for_each(|input: &[u8]| {
        let body = Full::new(Bytes::copy_from_slice(input));
        let message = match RUNTIME.block_on(Message::read(&HeaderMap::new(), body)) {
            Ok(message) => message,
            Err(status) => {
                // The flag says compressed, and no encoding is named.
                let fault = input.len() >= 5 && input[0] == 1;
                let expected = if fault {
                    Code::Internal
                } else {
                    Code::InvalidArgument
                };
                assert_eq!(status.code(), expected, "{status}");
                return;
            }
        };
        assert_eq!(message.framed(), input);
        // Whatever a worker can read, the gateway understands alike without reading.
        let Ok(request) = v1::GenerateRequest::decode(message.payload()) else {
            let _ = (message.model(), Glance::of(message.payload()));
            return;
        };
        assert_eq!(message.model().unwrap(), request.model);
        let moved = message.with_model("other@v2");
        assert_eq!(moved.model().unwrap(), "other@v2");
        let moved = v1::GenerateRequest::decode(moved.payload()).unwrap();
        assert_eq!((moved.model.as_str(), &moved.input), ("other@v2", &request.input));
        if let Some(glance) = Glance::of(message.payload()) {
            assert!(glance.head() <= glance.input().len());
        }
    });
}

#[test]
fn worker_replies() {
    bolero::check!().for_each(|input: &[u8]| {
        let Some((&size, bytes)) = input.split_first() else {
            return;
        };
        let size = usize::from(size).max(1);
        let (mut held, mut passed) = (Held::default(), Vec::new());
        let (mut whole, mut ids, mut over, mut readable) = (Decoder::default(), Vec::new(), false, true);
        for part in bytes.chunks(size) {
            passed.extend_from_slice(&held.admit(Bytes::copy_from_slice(part)));
            whole.push(part);
            while readable {
                match whole.next::<v1::GenerateResponse>() {
                    Ok(Some(chunk)) => {
                        ids.extend(chunk.token_ids);
                        over |= chunk.usage.is_some();
                    }
                    Ok(None) => break,
                    Err(_) => readable = false,
                }
            }
        }
        assert!(bytes.starts_with(&passed), "a client gets what the worker sent");
        match held.rest() {
            Rest::Resume(resume) if readable => {
                assert!(!over, "goes on after its end");
                assert_eq!(resume.token_ids, ids);
            }
            Rest::Nothing if readable => assert!(over),
            Rest::Lost | Rest::Resume(_) | Rest::Nothing => {}
        }
    });
}

/// The data of each event; every one is a single line.
fn events(text: &str) -> Vec<serde_json::Value> {
    assert!(text.is_empty() || text.ends_with("\n\n"), "{text:?}");
    let events = text.split_terminator("\n\n").map(|event| {
        let data = event
            .strip_prefix("data: ")
            .unwrap_or_else(|| panic!("{event:?}"));
        assert!(!data.contains(['\n', '\r']), "{event:?}");
        serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"))
    });
    events.collect()
}

/// Runs chunks through the events of a route; the events' texts together are the chunks'.
fn told<S: Shape>(body: &str, chunks: &[v1::GenerateResponse], text: impl Fn(&serde_json::Value) -> String) {
    let (asked, shape) = openai::<S>(body.as_bytes()).unwrap();
    let head = Head {
        id: "id".into(),
        created: 0,
        model: "demo".into(),
        fingerprint: "fp".into(),
    };
    let (mut writer, mut out) = (openai::Events::new(head, shape, &asked), String::new());
    writer.open(&mut out);
    for chunk in chunks {
        writer.chunk(0, chunk.clone(), &mut out);
    }
    writer.close(&mut out);
    let said: String = events(&out).iter().map(text).collect();
    let meant: String = chunks.iter().map(|chunk| chunk.text.as_str()).collect();
    assert_eq!(said, meant);
}

#[test]
fn server_sent_events() {
    const CHAT: &str = r#"{"messages": [{"role": "user", "content": "a"}], "stream": true, "logprobs": true,
        "stream_options": {"include_usage": true}}"#;
    const TEXT: &str = r#"{"prompt": "a", "stream": true, "logprobs": 2}"#;
    bolero::check!().for_each(|input: &[u8]| {
        let (mut decoder, mut chunks) = (Decoder::default(), Vec::new());
        decoder.push(input);
        while let Ok(Some(chunk)) = decoder.next::<v1::GenerateResponse>() {
            chunks.push(chunk);
        }
        let field = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        told::<ChatShape>(CHAT, &chunks, |event| {
            field(&event["choices"][0]["delta"]["content"])
        });
        told::<CompletionShape>(TEXT, &chunks, |event| field(&event["choices"][0]["text"]));
        let mut out = String::new();
        let message = String::from_utf8_lossy(input).into_owned();
        openai::sse::event(&mut out, openai::error::body(&Status::internal(message.clone())));
        assert_eq!(events(&out).len(), 1);
    });
}

/// Half of `demo`'s users on v2, and rules on everything that a header can say.
fn view() -> Arc<View> {
    let revision = |name: &str| Revision::new(name, format!("digest-{name}"));
    let half: Ppm = "50%".parse().unwrap();
    let rule = |priority| Rule {
        priority,
        canary: half,
        ..Rule::default()
    };
    let rules = vec![
        Rule {
            client_ip: vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            trusted_hops: 1,
            ..rule(1)
        },
        Rule {
            users: vec!["ada".into()],
            ..rule(2)
        },
        Rule {
            regions: vec!["eu".into()],
            devices: vec!["phone".into()],
            ..rule(3)
        },
    ];
    let route = Route {
        model: "demo".into(),
        stable: revision("v1"),
        canary: Some(Canary {
            revision: revision("v2"),
            share: half,
            ..Canary::default()
        }),
        rollout_uid: "r-1".into(),
        sticky: Sticky {
            keys: ["metadata:x-user-id", "auth:subject", "client_ip"]
                .map(|key| key.parse::<StickyKey>().unwrap())
                .into(),
            trusted_hops: 2,
            ..Sticky::default()
        },
        pinnable: vec![revision("v3")],
        revoked: vec!["v0".into()],
        mirror: Some(Mirror {
            share: half,
            max_output_tokens: 4,
        }),
        rules,
        ..Route::default()
    };
    let snapshot = Snapshot {
        epoch: 1,
        routes: [("demo".to_owned(), route)].into(),
    };
    Arc::new(View {
        snapshot: Some(Arc::new(snapshot)),
        ..View::default()
    })
}

/// Lines of `name: value`; a name of one byte is one of those that the gateway reads.
fn headers(input: &[u8]) -> HeaderMap {
    const NAMES: [&str; 11] = [
        "x-user-id",
        "x-model-version",
        "x-session-id",
        "x-tenant-id",
        FORWARDED_FOR,
        "grpc-timeout",
        "traceparent",
        "tracestate",
        "authorization",
        "x-region",
        "x-device",
    ];
    let mut headers = HeaderMap::new();
    for line in input.split(|&byte| byte == b'\n') {
        let Some((name, value)) = line.split_at_checked(1) else {
            continue;
        };
        let name = HeaderName::from_static(NAMES[usize::from(name[0]) % NAMES.len()]);
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    }
    headers
}

#[test]
fn request_headers() {
    let (view, overrides) = (view(), Overrides::open(None).unwrap());
    let peer = Some(IpAddr::from([10, 0, 0, 1]));
    bolero::check!().for_each(|input: &[u8]| {
        let headers = headers(input);
        if let Err(status) = timeout::deadline(&headers, Duration::from_secs(1)) {
            is_told(&status);
        }
        admission::tenant(&headers, peer);
        penstock_telemetry::propagation::extract(&headers);
        if let Some(Ok(text)) = headers.get("x-user-id").map(|value| value.to_str())
            && let Ok(id) = ReplyId::parse(text)
        {
            assert_eq!(ReplyId::parse(&id.text("")), Ok(id));
        }
        let caller = Caller {
            headers: &headers,
            peer,
        };
        let assign = || routing::assign(&view, &overrides, "demo", caller);
        match (assign(), assign()) {
            (Ok(first), Ok(second)) => {
                assert_eq!(first.key, second.key);
                assert!(first.key.is_none() || first.revision == second.revision);
                let told = first.told(Status::internal("told"));
                assert!(told.metadata().contains_key("x-model-version"));
                first.mirrored(0);
            }
            (Err(status), Err(_)) => is_told(&status),
            _ => panic!("the same request is served and refused"),
        }
    });
}
