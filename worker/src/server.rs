//! Binding, serving and draining.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use penstock_plan::WorkerRecord;
use penstock_proto::v1::revision_state::State;
use penstock_telemetry::instruments::WorkerMetrics;
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Config, LoadError, ModelSpec, RegistrationError, RunnerKind,
    catalogue::Catalogue,
    generate::InferenceService,
    load,
    placement::{Board, Link, Reconciler, RevisionName},
    ports::Ports,
    readiness::{Readiness, ReadinessGate},
    registration::Registration,
    source::FetchProgress,
};

/// Why a worker cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A port cannot be bound.
    #[error("cannot listen on {address} ({port}): is another process there?")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// `--listen` or `--ops-listen`.
        port: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It listens on every interface and does not know how it is reached.
    #[error("{address} does not say where gateways reach this worker: give --advertise HOST:PORT")]
    Advertise {
        /// The listen address.
        address: SocketAddr,
    },
    /// The worker's name cannot be a key of the store.
    #[error("{0:?} cannot name a worker: give an --id of letters, digits and . _ - :")]
    Id(String),
    /// One revision is named twice.
    #[error("{0} is named twice")]
    Duplicate(ModelSpec),
    /// A checkpoint is needed and none is given.
    #[error("{0} names no checkpoint: give --model {0}=PATH")]
    NoCheckpoint(ModelSpec),
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A revision cannot be served.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No revision may be served.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
}

/// Where a worker listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// gRPC and HTTP.
    pub listen: SocketAddr,
    /// Operations.
    pub ops: SocketAddr,
}

/// A worker with its ports bound.
pub struct Server {
    config: Config,
    listener: TcpListener,
    ops_listener: TcpListener,
    addresses: Addresses,
    id: String,
    /// `host:port` where gateways reach it.
    advertised: String,
    gate: ReadinessGate,
}

impl Server {
    pub(crate) async fn bind(config: Config) -> Result<Self, BuildError> {
        check_models(&config)?;
        let listener = bind(config.listen, "--listen").await?;
        let ops_listener = bind(config.ops_listen, "--ops-listen").await?;
        let bound = |listener: &TcpListener, port| {
            listener.local_addr().map_err(|source| BuildError::Bind {
                address: config.listen,
                port,
                source,
            })
        };
        let addresses = Addresses {
            listen: bound(&listener, "--listen")?,
            ops: bound(&ops_listener, "--ops-listen")?,
        };
        let advertised = match &config.advertise {
            Some(address) => address.clone(),
            None if addresses.listen.ip().is_unspecified() => {
                return Err(BuildError::Advertise {
                    address: addresses.listen,
                });
            }
            None => addresses.listen.to_string(),
        };
        let id = config.id.clone().unwrap_or_else(|| advertised.clone());
        if !crate::config::is_name(&id) {
            return Err(BuildError::Id(id));
        }
        Ok(Self {
            config,
            listener,
            ops_listener,
            addresses,
            id,
            advertised,
            gate: ReadinessGate::new(),
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Whether it takes requests, and every change of that.
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.gate.subscribe()
    }

    /// Loads, registers and serves until `shutdown`, then drains.
    ///
    /// # Errors
    /// A revision that cannot be loaded, or none that may be served.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let Self {
            config,
            listener,
            ops_listener,
            addresses,
            id,
            advertised,
            gate,
        } = self;
        let metrics = WorkerMetrics::new(&config.metrics, &id);
        let service = InferenceService {
            catalogue: Catalogue::default(),
            gate: gate.clone(),
            metrics: metrics.clone(),
            endpoint: id.as_str().into(),
            in_flight: TaskTracker::new(),
        };
        let ports = Ports::open(listener, ops_listener, &service, config.metrics.clone());
        let record = record(&config, id, advertised, addresses);
        let board = Board::default();
        let serving = Serving {
            link: Link::new(&config, &record, board.clone()),
            config: &config,
            service: &service,
            board: board.clone(),
            metrics,
            record,
        };
        let result = serving.run(&shutdown).await;
        if result.is_ok() {
            drained(&service.in_flight, config.drain_timeout).await;
        }
        board.shut_down();
        ports.close().await;
        result
    }
}

/// A worker while it serves.
struct Serving<'a> {
    config: &'a Config,
    service: &'a InferenceService,
    board: Board,
    link: Link,
    metrics: WorkerMetrics,
    record: WorkerRecord,
}

