//! What is served on the two ports.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Json, Router, response::IntoResponse as _, response::Response};
use http::{HeaderMap, StatusCode, header};
use penstock_telemetry::{
    Metrics, listener,
    ops::{self, Health},
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    feedback,
    forward::Forwarder,
    grpc, openai,
    readiness::{self, Readiness},
    sglang,
};

/// The service whose health is reported beside the whole server's (the empty name).
const SERVICE: &str = "penstock.v1.Inference";
/// The operations port gets so long for its last answers.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Both ports while they are served.
pub(crate) struct Ports {
    draining: Arc<AtomicBool>,
    stop: CancellationToken,
    stop_ops: CancellationToken,
    main: JoinHandle<()>,
    ops: JoinHandle<()>,
    health: [JoinHandle<()>; 2],
    reporter: HealthReporter,
}

impl Ports {
    /// Serves both from now on.
    pub(crate) fn open(
        listener: TcpListener,
        ops_listener: TcpListener,
        forwarder: Forwarder,
        metrics: Metrics,
    ) -> Self {
        let (stop, stop_ops) = (CancellationToken::new(), CancellationToken::new());
        let draining = Arc::new(AtomicBool::new(false));
        let (readiness, watcher) = readiness::watch(forwarder.view.clone(), forwarder.pool.clone());
        let (now, flag) = (readiness.clone(), draining.clone());
        let health = Health::new(move || match flag.load(Ordering::Relaxed) {
            true => Err("draining".into()),
            false => now.borrow().map_err(str::to_owned),
        });
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let reporting = tokio::spawn(report(reporter.clone(), readiness));
        let router = Router::new()
            .merge(openai::router(forwarder.clone()))
            .merge(sglang::router(forwarder.clone()))
            .merge(feedback::router(forwarder.clone()))
            .merge(grpc::router(forwarder.clone()))
            .merge(described(health_service))
            .merge(ops::health_router(health.clone()))
            .fallback(unknown)
            .method_not_allowed_fallback(wrong_method);
        let stopped = stop_ops.clone().cancelled_owned();
        let ops_router = ops::router(metrics, health)
            .merge(crate::ops::router(forwarder))
            .method_not_allowed_fallback(wrong_method);
        Self {
            draining,
            main: tokio::spawn(listener::serve(listener, router, stop.clone())),
            ops: tokio::spawn(async move {
                if let Err(error) = ops::serve(ops_listener, ops_router, stopped).await {
                    tracing::error!(%error, "the operations port failed");
                }
            }),
            health: [watcher, reporting],
            reporter,
            stop,
            stop_ops,
        }
    }

    /// Takes no more connections, lets requests in flight finish for up to `limit`, then closes both ports.
    pub(crate) async fn drain(self, limit: Duration) {
        self.draining.store(true, Ordering::Relaxed);
        self.health.iter().for_each(JoinHandle::abort);
        for service in ["", SERVICE] {
            self.reporter
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
        self.stop.cancel();
        close(self.main, limit).await;
        self.stop_ops.cancel();
        close(self.ops, CLOSE_TIMEOUT).await;
    }
}

async fn close(mut task: JoinHandle<()>, limit: Duration) {
    if tokio::time::timeout(limit, &mut task).await.is_err() {
        tracing::warn!(?limit, "the time to drain is over; ending what is left");
        task.abort();
    }
}

/// Tells grpc.health.v1 every change.
async fn report(reporter: HealthReporter, mut readiness: watch::Receiver<Readiness>) {
    loop {
        let status = match *readiness.borrow_and_update() {
            Ok(()) => ServingStatus::Serving,
            Err(_) => ServingStatus::NotServing,
        };
        for service in ["", SERVICE] {
            reporter.set_service_status(service, status).await;
        }
        if readiness.changed().await.is_err() {
            return;
        }
    }
}

/// grpc.health.v1 and both versions of reflection.
fn described<H>(health: tonic_health::pb::health_server::HealthServer<H>) -> Router
where
    H: tonic_health::pb::health_server::Health,
{
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(penstock_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(SERVICE)
            .with_service_name("grpc.health.v1.Health")
    };
    tonic::service::Routes::new(health)
        .add_service(
            describe()
                .build_v1()
                .expect("the generated descriptors are valid"),
        )
        .add_service(
            describe()
                .build_v1alpha()
                .expect("the generated descriptors are valid"),
        )
        .into_axum_router()
        .reset_fallback()
}

/// A path that nothing is at.
async fn unknown(method: http::Method, uri: http::Uri, headers: HeaderMap) -> Response {
    let message = format!("there is no {method} {}", uri.path());
    let kind = headers
        .get(header::CONTENT_TYPE)
        .map_or(&b""[..], |value| value.as_bytes());
    if kind.starts_with(b"application/grpc") {
        return Status::unimplemented(message).into_http();
    }
    refused(StatusCode::NOT_FOUND, "not_found", &message)
}

/// A path that is asked in another way. The fallback adds the methods that there are (`allow`).
async fn wrong_method(method: http::Method, uri: http::Uri) -> Response {
    let message = format!("{} cannot be asked with {method}", uri.path());
    refused(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", &message)
}

fn refused(status: StatusCode, code: &str, message: &str) -> Response {
    let error = serde_json::json!({
        "error": { "message": message, "type": "invalid_request_error", "param": null, "code": code }
    });
    (status, Json(error)).into_response()
}
