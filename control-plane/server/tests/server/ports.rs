//! What the ports say.

use std::sync::Arc;

use control_plane::Config;
use penstock_store::embedded::EmbeddedStore;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::harness::Running;

#[tokio::test]
async fn a_busy_port_is_named_with_its_flag_and_the_remedy() {
    let busy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = busy.local_addr().unwrap();
    let config = Config {
        listen: address,
        ..Config::new(Arc::new(EmbeddedStore::in_memory()))
    };
    let Err(error) = config.build().await else {
        panic!("{address} is taken");
    };
    let message = error.to_string();
    assert!(message.contains(&address.to_string()), "{message}");
    assert!(
        message.contains("--listen") && message.contains("choose another"),
        "{message}"
    );
}

#[tokio::test]
async fn health_is_told_for_each_service() {
    let running = Running::start().await;
    let endpoint = tonic::transport::Endpoint::from_shared(running.address.clone()).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    for service in ["", "penstock.v1.Admin", "penstock.v1.Sync"] {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        // It follows readiness by a moment.
        let mut watch = health.watch(request).await.unwrap().into_inner();
        while watch.message().await.unwrap().unwrap().status() != ServingStatus::Serving {}
    }
}
