//! The worker's stream to the control plane.

use std::{sync::Arc, time::Duration};

use penstock_client::{ControlPlanes, PlacementConfig, follow_placement};
use penstock_plan::WorkerRecord;
use penstock_proto::v1;
use penstock_store::{Key, Store};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Board;
use crate::Config;

/// How often the worker reports where nothing changes.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// How long the store may take to say who leads.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// What is placed here, as far as it is known.
pub(crate) type Placed = Option<Arc<v1::Placement>>;

/// Keeps the stream.
pub(crate) struct Link {
    config: PlacementConfig,
    board: Board,
    placed: watch::Sender<Placed>,
}

// === impl Link ===

impl Link {
    pub(crate) fn new(config: &Config, record: &WorkerRecord, board: Board) -> Self {
        let control_planes = match config.control_planes.as_slice() {
            [] => located(config.store.clone()),
            addresses => ControlPlanes::At(addresses.to_vec()),
        };
        Self {
            config: PlacementConfig {
                control_planes,
                node: record.id.clone(),
                boot_id: record.boot_id.clone(),
                region: record.region.clone(),
                ops_address: record.ops_address.clone(),
                report_every: REPORT_EVERY,
            },
            board,
            placed: watch::Sender::new(None),
        }
    }

    /// What is placed here, now and whenever it changes.
    pub(crate) fn placed(&self) -> watch::Receiver<Placed> {
        self.placed.subscribe()
    }

    /// Follows the control plane until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let Self {
            config,
            board,
            placed,
        } = self;
        let changed = board.changes();
        let apply = move |placement: v1::Placement| {
            let revisions = placement.revisions.len();
            tracing::info!(version = placement.version, revisions, "placement received");
            placed.send_replace(Some(Arc::new(placement)));
        };
        let report = Arc::new(move || board.report());
        follow_placement(config, report, changed, apply, shutdown).await;
    }
}

/// Wherever the store says that the leader is.
fn located(store: Arc<dyn Store>) -> ControlPlanes {
    ControlPlanes::Located(Box::new(move || {
        let store = store.clone();
        Box::pin(async move {
            match tokio::time::timeout(STORE_TIMEOUT, store.get(&Key::Leader)).await {
                Ok(Ok(Some(entry))) => vec![String::from_utf8_lossy(&entry.value).into_owned()],
                // The next round asks again.
                _ => Vec::new(),
            }
        })
    }))
}
