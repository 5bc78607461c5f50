//! What gateways have said: in memory only, since each tells it again with its next Hello.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use penstock_plan::planner::{GatewayView, Inventory};
use penstock_proto::v1;
use tokio::time::Instant;

/// A gateway that is silent for longer is lost.
pub(crate) const LIVE_WITHIN: Duration = Duration::from_secs(15);
/// Lost gateways are forgotten after this time.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// Every gateway that has said Hello.
#[derive(Debug)]
pub(crate) struct Gateways {
    states: Mutex<BTreeMap<String, GatewayState>>,
    listening_since_ms: AtomicU64,
    sessions: AtomicU64,
}

/// One stream of a gateway. What an older stream of the same name says or how it ends is of no account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Session {
    node: String,
    number: u64,
}

/// One gateway.
#[derive(Debug, Clone)]
pub(crate) struct GatewayState {
    pub(crate) boot_id: String,
    pub(crate) region: String,
    pub(crate) ops_address: String,
    pub(crate) acknowledged_epoch: u64,
    pub(crate) nack: Option<v1::GatewayNack>,
    session: u64,
    last_said: Instant,
    /// Its stream was closed in good order: it is gone rather than lost.
    left: bool,
}

// === impl Session ===

impl Session {
    /// Name of the gateway.
    pub(crate) fn node(&self) -> &str {
        &self.node
    }
}

// === impl Gateways ===

impl Gateways {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self {
            states: Mutex::default(),
            listening_since_ms: AtomicU64::new(crate::now_ms()),
            sessions: AtomicU64::new(0),
        }
    }

    /// Begins to listen, at this time in milliseconds since the Unix epoch. What was said before another control
    /// plane led in between is forgotten: each gateway says it again.
    pub(crate) fn listen(&self, now_ms: u64) {
        self.listening_since_ms.store(now_ms, Ordering::Release);
        self.lock().clear();
    }

    /// What the planner knows about a plan that was published first at `published_epoch`.
    pub(crate) fn inventory(&self, published_epoch: Option<u64>) -> Inventory {
        Inventory {
            published_epoch,
            gateways: self.views(),
            listening_since_ms: self.listening_since_ms.load(Ordering::Acquire),
            ..Inventory::default()
        }
    }

    /// A gateway's stream has begun; `epoch` is in force there.
    pub(crate) fn hello(&self, hello: &v1::Hello, epoch: u64) -> Session {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let state = GatewayState {
            boot_id: hello.boot_id.clone(),
            region: hello.region.clone(),
            ops_address: hello.ops_address.clone(),
            acknowledged_epoch: epoch,
            nack: None,
            session: number,
            last_said: Instant::now(),
            left: false,
        };
        self.lock().insert(hello.node.clone(), state);
        Session {
            node: hello.node.clone(),
            number,
        }
    }

    pub(crate) fn said(&self, session: &Session) {
        self.change(session, |_| {});
    }

    /// `epoch` is in force at the gateway; true if that is news.
    pub(crate) fn acknowledged(&self, session: &Session, epoch: u64) -> bool {
        let mut news = false;
        self.change(session, |gateway| {
            news = gateway.acknowledged_epoch != epoch;
            gateway.acknowledged_epoch = epoch;
            gateway.nack = gateway.nack.take().filter(|nack| nack.epoch > epoch);
        });
        news
    }

    pub(crate) fn refused(&self, session: &Session, nack: v1::GatewayNack) {
        self.change(session, |gateway| gateway.nack = Some(nack));
    }

    /// The stream has ended, in good order or not.
    pub(crate) fn disconnected(&self, session: &Session, in_order: bool) {
        if let Some(gateway) = self.lock().get_mut(&session.node) {
            gateway.left |= in_order && gateway.session == session.number;
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

    fn change(&self, session: &Session, change: impl FnOnce(&mut GatewayState)) {
        if let Some(gateway) = self
            .lock()
            .get_mut(&session.node)
            .filter(|gateway| gateway.session == session.number)
        {
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

#[cfg(test)]
mod tests;
