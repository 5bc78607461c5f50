//! gRPC: assignment, metadata, retries, and every way in which a call can end.

use std::{sync::atomic::Ordering, time::Duration};

use gateway::{Config, balance::Policy};
use http_body_util::Full;
use hyper_util::{client::legacy::Client as HttpClient, rt::TokioExecutor};
use penstock_proto::v1;
use tonic::{Code, Status};

use crate::support::{
    Behaviour, Client, TestGateway, TestWorker, config, endpoint, eventually, generate, prompt, raw_generate,
    view, with,
};

async fn one(behaviour: Behaviour) -> (TestWorker, TestGateway, Client) {
    let worker = TestWorker::start(behaviour).await;
    let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1", "v2", "v3"])])).await;
    let client = gateway.client().await;
    (worker, gateway, client)
}

#[tokio::test]
async fn the_reply_passes_and_the_gateways_word_stands_once() {
    let (worker, _gateway, mut client) = one(Behaviour::Speak).await;
    let request = with(
        prompt("demo"),
        &[
            ("x-user-id", "ada"),
            ("authorization", "secret"),
            ("x-custom", "1"),
        ],
    );
    let (metadata, chunks) = generate(&mut client, request).await.unwrap();
    assert_eq!(
        chunks.iter().map(|chunk| chunk.text.as_str()).collect::<String>(),
        "Hello world"
    );
    for (name, value) in [
        ("x-model-version", "v1"),
        ("x-rollout-epoch", "42"),
        ("x-assignment-reason", "bucket"),
        ("x-seed", "7"),
    ] {
        assert_eq!(
            metadata.get_all(name).iter().collect::<Vec<_>>(),
            [value],
            "{name}"
        );
    }
    let (seen, message) = worker.last();
    assert_eq!(message, prompt("demo"));
    for (name, value) in [
        ("x-model-version", "v1"),
        ("x-rollout-epoch", "42"),
        ("x-assignment-reason", "bucket"),
        ("x-custom", "1"),
    ] {
        assert_eq!(seen.get(name).unwrap(), value, "{name}");
    }
    assert!(
        seen.get("authorization").is_none(),
        "credentials end at the gateway"
    );
}

#[tokio::test]
async fn the_trailer_with_the_stats_passes_and_is_counted() {
    let (_worker, gateway, mut client) = one(Behaviour::Speak).await;
    let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    let trailers = stream.trailers().await.unwrap().unwrap();
    assert!(trailers.get_bin("penstock-stats-bin").is_some());
    let reply = crate::support::http("GET", gateway.ops, "/metrics", &[], "").await;
    let output = |line: &&str| line.starts_with("penstock_tokens") && line.contains("\"output\"");
    let line = reply
        .body
        .lines()
        .find(output)
        .unwrap_or_else(|| panic!("{}", reply.body));
    assert!(
        line.contains("demo") && line.contains("v1") && line.ends_with(" 2"),
        "{line}"
    );
}

#[tokio::test]
async fn users_are_split_by_share_and_stay_where_they_are() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let split = |percent| {
        let view = view(percent, vec![worker.endpoint("w", &["v1", "v2"])]);
        async move {
            let gateway = TestGateway::start(view).await;
            let mut client = gateway.client().await;
            let mut users = Vec::new();
            for user in 0..1000 {
                let user = format!("u{user}");
                let reply = generate(&mut client, with(prompt("demo"), &[("x-user-id", &user)])).await;
                users.push(reply.unwrap().0.get("x-model-version").unwrap() == "v2");
            }
            users
        }
    };
    let (five, again, twenty) = (split(5).await, split(5).await, split(20).await);
    assert_eq!(five, again, "a restart moves nobody");
    let count = |users: &[bool]| users.iter().filter(|canary| **canary).count();
    assert!(
        (29..=71).contains(&count(&five)),
        "{} of 1000 at 5 %",
        count(&five)
    );
    assert!(
        (162..=238).contains(&count(&twenty)),
        "{} of 1000 at 20 %",
        count(&twenty)
    );
    assert!(
        five.iter().zip(&twenty).all(|(five, twenty)| !five || *twenty),
        "a wider share moves nobody back"
    );
}

