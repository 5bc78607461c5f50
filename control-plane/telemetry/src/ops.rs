//! The operations port: `/metrics`, `/healthz` (alias `/health`) and `/readyz`.
//!
//! A process merges its own routes into the router, e.g. its drain.

use crate::Metrics;
use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use std::{fmt, future::Future, io, sync::Arc};
use tokio::net::TcpListener;

type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Whether the process is alive and ready, asked anew at every probe. A check that fails says in a few words
/// what is missing.
#[derive(Clone)]
pub struct Health {
    live: Check,
    ready: Check,
}

impl Health {
    /// Always alive, and ready when `ready` says so.
    pub fn new(ready: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self {
            live: Arc::new(|| Ok(())),
            ready: Arc::new(ready),
        }
    }

    /// Alive only while `live` says so, e.g. while the engine makes progress.
    #[must_use]
    pub fn with_live(mut self, live: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.live = Arc::new(live);
        self
    }

    /// Asks whether the process is alive.
    ///
    /// # Errors
    /// What is wrong.
    pub fn live(&self) -> Result<(), String> {
        (self.live)()
    }

    /// Asks whether the process is alive and can take requests.
    ///
    /// # Errors
    /// What is missing.
    pub fn ready(&self) -> Result<(), String> {
        self.live()?;
        (self.ready)()
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health")
            .field("live", &self.live())
            .field("ready", &self.ready())
            .finish()
    }
}

/// `/healthz`, `/health` and `/readyz`: 200 `ok`, or 503 with what is missing. For a process's first port.
pub fn health_router(health: Health) -> Router {
    let live = {
        let health = health.clone();
        move || std::future::ready(answer(health.live()))
    };
    let ready = move || std::future::ready(answer(health.ready()));
    Router::new()
        .route("/healthz", get(live.clone()))
        .route("/health", get(live))
        .route("/readyz", get(ready))
}

/// The operations port's routes: [`health_router`] and `/metrics`.
pub fn router(metrics: Metrics, health: Health) -> Router {
    let text = move || {
        let text = metrics.prometheus_text();
        std::future::ready((
            [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
            text,
        ))
    };
    health_router(health).route("/metrics", get(text))
}

/// Serves `router` on `listener` until `shutdown` is ready and the requests under way are answered.
///
/// # Errors
/// What the listener fails with.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router)
        .with_graceful_shutdown(shutdown)
        .await
}

fn answer(result: Result<(), String>) -> Response {
    match result {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("{missing}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn get_path(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    #[tokio::test]
    async fn probes_and_metrics_answer_until_shutdown() {
        let ready = Arc::new(AtomicBool::new(false));
        let flag = ready.clone();
        let health = Health::new(move || match flag.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err("no snapshot yet".to_owned()),
        });
        let metrics = Metrics::local();
        let routes =
            router(metrics, health).merge(Router::new().route("/drain", get(|| async { "draining" })));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = serve(listener, routes, async move { drop(stopped.await) });
        let client = async {
            assert!(get_path(address, "/healthz").await.starts_with("HTTP/1.1 200"));
            assert!(get_path(address, "/health").await.starts_with("HTTP/1.1 200"));
            let unready = get_path(address, "/readyz").await;
            assert!(
                unready.starts_with("HTTP/1.1 503") && unready.ends_with("no snapshot yet\n"),
                "{unready}"
            );
            ready.store(true, Ordering::Relaxed);
            assert!(get_path(address, "/readyz").await.starts_with("HTTP/1.1 200"));
            assert!(get_path(address, "/metrics").await.contains("version=0.0.4"));
            assert!(get_path(address, "/drain").await.ends_with("draining"));
            stop.send(()).unwrap();
        };
        let (served, ()) = tokio::join!(server, client);
        served.unwrap();
    }

    #[test]
    fn a_process_that_is_not_alive_is_not_ready() {
        let health = Health::new(|| Ok(())).with_live(|| Err("the engine hangs".to_owned()));
        assert_eq!(health.ready(), Err("the engine hangs".to_owned()));
    }
}
