//! A subscription that outlives its streams.

use std::{fmt, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{
    Address, AddressError, ApplyFn, ReachFn, StatsFn, View,
    backoff::Backoff,
    mirror::Mirror,
    stream::{Reports, StreamEnd, follow},
};

/// First ceiling of the backoff.
pub(crate) const BACKOFF_BASE: Duration = Duration::from_millis(100);
/// Last ceiling of the backoff.
pub(crate) const BACKOFF_CAP: Duration = Duration::from_secs(5);
/// A stream that held for so long was a success; one that breaks at once over and over keeps backing off.
pub(crate) const STEADY: Duration = BACKOFF_CAP;
/// How long a control plane may take to notice that the node leaves.
pub(crate) const GOODBYE: Duration = Duration::from_secs(1);
/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Who subscribes, and to whom.
#[derive(Clone)]
pub struct SyncConfig {
    /// Addresses of the control planes, tried in turn.
    pub control_planes: Vec<String>,
    /// Stable name of the node.
    pub node: String,
    /// Chosen anew at each start of the process.
    pub boot_id: String,
    /// Region, or empty.
    pub region: String,
    /// Address of the node's operations port, or empty.
    pub ops_address: String,
    /// How often the node says that it is alive; well below the 15 s after which it counts as lost.
    pub alive_every: Duration,
    /// What the node serves before it hears anything, e.g. what it kept on disk. Its snapshot is not offered to
    /// the callback.
    pub initial: View,
    /// Makes the node's reports; with none, none are sent.
    pub stats: Option<StatsFn>,
    /// Asks workers whether they answer: those of a canary that wants a number of them, before a snapshot is offered,
    /// and those that vanished with many others, before they are dropped. With none, nobody is asked and what
    /// vanishes is dropped at once.
    pub reach: Option<ReachFn>,
}

/// Why a subscription cannot start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SyncConfigError {
    /// Nobody to subscribe to.
    #[error("no control plane is named: give at least one address, for example 127.0.0.1:8090")]
    NoControlPlane,
    /// An address that cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
}

/// A running subscription. Dropping it leaves it running; the token given to [`subscribe`] ends it.
#[derive(Debug)]
pub struct Subscription {
    view: watch::Receiver<Arc<View>>,
    task: JoinHandle<()>,
}

/// Follows the control planes until `shutdown`.
///
/// At `shutdown` it ends its stream in good order, so that the control plane takes the node for gone and not for
/// lost. It connects at once, in the background; until it has succeeded the view is [`SyncConfig::initial`]. Each new
/// snapshot is checked (digest, epoch, fields), offered to `apply`, shown in the view as one value together with
/// the endpoints, and acknowledged; a snapshot that fails is refused with its reason and the old one stays. The
/// same snapshot, as after a reconnect, is acknowledged without being applied again.
///
/// **Epochs never go back.** A snapshot whose epoch is not above the one in force is refused with the code
/// `stale_epoch`, also when it comes from a control plane whose store was lost and that counts from 1 again:
/// the node cannot tell that one from a leader that was deposed. The control plane can, because each Hello names
/// the epoch in force, and so it is the one to move: it continues above the highest epoch that it hears of.
///
/// # Errors
/// There is no address, or one that cannot be used.
pub fn subscribe(
    config: SyncConfig,
    apply: ApplyFn,
    shutdown: CancellationToken,
) -> Result<Subscription, SyncConfigError> {
    start(config, apply, shutdown, Tcp)
}

fn start<D: Dial>(
    config: SyncConfig,
    apply: ApplyFn,
    shutdown: CancellationToken,
    dial: D,
) -> Result<Subscription, SyncConfigError> {
    let addresses: Vec<Address> = config
        .control_planes
        .iter()
        .map(|address| address.parse())
        .collect::<Result<_, _>>()?;
    if addresses.is_empty() {
        return Err(SyncConfigError::NoControlPlane);
    }
    let mirror = Mirror::new(config.initial.clone(), apply).guarded(config.reach.is_some());
    let view = mirror.subscribe();
    let task = tokio::spawn(async move {
        tokio::select! {
            () = run(&config, &addresses, mirror, &dial, &shutdown) => {}
            () = overdue(&shutdown) => {}
        }
    });
    Ok(Subscription { view, task })
}

