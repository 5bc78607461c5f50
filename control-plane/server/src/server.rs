//! Binding, serving and ending.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::v1::{admin_server::AdminServer, sync_server::SyncServer};
use penstock_telemetry::{
    instruments::ControlPlaneMetrics,
    listener,
    ops::{self, Health},
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::server::NamedService as _;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    Config, admin::AdminService, controller::Controller, dashboard, gateways::Gateways, leader,
    notify::Notifier, observed::Observed, prometheus, sync::SyncService, world::World,
};

/// Streams that end by themselves at the end get so long.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a control plane cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A port cannot be bound.
    #[error("cannot listen on {address} ({flag}): {}", reason(cause))]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Which flag says so.
        flag: &'static str,
        /// Why; the message says it.
        cause: io::Error,
    },
}

/// Why a control plane ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// What serves the port ended by itself.
    #[error("the port is served no longer")]
    Serve(#[from] tokio::task::JoinError),
}

/// Where a control plane listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// gRPC and HTTP.
    pub listen: SocketAddr,
    /// Operations.
    pub ops: SocketAddr,
}

/// A control plane with its ports bound.
pub struct Server {
    config: Config,
    listener: TcpListener,
    ops_listener: TcpListener,
    addresses: Addresses,
}

// === impl Server ===

impl Server {
    pub(crate) async fn bind(config: Config) -> Result<Self, BuildError> {
        let (listener, listen) = bind(config.listen, "--listen").await?;
        let (ops_listener, ops) = bind(config.ops_listen, "--ops-listen").await?;
        Ok(Self {
            config,
            listener,
            ops_listener,
            addresses: Addresses { listen, ops },
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until `shutdown`.
    ///
    /// # Errors
    /// What serves the port ends by itself.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let Self {
            config,
            listener,
            ops_listener,
            addresses,
        } = self;
        let (streams, tasks, stop) = (TaskTracker::new(), TaskTracker::new(), CancellationToken::new());
        let (router, ops_router) = start(config, addresses, &streams, &tasks, &stop);
        tasks.spawn(serve_ops(ops_listener, ops_router, stop.clone()));

        let mut serving = tokio::spawn(listener::serve(listener, router, stop.clone()));
        let failed = tokio::select! {
            ended = &mut serving => Some(ended),
            () = shutdown.cancelled() => None,
        };
        stop.cancel();
        streams.close();
        tasks.close();
        let ended = async {
            streams.wait().await;
            tasks.wait().await;
            match failed {
                Some(ended) => ended,
                None => (&mut serving).await,
            }
        };
        match tokio::time::timeout(CLOSE_TIMEOUT, ended).await {
            Ok(ended) => Ok(ended?),
            // Connections that their other side keeps open are closed by force.
            Err(_) => {
                serving.abort();
                Ok(())
            }
        }
    }
}

/// Starts what runs in the background; returns the routes of both ports.
fn start(
    config: Config,
    addresses: Addresses,
    streams: &TaskTracker,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> (axum::Router, axum::Router) {
    let metrics = ControlPlaneMetrics::new(&config.metrics);
    let address = config.advertise.unwrap_or_else(|| addresses.listen.to_string());
    let (world, gateways) = (Arc::new(World::new(address.clone())), Arc::new(Gateways::new()));
    let observed = Arc::new(Observed::default());
    let (leads, leadership) = watch::channel(None);
    let (speaks, speaking) = watch::channel(false);
    tasks.spawn(leader::campaign(
        config.store.clone(),
        address,
        leads,
        stop.clone(),
    ));
    let controller = Controller {
        store: config.store.clone(),
        world: world.clone(),
        gateways: gateways.clone(),
        observed: observed.clone(),
        leadership: leadership.clone(),
        speaks,
        last_term: None,
        saved: Instant::now(),
        notifier: Notifier::start(config.notify, tasks, stop),
        metrics: metrics.clone(),
    };
    tasks.spawn(controller.run(stop.clone()));
    tasks.spawn(prometheus::run(
        world.clone(),
        observed.clone(),
        leadership.clone(),
        stop.clone(),
    ));
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let health = health(&world);
    tasks.spawn(report(reporter, health.clone(), world.changes(), stop.clone()));
    let admin = AdminService {
        store: config.store,
        world: world.clone(),
        gateways: gateways.clone(),
        observed: observed.clone(),
        leadership,
        speaks: speaking.clone(),
        metrics: metrics.clone(),
        streams: streams.clone(),
        stop: stop.clone(),
    };
    let sync = SyncService {
        world,
        gateways,
        observed,
        speaks: speaking,
        metrics,
        streams: streams.clone(),
        stop: stop.clone(),
    };
    let dashboard = dashboard::router(admin.clone());
    let routes = tonic::service::Routes::new(AdminServer::new(admin))
        .add_service(SyncServer::new(sync))
        .add_service(health_service);
    (
        router(routes, health.clone()).merge(dashboard),
        ops::router(config.metrics, health),
    )
}

async fn bind(address: SocketAddr, flag: &'static str) -> Result<(TcpListener, SocketAddr), BuildError> {
    let error = |cause| BuildError::Bind { address, flag, cause };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

/// The everyday reason with its remedy.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "the port is in use; stop what uses it or choose another".into(),
        _ => error.to_string(),
    }
}

/// The services with reflection, and the probes.
fn router(routes: tonic::service::Routes, health: Health) -> axum::Router {
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(penstock_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    const VALID: &str = "the generated descriptors are valid";
    routes
        .add_service(describe().build_v1().expect(VALID))
        .add_service(describe().build_v1alpha().expect(VALID))
        .into_axum_router()
        .merge(ops::health_router(health))
}

/// Tells grpc.health.v1 what the probes say, until `stop`.
async fn report(
    reporter: HealthReporter,
    health: Health,
    mut changes: watch::Receiver<u64>,
    stop: CancellationToken,
) {
    let mut last = None;
    loop {
        changes.mark_unchanged();
        let ready = health.ready().is_ok() && !stop.is_cancelled();
        if last.replace(ready) != Some(ready) {
            let status = match ready {
                true => ServingStatus::Serving,
                false => ServingStatus::NotServing,
            };
            for service in [
                "",
                AdminServer::<AdminService>::NAME,
                SyncServer::<SyncService>::NAME,
            ] {
                reporter.set_service_status(service, status).await;
            }
        }
        if stop.is_cancelled() {
            return;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = stop.cancelled() => {}
        }
    }
}

/// Ready once the store has answered and somebody leads.
fn health(world: &Arc<World>) -> Health {
    let world = world.clone();
    Health::new(move || {
        let state = world.state();
        match (state.loaded, &state.leader) {
            (false, _) => Err("the store has not answered yet".into()),
            (true, None) => Err("no control plane leads yet".into()),
            (true, Some(_)) => Ok(()),
        }
    })
}

async fn serve_ops(listener: TcpListener, router: axum::Router, stop: CancellationToken) {
    if let Err(error) = ops::serve(listener, router, stop.cancelled_owned()).await {
        tracing::error!(%error, "the operations port failed");
    }
}
