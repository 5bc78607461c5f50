//! What gateways have said: in memory only, since each tells it again with its next Hello.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use penstock_plan::planner::{GatewayView, Inventory};
use penstock_proto::v1;

/// A gateway that is silent for longer is lost.
pub(crate) const LIVE_WITHIN: Duration = Duration::from_secs(15);
/// Lost gateways are forgotten after this time.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// Every gateway that has said Hello.
#[derive(Debug)]
pub(crate) struct Gateways {
    states: Mutex<BTreeMap<String, GatewayState>>,
    listening_since_ms: u64,
}

/// One gateway.
#[derive(Debug, Clone)]
pub(crate) struct GatewayState {
    pub(crate) boot_id: String,
    pub(crate) region: String,
    pub(crate) ops_address: String,
    pub(crate) acknowledged_epoch: u64,
    pub(crate) nack: Option<v1::GatewayNack>,
    last_said: Instant,
    /// Its stream is open.
    connected: bool,
    /// Its stream was closed in good order: it is gone rather than lost.
    left: bool,
}

// === impl Gateways ===

impl Gateways {
    /// None yet, from now on.
    pub(crate) fn new() -> Self {
        Self {
            states: Mutex::default(),
            listening_since_ms: crate::now_ms(),
        }
    }

    /// What the planner knows about a plan that was published first at `published_epoch`.
    pub(crate) fn inventory(&self, published_epoch: Option<u64>) -> Inventory {
        Inventory {
            published_epoch,
            gateways: self.views(),
            listening_since_ms: self.listening_since_ms,
        }
    }

    /// A gateway's stream has begun; `epoch` is in force there.
    pub(crate) fn hello(&self, hello: &v1::Hello, epoch: u64) {
        let state = GatewayState {
            boot_id: hello.boot_id.clone(),
            region: hello.region.clone(),
            ops_address: hello.ops_address.clone(),
            acknowledged_epoch: epoch,
            nack: None,
            last_said: Instant::now(),
            connected: true,
            left: false,
        };
        self.lock().insert(hello.node.clone(), state);
    }

    pub(crate) fn said(&self, node: &str) {
        self.change(node, |_| {});
    }

    /// `epoch` is in force at the gateway; true if that is news.
    pub(crate) fn acknowledged(&self, node: &str, epoch: u64) -> bool {
        let mut news = false;
        self.change(node, |gateway| {
            news = gateway.acknowledged_epoch != epoch;
            gateway.acknowledged_epoch = epoch;
            gateway.nack = gateway.nack.take().filter(|nack| nack.epoch > epoch);
        });
        news
    }

    pub(crate) fn refused(&self, node: &str, nack: v1::GatewayNack) {
        self.change(node, |gateway| gateway.nack = Some(nack));
    }

    /// The stream of the gateway's process `boot_id` has ended, in good order or not.
    pub(crate) fn disconnected(&self, node: &str, boot_id: &str, in_order: bool) {
        // A newer process of the same name is not concerned.
        if let Some(gateway) = self
            .lock()
            .get_mut(node)
            .filter(|gateway| gateway.boot_id == boot_id)
        {
            gateway.connected = false;
            gateway.left = in_order;
        }
    }

    /// As the planner sees them; those long lost are forgotten.
    pub(crate) fn views(&self) -> Vec<GatewayView> {
        let mut gateways = self.lock();
        gateways.retain(|_, gateway| gateway.last_said.elapsed() < FORGET_AFTER && !gateway.left);
        gateways
            .iter()
            .map(|(node, gateway)| gateway.view(node))
            .collect()
    }

    pub(crate) fn all(&self) -> Vec<(String, GatewayState)> {
        let gateways = self.lock();
        let present = gateways.iter().filter(|(_, gateway)| !gateway.left);
        present
            .map(|(node, gateway)| (node.clone(), gateway.clone()))
            .collect()
    }

    fn change(&self, node: &str, change: impl FnOnce(&mut GatewayState)) {
        if let Some(gateway) = self.lock().get_mut(node) {
            gateway.last_said = Instant::now();
            change(gateway);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, GatewayState>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl GatewayState ===

impl GatewayState {
    pub(crate) fn silent(&self) -> Duration {
        self.last_said.elapsed()
    }

    pub(crate) fn is_live(&self) -> bool {
        self.silent() < LIVE_WITHIN
    }

    fn view(&self, node: &str) -> GatewayView {
        GatewayView {
            node: node.to_owned(),
            live: self.is_live(),
            acknowledged_epoch: self.acknowledged_epoch,
            refused: self
                .nack
                .as_ref()
                .map(|nack| (nack.epoch, format!("{}: {}", nack.code, nack.message))),
        }
    }
}
