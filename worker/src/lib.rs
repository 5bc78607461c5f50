//! The worker: loads revisions of models, runs one engine for each, serves them over gRPC and registers
//! itself in the store, where the control plane finds it.
//!
//! ```text
//! request ─▶ validate ─▶ template ─▶ tokenize ─▶ Engine (one per revision, own thread, own KV)
//!                                                   │ tokens with timestamps
//! client ◀─ chunks ◀─ usage, stats ◀─ stop strings ◀─ detokenize
//! ```
//!
//! Revisions come from the command line, and, while it serves, from the control plane's placement.
//!
//! It refuses to decide who gets which revision: that is the gateway's. It never samples or schedules: that
//! is the engine's. It serves on when the store is down.

mod catalogue;
pub mod config;
mod generate;
mod grammars;
mod late_store;
mod load;
mod memory;
mod placement;
mod ports;
pub mod progress;
mod readiness;
mod registration;
mod server;
pub mod source;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use penstock_store::Store;
use penstock_telemetry::Metrics;

pub use config::{ModelSpec, ModelSpecError};
pub use late_store::{ConnectFn, LateStore};
pub use load::{LoadError, LoadErrorKind};
pub use memory::{MemoryBudget, MemoryError};
pub use penstock_model::Dtype;
pub use progress::{LoadProgress, ObserveLoad};
pub use readiness::Readiness;
pub use registration::RegistrationError;
pub use server::{Addresses, BuildError, RunError, Server};

/// What a worker serves, where, and with how much.
#[derive(Clone)]
pub struct Config {
    /// Name, unique among all workers; by default the advertised address.
    pub id: Option<String>,
    /// gRPC and HTTP.
    pub listen: SocketAddr,
    /// Operations.
    pub ops_listen: SocketAddr,
    /// `host:port` where gateways reach this worker; by default the address that it listens on.
    pub advertise: Option<String>,
    /// Region, told to gateways.
    pub region: String,
    /// Where it registers.
    pub store: Arc<dyn Store>,
    /// Addresses of the control planes that place revisions here; where there is none, the leader is found under
    /// its key in the store.
    pub control_planes: Vec<String>,
    /// What it serves whatever is placed here. A request without a pin gets a model's first revision.
    pub models: Vec<ModelSpec>,
    /// How checkpoints that lie elsewhere are reached.
    pub source: source::SourceConfig,
    /// Keeps the last placement for a restart without a control plane, and what was fetched.
    pub data_dir: Option<PathBuf>,
    /// What runs them.
    pub runner: RunnerKind,
    /// Number format of weights and KV; by default the loader chooses.
    pub dtype: Option<Dtype>,
    /// Tokens per KV page.
    pub page_size: usize,
    /// Memory for the KV of each revision; by default what `max_running` whole contexts take, up to 1 GiB.
    pub kv_memory_bytes: Option<u64>,
    /// Memory for the weights and KV of all revisions; shared by the workers of a process.
    pub memory: MemoryBudget,
    /// Sequences that run at once, per revision.
    pub max_running: usize,
    /// Sequences that wait at most, per revision.
    pub max_waiting: usize,
    /// Tokens of one step at most.
    pub max_batch_tokens: usize,
    /// Ranks that each model is split over.
    pub tensor_parallel_size: usize,
    /// A step that takes longer takes the worker out of rotation, and fails where ranks wait for each other.
    pub watchdog_timeout: Duration,
    /// How long requests in flight may go on once the worker is told to end.
    pub drain_timeout: Duration,
    /// Is told how far loading is.
    pub progress: Option<Arc<dyn ObserveLoad>>,
    /// Where it measures.
    pub metrics: Metrics,
}

/// What runs a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunnerKind {
    /// The model itself, on candle.
    Candle,
    /// No model: made-up tokens at a given pace, for load tests. Never chosen by itself.
    Fake {
        /// Time per step.
        pace: Duration,
    },
}

impl Config {
    /// A worker on the default loopback ports that serves `models` for real.
    pub fn new(store: Arc<dyn Store>, models: Vec<ModelSpec>) -> Self {
        Self {
            id: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 8100)),
            ops_listen: SocketAddr::from(([127, 0, 0, 1], 8101)),
            advertise: None,
            region: String::new(),
            store,
            control_planes: Vec::new(),
            models,
            source: source::SourceConfig::default(),
            data_dir: None,
            runner: RunnerKind::Candle,
            dtype: None,
            page_size: 16,
            kv_memory_bytes: None,
            memory: MemoryBudget::default(),
            max_running: 64,
            max_waiting: 256,
            max_batch_tokens: 512,
            tensor_parallel_size: 1,
            watchdog_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(30),
            progress: None,
            metrics: Metrics::local(),
        }
    }

    /// Binds both ports; nothing is loaded yet.
    ///
    /// # Errors
    /// A port that is taken, or a configuration that cannot work.
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