impl Serving<'_> {
    /// Loads, registers and follows the placement; returns when the worker is deregistered and takes no more
    /// requests.
    async fn run(self, shutdown: &CancellationToken) -> Result<(), RunError> {
        let Self {
            config,
            service,
            board,
            link,
            metrics,
            record,
        } = self;
        let stop = CancellationToken::new();
        // Dropping the set ends what is left in it.
        let mut tasks = JoinSet::new();
        let reconciler = Reconciler::new(
            config,
            &record.id,
            service.catalogue.clone(),
            board.clone(),
            metrics.clone(),
            link.placed(),
        );
        tasks.spawn(link.run(stop.clone()));
        tokio::select! {
            loaded = load_own(config, &service.catalogue, &board, metrics) => loaded?,
            () = shutdown.cancelled() => {
                service.gate.drain();
                return Ok(());
            }
        }
        tasks.spawn(reconciler.run(stop.clone()));
        let registration = Registration {
            store: config.store.clone(),
            record,
            catalogue: service.catalogue.clone(),
            board,
            own: config.models.iter().map(RevisionName::from).collect(),
            readiness: service.gate.subscribe(),
        };
        registered(registration, service, shutdown).await?;
        // The control plane sees the stream end in good order.
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        Ok(())
    }
}

/// Loads what the command line names, one after the other.
async fn load_own(
    config: &Config,
    catalogue: &Catalogue,
    board: &Board,
    metrics: WorkerMetrics,
) -> Result<(), LoadError> {
    for spec in &config.models {
        let name = RevisionName::from(spec);
        board.enter(&name, State::Fetching);
        let fetched = |at: FetchProgress| board.progress(&name, at.fetched_bytes, at.total_bytes);
        let path = load::locate(config, spec, "", fetched).await?;
        board.enter(&name, State::Loading);
        let request = load::Request {
            spec: ModelSpec { path, ..spec.clone() },
            digest: String::new(),
            observer: Arc::new(board.clone()),
            metrics: metrics.clone(),
        };
        let served = load::load(config, request).await?;
        board.loaded(&name, &served);
        board.enter(&name, State::Serving);
        catalogue.add(served);
    }
    Ok(())
}

/// Keeps the worker registered until `shutdown`, then out of the store.
async fn registered(
    registration: Registration,
    service: &InferenceService,
    shutdown: &CancellationToken,
) -> Result<(), RunError> {
    let (attempted, deregister) = (CancellationToken::new(), CancellationToken::new());
    let mut registration = std::pin::pin!(registration.run(attempted.clone(), deregister.clone()));
    tokio::select! {
        ended = &mut registration => return Ok(ended?),
        () = attempted.cancelled() => service.gate.loaded(!service.catalogue.is_empty()),
        () = shutdown.cancelled() => {}
    }
    tokio::select! {
        ended = &mut registration => return Ok(ended?),
        () = shutdown.cancelled() => {}
    }
    // Out of the store first, so that gateways send nothing more.
    service.gate.drain();
    deregister.cancel();
    Ok(registration.await?)
}

/// Waits for requests in flight, with a limit.
async fn drained(in_flight: &TaskTracker, limit: Duration) {
    in_flight.close();
    let left = in_flight.len();
    if left > 0 {
        tracing::info!(left, ?limit, "finishing the requests in flight");
    }
    if tokio::time::timeout(limit, in_flight.wait()).await.is_err() {
        tracing::warn!(
            left = in_flight.len(),
            "the time to drain is over; ending the rest"
        );
    }
}

fn record(config: &Config, id: String, advertised: String, addresses: Addresses) -> WorkerRecord {
    let host = advertised
        .rsplit_once(':')
        .map_or(advertised.as_str(), |(host, _)| host);
    WorkerRecord {
        id,
        boot_id: uuid::Uuid::new_v4().to_string(),
        ops_address: format!("{host}:{}", addresses.ops.port()),
        address: advertised,
        region: config.region.clone(),
        runner: match config.runner {
            RunnerKind::Candle => "candle".into(),
            RunnerKind::Fake { .. } => "fake".into(),
        },
        device: String::new(),
        draining: false,
        started_ms: crate::now_ms(),
        revisions: Vec::new(),
    }
}

fn check_models(config: &Config) -> Result<(), BuildError> {
    for (index, spec) in config.models.iter().enumerate() {
        let same = |other: &ModelSpec| other.model == spec.model && other.revision == spec.revision;
        if config.models[..index].iter().any(same) {
            return Err(BuildError::Duplicate(spec.clone()));
        }
        if config.runner == RunnerKind::Candle && spec.path.as_os_str().is_empty() {
            return Err(BuildError::NoCheckpoint(spec.clone()));
        }
    }
    Ok(())
}

async fn bind(address: SocketAddr, port: &'static str) -> Result<TcpListener, BuildError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| BuildError::Bind {
            address,
            port,
            source,
        })
}
