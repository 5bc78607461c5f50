//! What is served on the two ports.

use std::time::Duration;

use axum::{Router, routing::post};
use penstock_proto::v1::inference_server::InferenceServer;
use penstock_telemetry::{
    Metrics, listener,
    ops::{self, Health},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    generate::InferenceService,
    readiness::{self, Readiness, ReadinessGate},
};

/// The largest request: a prompt of a million tokens as ids takes a quarter of this.
const MAX_REQUEST_BYTES: usize = 16 << 20;
/// Connections whose streams have ended get so long to be closed by their other side.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Both ports while they are served.
pub(crate) struct Ports {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Ports {
    /// Serves both from now on.
    pub(crate) fn open(
        listener: TcpListener,
        ops_listener: TcpListener,
        service: &InferenceService,
        metrics: Metrics,
    ) -> Self {
        let stop = CancellationToken::new();
        let health = health(&service.gate);
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let inference = InferenceServer::new(service.clone()).max_decoding_message_size(MAX_REQUEST_BYTES);
        let describe = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(penstock_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let routes = tonic::service::Routes::new(inference)
            .add_service(health_service)
            .add_service(
                describe()
                    .build_v1()
                    .expect("the generated descriptors are valid"),
            )
            .add_service(
                describe()
                    .build_v1alpha()
                    .expect("the generated descriptors are valid"),
            );
        let router = routes
            .into_axum_router()
            .merge(ops::health_router(health.clone()));
        let ops_router = ops::router(metrics, health).merge(drain_router(service));
        let stopped = stop.clone().cancelled_owned();
        let tasks = vec![
            tokio::spawn(listener::serve(listener, router, stop.clone())),
            tokio::spawn(async move {
                if let Err(error) = ops::serve(ops_listener, ops_router, stopped).await {
                    tracing::error!(%error, "the operations port failed");
                }
            }),
            tokio::spawn(readiness::report(
                reporter,
                service.gate.subscribe(),
                stop.clone(),
            )),
            tokio::spawn(readiness::watch_progress(
                service.catalogue.clone(),
                service.gate.clone(),
                stop.clone(),
            )),
        ];
        Self { stop, tasks }
    }

    /// Closes connections, those that linger by force.
    pub(crate) async fn close(self) {
        self.stop.cancel();
        let aborts: Vec<_> = self.tasks.iter().map(JoinHandle::abort_handle).collect();
        let all = futures_util::future::join_all(self.tasks);
        if tokio::time::timeout(CLOSE_TIMEOUT, all).await.is_err() {
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
    }
}

/// Live while the engines make progress, ready while requests are taken.
fn health(gate: &ReadinessGate) -> Health {
    let (live, ready) = (gate.clone(), gate.clone());
    Health::new(move || match ready.get() {
        Readiness::Serving => Ok(()),
        other => Err(other.to_string()),
    })
    .with_live(move || match live.get() {
        stalled @ Readiness::Stalled(_) => Err(stalled.to_string()),
        _ => Ok(()),
    })
}

/// `POST /drain`: no new requests from now on; the process goes on until it is told to end.
fn drain_router(service: &InferenceService) -> Router {
    let service = service.clone();
    let drain = move || {
        service.gate.drain();
        std::future::ready(format!("draining, {} in flight\n", service.in_flight.len()))
    };
    Router::new().route("/drain", post(drain))
}