/// Completes when a goodbye has taken too long.
pub(crate) async fn overdue(shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    sleep(GOODBYE).await;
}

/// Opens channels; the tests bring their own.
pub(crate) trait Dial: Send + Sync + 'static {
    fn dial(
        &self,
        address: &Address,
    ) -> impl Future<Output = Result<Channel, tonic::transport::Error>> + Send;
}

pub(crate) struct Tcp;

impl Dial for Tcp {
    async fn dial(&self, address: &Address) -> Result<Channel, tonic::transport::Error> {
        address.endpoint(CONNECT_TIMEOUT).connect().await
    }
}

async fn run<D: Dial>(
    config: &SyncConfig,
    addresses: &[Address],
    mut mirror: Mirror,
    dial: &D,
    shutdown: &CancellationToken,
) {
    let mut backoff = Backoff::new(BACKOFF_BASE, BACKOFF_CAP);
    let mut warned = false;
    let mut reports = Reports::new(config.stats.clone());
    for address in addresses.iter().cycle() {
        // An address that held its stream is tried once more before the next: a restart is the commonest end.
        let mut again = true;
        while again {
            let started = Instant::now();
            let end = match shutdown.run_until_cancelled(dial.dial(address)).await {
                Some(Ok(channel)) => follow(channel, config, &mut mirror, &mut reports, shutdown).await,
                Some(Err(error)) => StreamEnd::Connect(error),
                None => StreamEnd::Left,
            };
            again = mirror.set_connected(false);
            if matches!(end, StreamEnd::Left) {
                return;
            }
            if again && started.elapsed() >= STEADY {
                backoff.reset();
            }
            // One line per outage, not one per attempt.
            if again || !warned {
                tracing::warn!(%address, "no control plane: {}; what is in force stays", end.reason());
            } else {
                tracing::debug!(%address, "no control plane: {}", end.reason());
            }
            warned = true;
            let delay = backoff.next(&mut rand::rng());
            if shutdown.run_until_cancelled(sleep(delay)).await.is_none() {
                return;
            }
        }
    }
}

// === impl SyncConfig ===

impl SyncConfig {
    /// A node that starts from nothing and says that it is alive every 5 s.
    pub fn new<A: Into<String>>(
        control_planes: impl IntoIterator<Item = A>,
        node: impl Into<String>,
        boot_id: impl Into<String>,
    ) -> Self {
        Self {
            control_planes: control_planes.into_iter().map(Into::into).collect(),
            node: node.into(),
            boot_id: boot_id.into(),
            region: String::new(),
            ops_address: String::new(),
            alive_every: Duration::from_secs(5),
            initial: View::default(),
            stats: None,
            reach: None,
        }
    }
}

impl fmt::Debug for SyncConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SyncConfig")
            .field("control_planes", &self.control_planes)
            .field("node", &self.node)
            .field("boot_id", &self.boot_id)
            .field("region", &self.region)
            .field("ops_address", &self.ops_address)
            .field("alive_every", &self.alive_every)
            .field("initial", &self.initial)
            .field("stats", &self.stats.is_some())
            .field("reach", &self.reach.is_some())
            .finish()
    }
}

// === impl Subscription ===

impl Subscription {
    /// The view, now and whenever it changes.
    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// Waits until the subscription has ended.
    pub async fn ended(self) {
        // It can only have been cancelled or have panicked; either way it is over.
        let _ = self.task.await;
    }
}

#[cfg(test)]
pub(crate) mod tests;
