//! The gateway: takes requests over gRPC and HTTP, decides which revision serves each, and forwards it to a worker.
//!
//! ```text
//! gRPC ───────────────────▶┐                                      ┌▶ worker
//! OpenAI, SGLang ─▶ encode ┴▶ assign ─▶ pick a worker ─▶ forward ─┴▶ worker (if the first fails)
//!                               ▲ view: snapshot and endpoints
//! control plane ─▶ subscription ┘◀─ state directory
//! ```
//!
//! A gRPC reply passes through undecoded; its frames are kept, so that another worker can go on with it. The view is one value that is swapped whole, so that no request sees half
//! a change; it is kept on disk, so that a gateway serves without a control plane. This crate refuses to tokenize
//! and to decide a rollout.

mod admission;
pub mod balance;
mod budget;
mod choices;
pub mod config;
mod counts;
mod dispatch;
mod error;
mod feedback;
mod fields;
mod forward;
mod frames;
#[cfg(test)]
mod fuzz;
mod grammar;
mod grpc;
mod hedge;
mod held;
mod observe;
mod openai;
mod ops;
mod overrides;
mod pool;
mod ports;
mod readiness;
mod relay;
mod replies;
mod reply_id;
mod routing;
mod server;
mod sglang;
mod shadow;
mod state;
mod subscription;
mod timeout;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use penstock_telemetry::Metrics;

pub use admission::Overload;
pub use hedge::HedgeAfter;
pub use penstock_client::View;
pub use server::{Addresses, BuildError, RunError, Server};
pub use state::StateError;

/// Where a gateway listens, and where it learns what to serve.
#[derive(Debug, Clone)]
pub struct Config {
    /// gRPC and HTTP.
    pub listen: SocketAddr,
    /// Operations.
    pub ops_listen: SocketAddr,
    /// Addresses of the control planes; with none, it serves what it knows at its start for ever.
    pub control_planes: Vec<String>,
    /// Region, or empty.
    pub region: String,
    /// Stable name among all gateways; by default the address that it listens on.
    pub node: Option<String>,
    /// Where the view is kept; with none, a gateway starts without routes.
    pub state_dir: Option<PathBuf>,
    /// What it serves at first where the state directory holds nothing.
    pub initial: View,
    /// How a worker is chosen among those of a revision.
    pub routing: balance::Policy,
    /// What bounds the work that it takes on.
    pub overload: Overload,
    /// When a request that nobody has begun to answer is sent to a second worker; with none, never.
    pub hedge_after: Option<HedgeAfter>,
    /// How long a request may take whose caller does not say how long it waits (`grpc-timeout`).
    pub default_timeout: Duration,
    /// How long requests in flight may go on once the gateway is told to end.
    pub drain_timeout: Duration,
    /// Where it measures.
    pub metrics: Metrics,
}

impl Config {
    /// A gateway on the default loopback ports.
    pub fn new<A: Into<String>>(control_planes: impl IntoIterator<Item = A>) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            ops_listen: SocketAddr::from(([127, 0, 0, 1], 8081)),
            control_planes: control_planes.into_iter().map(Into::into).collect(),
            region: String::new(),
            node: None,
            state_dir: None,
            initial: View::default(),
            routing: balance::Policy::default(),
            overload: Overload::default(),
            hedge_after: None,
            default_timeout: Duration::from_secs(600),
            drain_timeout: Duration::from_secs(30),
            metrics: Metrics::local(),
        }
    }

    /// Binds both ports and reads the state directory.
    ///
    /// # Errors
    /// A port that is taken, an address of a control plane that cannot be used, or a state that cannot be read.
    pub async fn build(self) -> Result<Server, BuildError> {
        Server::bind(self).await
    }
}

/// A gateway of the control plane on its default loopback port.
impl Default for Config {
    fn default() -> Self {
        Self::new(["http://127.0.0.1:8090"])
    }
}