#[tokio::test]
async fn a_pin_by_metadata_or_by_model_name_decides() {
    let (worker, _gateway, mut client) = one(Behaviour::Speak).await;
    for request in [
        with(prompt("demo"), &[("x-model-version", "v3")]),
        with(prompt("demo@v3"), &[]),
        with(prompt("demo@v3"), &[("x-model-version", "v3")]),
    ] {
        let (metadata, _) = generate(&mut client, request).await.unwrap();
        assert_eq!(
            (
                metadata.get("x-model-version").unwrap(),
                metadata.get("x-assignment-reason").unwrap()
            ),
            (&"v3".parse().unwrap(), &"pin".parse().unwrap())
        );
        assert_eq!(
            worker.last().1.model,
            "demo",
            "the worker is asked by the plain name"
        );
    }
    let (metadata, _) = generate(&mut client, with(prompt("demo@v0"), &[])).await.unwrap();
    assert_eq!(metadata.get("x-assignment-reason").unwrap(), "pin_revoked");
    let contradiction = with(prompt("demo@v3"), &[("x-model-version", "v2")]);
    let status = generate(&mut client, contradiction).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    // Exactly one model is served, so its name may be left out.
    assert!(generate(&mut client, with(prompt(""), &[])).await.is_ok());
    assert_eq!(worker.last().1.model, "demo");
}

#[tokio::test]
async fn what_is_not_served_is_not_found_and_what_is_says_so() {
    let (_worker, _gateway, mut client) = one(Behaviour::Speak).await;
    let status = generate(&mut client, with(prompt("nothing"), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(
        status.message().contains("nothing") && status.message().contains("demo"),
        "{status}"
    );
    let status = generate(&mut client, with(prompt("demo@v9"), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(
        status.message().contains("v9") && status.message().contains("v3"),
        "{status}"
    );
}

#[tokio::test]
async fn a_revision_without_a_worker_is_unavailable_and_says_when_to_come_back() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut impostor = worker.endpoint("w", &["v1"]);
    impostor.revisions[0].digest = "another".into();
    let gateway = TestGateway::start(view(0, vec![impostor])).await;
    let status = generate(&mut gateway.client().await, with(prompt("demo"), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(tonic_types::StatusExt::get_details_retry_info(&status).is_some());
    assert_eq!(status.metadata().get("x-model-version").unwrap(), "v1");
    assert_eq!(worker.requests(), 0);
}

#[tokio::test]
async fn a_dead_or_a_refusing_worker_is_passed_over() {
    let alive = TestWorker::start(Behaviour::Speak).await;
    let draining = TestWorker::start(Behaviour::Refuse(Status::unavailable("draining"))).await;
    let mut dead = TestWorker::start(Behaviour::Speak).await;
    dead.kill();
    let endpoints = vec![
        endpoint("dead", dead.address, &["v1"]),
        draining.endpoint("draining", &["v1"]),
        alive.endpoint("alive", &["v1"]),
    ];
    let gateway = TestGateway::start(view(0, endpoints)).await;
    let mut client = gateway.client().await;
    for _ in 0..20 {
        let (_, chunks) = generate(&mut client, with(prompt("demo"), &[])).await.unwrap();
        assert_eq!(chunks.len(), 2);
    }
    assert_eq!(alive.requests(), 20);
    assert!(
        draining.requests() < 20,
        "a worker that drains is not asked every time"
    );
}

#[tokio::test]
async fn a_worker_that_dies_before_its_first_token_is_replaced() {
    let mut silent = TestWorker::start(Behaviour::Silent).await;
    let only = TestGateway::start(view(0, vec![silent.endpoint("silent", &["v1"])])).await;
    let spare = TestWorker::start(Behaviour::Speak).await;
    let mut both = vec![silent.endpoint("silent", &["v1"])];
    both.push(spare.endpoint("spare", &["v1"]));
    let gateway = TestGateway::start(view(0, both)).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let mut client = gateway.client().await;
        calls.spawn(async move { generate(&mut client, with(prompt("demo"), &[])).await });
    }
    let mut lonely = only.client().await;
    calls.spawn(async move {
        let status = generate(&mut lonely, with(prompt("demo"), &[]))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        Ok((Default::default(), vec![Default::default(); 2]))
    });
    eventually("both have requests", async || {
        silent.requests() > 1 && spare.requests() > 0
    })
    .await;
    silent.kill();
    while let Some(joined) = calls.join_next().await {
        assert_eq!(joined.unwrap().unwrap().1.len(), 2);
    }
}

#[tokio::test]
async fn a_worker_that_dies_in_the_middle_ends_the_reply_with_unavailable() {
    let (mut worker, _gateway, mut client) = one(Behaviour::Hang).await;
    let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Hello");
    worker.kill();
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("worker w"), "{status}");
}

#[tokio::test]
async fn a_status_in_the_middle_and_one_at_the_start_pass_as_they_are() {
    let broken = Status::internal("the engine broke");
    let (_worker, _gateway, mut client) = one(Behaviour::Break(broken)).await;
    let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let status = stream.message().await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Internal, "the engine broke")
    );

    let details = bytes::Bytes::from_static(b"details");
    let refused = Status::with_details(Code::ResourceExhausted, "full", details);
    let (worker, _gateway, mut client) = one(Behaviour::Refuse(refused)).await;
    let status = generate(&mut client, with(prompt("demo"), &[]))
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), status.message(), status.details()),
        (Code::ResourceExhausted, "full", &b"details"[..])
    );
    assert_eq!(worker.requests(), 1, "only UNAVAILABLE is tried elsewhere");
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_workers_stream() {
    for behaviour in [Behaviour::Hang, Behaviour::Silent] {
        let (worker, _gateway, mut client) = one(behaviour).await;
        let call = tokio::spawn(async move {
            let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
            while stream.message().await.unwrap().is_some() {}
        });
        eventually("the worker has the request", async || worker.requests() == 1).await;
        assert_eq!(worker.seen.dropped.load(Ordering::SeqCst), 0);
        call.abort();
        eventually("the worker's stream is dropped", async || {
            worker.seen.dropped.load(Ordering::SeqCst) == 1
        })
        .await;
    }
}

