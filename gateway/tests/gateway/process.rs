//! The process around the requests: ports, probes, reflection, state on disk, drain.

use std::{net::SocketAddr, time::Duration};

use penstock_client::View;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::{v1, v1alpha};

use crate::support::{
    Behaviour, TestGateway, TestWorker, config, eventually, generate, http, prompt, view, with,
};

#[tokio::test]
async fn a_taken_port_is_named() {
    let gateway = TestGateway::start(View::default()).await;
    let mut second = config(View::default());
    second.listen = gateway.address;
    let error = second.build().await.unwrap_err().to_string();
    assert!(
        error.contains(&gateway.address.to_string())
            && error.contains("in use")
            && error.contains("--listen"),
        "{error}"
    );
    let mut third = config(View::default());
    third.ops_listen = gateway.ops;
    let error = third.build().await.unwrap_err().to_string();
    assert!(
        error.contains(&gateway.ops.to_string()) && error.contains("--ops-listen"),
        "{error}"
    );
}

#[tokio::test]
async fn a_control_plane_that_is_no_address_is_named() {
    let mut wrong = config(View::default());
    wrong.control_planes = vec!["http://".into()];
    assert!(wrong.build().await.is_err());
}

async fn status(address: SocketAddr, path: &str) -> u16 {
    http("GET", address, path, &[], "").await.status
}

#[tokio::test]
async fn ready_means_that_a_worker_answers() {
    let empty = TestGateway::start(View::default()).await;
    for address in [empty.address, empty.ops] {
        assert_eq!(
            (
                status(address, "/healthz").await,
                status(address, "/health").await
            ),
            (200, 200)
        );
        assert_eq!(status(address, "/readyz").await, 503);
    }
    let refused = generate(&mut empty.client().await, with(prompt("demo"), &[]))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");

    let mut worker = TestWorker::start(Behaviour::Speak).await;
    worker.kill();
    let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1"])])).await;
    assert_eq!(status(gateway.address, "/readyz").await, 503);
    let channel = tonic::transport::Endpoint::try_from(format!("http://{}", gateway.address))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut health = HealthClient::new(channel);
    let _again = TestWorker::start_on(worker.address, Behaviour::Speak).await;
    eventually("ready", async || status(gateway.address, "/readyz").await == 200).await;
    let request = HealthCheckRequest {
        service: "penstock.v1.Inference".into(),
    };
    let mut says = async || health.check(request.clone()).await.unwrap().into_inner().status;
    let serving = async {
        while says().await != 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), serving)
        .await
        .unwrap();
}

#[tokio::test]
async fn reflection_names_the_services_in_both_versions() {
    let gateway = TestGateway::start(View::default()).await;
    let channel = tonic::transport::Endpoint::try_from(format!("http://{}", gateway.address))
        .unwrap()
        .connect()
        .await
        .unwrap();

    let list = v1::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(list),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut stream = client
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let reply = format!("{:?}", stream.message().await.unwrap().unwrap());
    assert!(
        reply.contains("penstock.v1.Inference") && reply.contains("grpc.health.v1.Health"),
        "{reply}"
    );

    let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(list),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut stream = client
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let reply = format!("{:?}", stream.message().await.unwrap().unwrap());
    assert!(reply.contains("penstock.v1.Inference"), "{reply}");
}

#[tokio::test]
async fn a_gateway_serves_from_its_state_directory_alone() {
    let directory = tempfile::tempdir().unwrap();
    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut first = config(view(100, vec![worker.endpoint("w", &["v1", "v2"])]));
    first.state_dir = Some(directory.path().join("state"));
    let gateway = TestGateway::run(first).await;
    eventually("the view is on disk", async || {
        directory.path().join("state/view.json").exists()
    })
    .await;
    drop(gateway);

    let mut second = config(View::default());
    second.state_dir = Some(directory.path().join("state"));
    // Nobody is there: the gateway must not wait for it.
    second.control_planes = vec!["http://127.0.0.1:1".into()];
    let gateway = TestGateway::run(second).await;
    let (metadata, _) = generate(
        &mut gateway.client().await,
        with(prompt("demo"), &[("x-user-id", "ada")]),
    )
    .await
    .unwrap();
    assert_eq!(
        (
            metadata.get("x-model-version").unwrap(),
            metadata.get("x-rollout-epoch").unwrap()
        ),
        (&"v2".parse().unwrap(), &"42".parse().unwrap())
    );
}

#[tokio::test]
async fn a_state_that_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("view.json"), "{").unwrap();
    let mut broken = config(View::default());
    broken.state_dir = Some(directory.path().to_owned());
    let error = broken.build().await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        cause.contains("view.json") && cause.contains("move it away"),
        "{cause}"
    );
}

#[tokio::test]
async fn a_drain_ends_streams_that_outlast_its_limit() {
    let worker = TestWorker::start(Behaviour::Hang).await;
    let server = config(view(0, vec![worker.endpoint("w", &["v1"])]))
        .build()
        .await
        .unwrap();
    let address = server.addresses().listen;
    let stop = CancellationToken::new();
    let running = tokio::spawn(server.run(stop.clone()));
    let mut client =
        penstock_proto::v1::inference_client::InferenceClient::connect(format!("http://{address}"))
            .await
            .unwrap();
    let mut stream = client.generate(prompt("demo")).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    stop.cancel();
    // The stream never ends by itself: the limit of one second does.
    assert!(stream.message().await.is_err());
    tokio::time::timeout(Duration::from_secs(10), running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(
        tokio::net::TcpStream::connect(address).await.is_err(),
        "the port is free again"
    );
}
