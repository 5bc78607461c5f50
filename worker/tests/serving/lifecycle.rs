//! Start, health, drain and end.

use std::time::Duration;

use futures_util::StreamExt as _;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt as _;
use worker::{BuildError, Config, RunnerKind};

use crate::harness::{Running, config, fast, generate, http, prompt, read, slow, start, store, tokens, with};

async fn health(running: &Running) -> ServingStatus {
    let endpoint = tonic::transport::Endpoint::new(format!("http://{}", running.addresses.listen)).unwrap();
    let mut client = HealthClient::new(endpoint.connect().await.unwrap());
    let request = HealthCheckRequest {
        service: "penstock.v1.Inference".into(),
    };
    client.check(request).await.unwrap().into_inner().status()
}

#[tokio::test]
async fn http_1_and_grpc_share_the_port() {
    let running = fast().await;
    for path in ["/healthz", "/health", "/readyz"] {
        assert_eq!(
            http(running.addresses.listen, "GET", path).await,
            (200, "ok\n".into()),
            "{path}"
        );
        assert_eq!(http(running.addresses.ops, "GET", path).await.0, 200, "{path}");
    }
    assert_eq!(health(&running).await, ServingStatus::Serving);
}

#[tokio::test]
async fn metrics_count_requests_by_revision_and_outcome() {
    let mut running = fast().await;
    generate(&mut running.client, with(prompt("Hello", tokens(8)), &[]))
        .await
        .unwrap();
    generate(&mut running.client, with(prompt("Hello", tokens(0)), &[]))
        .await
        .unwrap_err();
    let (_, text) = http(running.addresses.ops, "GET", "/metrics").await;
    for (outcome, count) in [("ok", " 1"), ("invalid_argument", " 1")] {
        let line = text
            .lines()
            .find(|line| {
                line.starts_with("penstock_requests_total") && line.contains(&format!("\"{outcome}\""))
            })
            .unwrap_or_else(|| panic!("no {outcome} in {text}"));
        assert!(
            line.contains("penstock_revision=\"v1\"") && line.ends_with(count),
            "{line}"
        );
    }
    assert!(text.contains("gen_ai_server_time_to_first_token"), "{text}");
}

#[tokio::test]
async fn draining_refuses_new_requests_and_finishes_the_running_one() {
    let mut running = slow().await;
    let mut stream = running
        .client
        .generate(prompt("Hello", tokens(60)))
        .await
        .unwrap()
        .into_inner();
    let first = stream.next().await.unwrap().unwrap();
    let (code, body) = http(running.addresses.ops, "POST", "/drain").await;
    assert_eq!((code, body.as_str()), (200, "draining, 1 in flight\n"));

    let status = generate(&mut running.client, with(prompt("Hello", tokens(1)), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.get_details_retry_info().unwrap().retry_delay.is_some());
    let (code, body) = http(running.addresses.listen, "GET", "/readyz").await;
    assert_eq!((code, body.as_str()), (503, "draining\n"));
    assert_eq!(http(running.addresses.listen, "GET", "/healthz").await.0, 200);
    assert_eq!(health(&running).await, ServingStatus::NotServing);

    let rest = read(stream).await;
    assert!(rest.status.is_none(), "{rest:?}");
    assert_eq!(first.token_ids.len() + rest.ids().len(), 60);
}

#[tokio::test]
async fn told_to_end_it_finishes_the_running_request_and_ends_well() {
    let mut running = slow().await;
    let mut stream = running
        .client
        .generate(prompt("Hello", tokens(60)))
        .await
        .unwrap()
        .into_inner();
    let first = stream.next().await.unwrap().unwrap();
    running.shutdown.cancel();
    let rest = read(stream).await;
    assert!(rest.status.is_none(), "{rest:?}");
    assert_eq!(first.token_ids.len() + rest.ids().len(), 60);
    running.ended.await.unwrap().unwrap();
    assert!(
        tokio::net::TcpStream::connect(running.addresses.listen)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn the_time_to_drain_is_limited() {
    let slow = config(store(), &["demo@v1"], Duration::from_millis(10));
    let mut running = start(Config {
        drain_timeout: Duration::from_millis(50),
        ..slow
    })
    .await;
    let mut stream = running
        .client
        .generate(prompt("Hello", tokens(4000)))
        .await
        .unwrap()
        .into_inner();
    stream.next().await.unwrap().unwrap();
    running.shutdown.cancel();
    let rest = read(stream).await;
    assert_eq!(rest.status.unwrap().code(), Code::Unavailable);
    running.ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_busy_port_is_named() {
    let running = fast().await;
    let busy = Config {
        listen: running.addresses.listen,
        ..config(store(), &["demo@v1"], Duration::ZERO)
    };
    let Err(error) = busy.build().await else {
        panic!("two workers on one port")
    };
    assert!(
        matches!(error, BuildError::Bind { port: "--listen", .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains(&running.addresses.listen.to_string()),
        "{error}"
    );
}

#[tokio::test]
async fn configurations_that_cannot_work_are_refused() {
    let build = |config: Config| async { config.build().await.err().map(|error| error.to_string()) };
    let base = || config(store(), &["demo@v1"], Duration::ZERO);
    let twice = config(store(), &["demo@v1", "demo@v1"], Duration::ZERO);
    assert_eq!(build(twice).await.unwrap(), "demo@v1 is named twice");
    let without_checkpoint = Config {
        runner: RunnerKind::Candle,
        ..base()
    };
    assert!(
        build(without_checkpoint)
            .await
            .unwrap()
            .contains("give --model demo@v1=PATH")
    );
    let everywhere = Config {
        listen: ([0, 0, 0, 0], 0).into(),
        ..base()
    };
    assert!(build(everywhere).await.unwrap().contains("--advertise"));
}

#[tokio::test]
async fn an_unreadable_checkpoint_ends_the_worker_with_its_name_and_path() {
    let missing = config(store(), &["demo@v1=/nonexistent/checkpoint"], Duration::ZERO);
    let server = Config {
        runner: RunnerKind::Candle,
        ..missing
    }
    .build()
    .await
    .unwrap();
    let error = server.run(Default::default()).await.unwrap_err();
    let text = format!("{:#}", anyhow::Error::new(error));
    assert!(
        text.contains("demo@v1") && text.contains("/nonexistent/checkpoint"),
        "{text}"
    );
}