#[tokio::test]
async fn the_deadline_holds_before_and_in_the_reply_and_goes_on_to_the_worker() {
    for behaviour in [Behaviour::Hang, Behaviour::Silent] {
        let (worker, gateway, _client) = one(behaviour).await;
        let status = raw_generate(gateway.address, "150m").await;
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert!(worker.last().0.get("grpc-timeout").is_some());
        eventually("the worker's stream is dropped", async || {
            worker.seen.dropped.load(Ordering::SeqCst) == 1
        })
        .await;
    }
    let worker = TestWorker::start(Behaviour::Hang).await;
    let mut config = crate::support::config(view(0, vec![worker.endpoint("w", &["v1"])]));
    config.default_timeout = Duration::from_millis(150);
    let gateway = TestGateway::run(config).await;
    let mut stream = gateway
        .client()
        .await
        .generate(prompt("demo"))
        .await
        .unwrap()
        .into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let status = stream.message().await.unwrap_err();
    assert_eq!(
        status.code(),
        Code::DeadlineExceeded,
        "without one, the gateway's own: {status}"
    );

    let (_worker, _gateway, mut client) = one(Behaviour::Speak).await;
    let nonsense = with(prompt("demo"), &[("grpc-timeout", "soon")]);
    assert_eq!(
        generate(&mut client, nonsense).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn a_huge_request_is_refused_and_the_connection_goes_on() {
    let (_worker, _gateway, client) = one(Behaviour::Speak).await;
    let mut client = client.max_encoding_message_size(64 << 20);
    let mut huge = prompt("demo");
    huge.input = Some(v1::generate_request::Input::Prompt("x".repeat(17 << 20)));
    let status = generate(&mut client, with(huge, &[])).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert!(generate(&mut client, with(prompt("demo"), &[])).await.is_ok());
}

#[tokio::test]
async fn tokenize_and_score_pass_and_models_are_listed() {
    let (_worker, _gateway, mut client) = one(Behaviour::Speak).await;
    let request = v1::TokenizeRequest {
        model: "demo@v3".into(),
        ..Default::default()
    };
    let reply = client.tokenize(request).await.unwrap();
    assert_eq!(reply.metadata().get("x-model-version").unwrap(), "v3");
    assert_eq!(
        reply.into_inner(),
        v1::TokenizeResponse {
            ids: vec![1, 2, 3],
            text: "demo".into()
        }
    );

    let text = |text: &str| v1::Continuation {
        kind: Some(v1::continuation::Kind::Text(text.into())),
    };
    let request = v1::ScoreRequest {
        model: "demo@v2".into(),
        input: Some(v1::score_request::Input::Prompt("1 + 1 = ".into())),
        continuations: vec![text("2"), text("three")],
        ..Default::default()
    };
    let reply = client.score(request).await.unwrap();
    assert_eq!(reply.metadata().get("x-model-version").unwrap(), "v2");
    let scores = reply.into_inner().scores;
    let logprobs: Vec<f64> = scores.iter().map(|score| score.logprob).collect();
    assert_eq!(logprobs, [-3.0, -7.0]);

    let models = client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    let [demo] = models.as_slice() else {
        panic!("{models:?}")
    };
    assert_eq!((demo.name.as_str(), demo.stable.as_str()), ("demo", "v1"));
    let revisions: Vec<_> = demo
        .revisions
        .iter()
        .map(|r| (r.name.as_str(), r.context_length))
        .collect();
    assert_eq!(revisions, [("v1", 512), ("v2", 512), ("v3", 512)]);
}

#[tokio::test]
async fn a_worker_that_restarts_on_its_port_is_used_again() {
    let (mut worker, gateway, mut client) = one(Behaviour::Speak).await;
    assert!(generate(&mut client, with(prompt("demo"), &[])).await.is_ok());
    worker.kill();
    let address = worker.address;
    let status = generate(&mut client, with(prompt("demo"), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let _again = TestWorker::start_on(address, Behaviour::Speak).await;
    eventually("the worker is asked again", async || {
        generate(&mut gateway.client().await, with(prompt("demo"), &[]))
            .await
            .is_ok()
    })
    .await;
    tokio::time::timeout(
        Duration::from_secs(5),
        generate(&mut client, with(prompt("demo"), &[])),
    )
    .await
    .unwrap()
    .unwrap();
}

#[tokio::test]
async fn whoever_compresses_is_told_which_encodings_there_are() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1"])])).await;
    let client = HttpClient::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http::<Full<bytes::Bytes>>();
    for method in ["Generate", "Tokenize", "Feedback"] {
        let request = http::Request::post(format!(
            "http://{}/penstock.v1.Inference/{method}",
            gateway.address
        ));
        let request = request
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-encoding", "gzip")
            .body(Full::from(&b"\x01\0\0\0\x02zz"[..]))
            .unwrap();
        let reply = client.request(request).await.unwrap();
        assert_eq!(reply.status(), 200);
        assert_eq!(reply.headers()["grpc-accept-encoding"], "identity");
        let status = Status::from_header_map(reply.headers()).unwrap();
        assert_eq!(status.code(), Code::Unimplemented);
        assert_eq!(
            status.message(),
            "grpc-encoding gzip is not supported: send requests uncompressed"
        );
    }
    assert_eq!(worker.requests(), 0);
}

#[tokio::test]
async fn however_many_workers_are_gone_the_one_that_is_left_is_found() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut endpoints = vec![worker.endpoint("alive", &["v1"])];
    // Nobody listens on the ports of listeners that were dropped.
    for index in 0..12 {
        let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        endpoints.push(endpoint(
            &format!("gone-{index}"),
            gone.local_addr().unwrap(),
            &["v1"],
        ));
    }
    let gateway = TestGateway::run(Config {
        routing: Policy::Random,
        ..config(view(0, endpoints))
    })
    .await;
    let client = gateway.client().await;
    let asked = (0..8).map(|_| {
        let mut client = client.clone();
        async move { generate(&mut client, with(prompt("demo"), &[])).await }
    });
    for reply in futures_util::future::join_all(asked).await {
        reply.unwrap();
    }
}
