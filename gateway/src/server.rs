//! Binding, serving and draining.

use std::{io, net::SocketAddr, sync::Arc};

use penstock_client::{AddressError, SyncConfig, SyncConfigError, View};
use penstock_telemetry::instruments::GatewayMetrics;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    Config, StateError,
    admission::Admission,
    counts::Ledger,
    forward::Forwarder,
    hedge::Hedge,
    overrides::Overrides,
    pool::Pool,
    ports::Ports,
    state::StateDir,
    subscription::{self, Follow},
};

/// Why a gateway cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A port is taken.
    #[error("cannot listen on {address}: it is in use; give another {port}")]
    InUse {
        /// Where.
        address: SocketAddr,
        /// `--listen` or `--ops-listen`.
        port: &'static str,
    },
    /// A port cannot be bound.
    #[error("cannot listen on {address} ({port})")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// `--listen` or `--ops-listen`.
        port: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The address of a control plane cannot be used.
    #[error(transparent)]
    ControlPlane(#[from] AddressError),
    /// The state directory cannot be used.
    #[error("cannot use the state directory")]
    State(#[from] StateError),
}

/// Why a gateway ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The subscription could not start.
    #[error(transparent)]
    Sync(#[from] SyncConfigError),
}

/// Where a gateway listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// gRPC and HTTP.
    pub listen: SocketAddr,
    /// Operations.
    pub ops: SocketAddr,
}

/// A gateway with its ports bound.
#[derive(Debug)]
pub struct Server {
    config: Config,
    listener: TcpListener,
    ops_listener: TcpListener,
    addresses: Addresses,
    state: Option<StateDir>,
    overrides: Overrides,
    initial: View,
}

impl Server {
    pub(crate) async fn bind(mut config: Config) -> Result<Self, BuildError> {
        for address in &config.control_planes {
            address.parse::<penstock_client::Address>()?;
        }
        let state = config.state_dir.as_deref().map(StateDir::open).transpose()?;
        let saved = state
            .as_ref()
            .map(StateDir::load)
            .transpose()?
            .unwrap_or_default();
        let overrides = Overrides::open(state.clone())?;
        let given = std::mem::take(&mut config.initial);
        let initial = if saved.snapshot.is_some() { saved } else { given };
        let (listener, listen) = bind(config.listen, "--listen").await?;
        let (ops_listener, ops) = bind(config.ops_listen, "--ops-listen").await?;
        Ok(Self {
            config,
            listener,
            ops_listener,
            addresses: Addresses { listen, ops },
            state,
            overrides,
            initial,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Follows the control plane and serves until `shutdown`, then drains.
    ///
    /// # Errors
    /// The subscription cannot start.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let Self {
            config,
            listener,
            ops_listener,
            addresses,
            state,
            overrides,
            initial,
        } = self;
        let overrides = Arc::new(overrides);
        let metrics = GatewayMetrics::new(&config.metrics);
        let stop = CancellationToken::new();
        let node = config.node.unwrap_or_else(|| addresses.listen.to_string());
        let sync = SyncConfig {
            region: config.region,
            ops_address: addresses.ops.to_string(),
            initial,
            ..SyncConfig::new(config.control_planes, node, uuid::Uuid::new_v4())
        };
        let (pool, ledger) = (
            Arc::new(Pool::new(config.routing, config.overload.max_worker_tokens)),
            Arc::new(Ledger::default()),
        );
        let follow = Follow {
            sync,
            metrics: metrics.clone(),
            pool: pool.clone(),
            ledger: ledger.clone(),
            overrides: overrides.clone(),
        };
        let (view, subscription) = follow.start(stop.clone())?;
        let keeper = subscription::keep(view.clone(), pool.clone(), state, metrics.clone(), stop.clone());
        let forwarder = Forwarder {
            view,
            pool,
            metrics,
            ledger,
            overrides,
            shadows: Arc::default(),
            judged: Arc::default(),
            budget: Arc::default(),
            hedge: Arc::new(Hedge::new(config.hedge_after)),
            admission: Arc::new(Admission::new(config.overload)),
            default_timeout: config.default_timeout,
        };
        let ports = Ports::open(listener, ops_listener, forwarder, config.metrics);
        shutdown.cancelled().await;
        ports.drain(config.drain_timeout).await;
        stop.cancel();
        if let Some(subscription) = subscription {
            subscription.ended().await;
        }
        if let Err(error) = keeper.await {
            tracing::error!(%error, "keeping the view failed");
        }
        Ok(())
    }
}

async fn bind(address: SocketAddr, port: &'static str) -> Result<(TcpListener, SocketAddr), BuildError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BuildError::InUse { address, port },
        _ => BuildError::Bind {
            address,
            port,
            source,
        },
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}
