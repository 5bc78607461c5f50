//! The control plane: stores rollouts, decides what happens next, and tells gateways what to apply.
//!
//! ```text
//! ctl ──Admin──▶ compare-and-swap + audit ──▶ store ──watch──▶ World (in memory)
//!                                               ▲                 │
//!                                leader only:   │ next phase,     │ routes changed?
//!                                               └ next snapshot ◀─┤
//! gateways ◀──Sync: snapshots, endpoints; acks, nacks ──▶ Gateways (in memory)
//! ```
//!
//! It never sees a token: traffic does not pass through it, and goes on without it. It keeps nothing on disk of
//! its own; what is not in the store is learned again from each gateway's Hello.

mod admin;
mod audit;
pub mod config;
mod controller;
mod dashboard;
mod gateways;
mod leader;
pub mod notify;
mod observed;
mod prometheus;
mod server;
mod status;
mod sync;
mod world;

use std::{net::SocketAddr, sync::Arc};

use penstock_store::Store;
use penstock_telemetry::Metrics;

pub use server::{Addresses, BuildError, RunError, Server};

/// Where a control plane listens and what it stands on.
#[derive(Clone)]
pub struct Config {
    /// gRPC and HTTP.
    pub listen: SocketAddr,
    /// Operations.
    pub ops_listen: SocketAddr,
    /// `host:port` under which others reach this control plane; by default the address that it listens on.
    pub advertise: Option<String>,
    /// Where everything is kept.
    pub store: Arc<dyn Store>,
    /// Where it measures.
    pub metrics: Metrics,
    /// Webhooks that are told of changes.
    pub notify: Vec<notify::Target>,
}

impl Config {
    /// A control plane on the default loopback ports.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8090)),
            ops_listen: SocketAddr::from(([127, 0, 0, 1], 8091)),
            advertise: None,
            store,
            metrics: Metrics::local(),
            notify: Vec::new(),
        }
    }

    /// Binds both ports.
    ///
    /// # Errors
    /// A port that is taken.
    pub async fn build(self) -> Result<Server, BuildError> {
        Server::bind(self).await
    }
}

/// Milliseconds since the Unix epoch.
fn now_ms() -> u64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
