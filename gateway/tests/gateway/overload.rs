//! More than can be served, and workers that are out of order.

use std::time::{Duration, Instant};

use gateway::{Config, Overload, balance::Policy};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::{self, Behaviour, TestGateway, TestWorker, generate, http, prompt, view, with};

#[tokio::test]
async fn a_tenant_that_asks_too_often_is_told_when_to_come_back() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let gateway = TestGateway::run(Config {
        overload: Overload {
            tenant_requests_per_minute: Some(2),
            ..Overload::default()
        },
        ..support::config(view(0, vec![worker.endpoint("w", &["v1"])]))
    })
    .await;
    let mut client = gateway.client().await;
    let mut ask = async |user| generate(&mut client, with(prompt("demo"), &[("x-user-id", user)])).await;
    for user in ["u1", "u1", "u2"] {
        ask(user).await.unwrap();
    }
    let status: Status = ask("u1").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    let delay = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(
        delay > Duration::from_secs(25) && delay <= Duration::from_secs(30),
        "{delay:?}"
    );
    let body = r#"{"model": "demo", "prompt": "Hello", "user": "u1"}"#;
    let reply = http("POST", gateway.address, "/v1/completions", &[], body).await;
    assert_eq!(reply.status, 429, "{}", reply.body);
    let seconds: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((25..=30).contains(&seconds), "{seconds}");
    assert_eq!(worker.requests(), 3);
}

#[tokio::test]
async fn what_finds_no_room_is_refused_and_room_that_is_given_back_is_used() {
    let worker = TestWorker::start(Behaviour::Hang).await;
    let gateway = TestGateway::run(Config {
        overload: Overload {
            // Requests count as 257 tokens at first: seven fit into the least that a worker takes.
            max_worker_tokens: 0,
            max_queue_wait: Duration::from_millis(200),
            ..Overload::default()
        },
        ..support::config(view(0, vec![worker.endpoint("w", &["v1"])]))
    })
    .await;
    let mut client = gateway.client().await;
    let mut streams = Vec::new();
    for _ in 0..7 {
        let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
        stream.message().await.unwrap();
        streams.push(stream);
    }
    let began = Instant::now();
    let status = client.generate(prompt("demo")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.get_details_retry_info().is_some());
    assert!(began.elapsed() >= Duration::from_millis(150));
    assert_eq!(worker.requests(), 7);
    streams.pop();
    support::eventually("there is room again", async || {
        let mut client = client.clone();
        client.generate(prompt("demo")).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_fails_its_requests_gets_no_more() {
    let broken = TestWorker::start(Behaviour::Refuse(Status::internal("broken"))).await;
    let sound = TestWorker::start(Behaviour::Speak).await;
    let endpoints = vec![
        broken.endpoint("broken", &["v1"]),
        sound.endpoint("sound", &["v1"]),
    ];
    let gateway = TestGateway::run(Config {
        routing: Policy::Random,
        ..support::config(view(0, endpoints))
    })
    .await;
    let mut client = gateway.client().await;
    let mut failed = 0;
    for _ in 0..60 {
        failed += usize::from(generate(&mut client, with(prompt("demo"), &[])).await.is_err());
    }
    assert_eq!(failed, broken.requests());
    // It is ejected with the fifth failure, and nobody is sent to find out for two seconds.
    assert_eq!(failed, 5, "of 60 failed");
}
