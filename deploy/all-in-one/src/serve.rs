//! Wires the servers together, in the order in which each needs the others, and ends them in reverse.

use crate::{banner::Banner, config::Serve, demo};
use anyhow::{Context as _, Result, bail};
use penstock_client::{AdminClient, v1};
use penstock_store::{Store, embedded::EmbeddedStore};
use penstock_telemetry::{Metrics, Telemetry, TelemetryConfig};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use worker::{ModelSpec, Readiness, progress::ProgressBars};

/// How long the parts may take to find each other once the checkpoints are loaded.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often they are asked meanwhile.
const POLL: Duration = Duration::from_millis(50);

/// Serves until Ctrl-C or SIGTERM, then drains.
pub(crate) async fn serve(options: Serve) -> Result<()> {
    let telemetry = penstock_telemetry::init(TelemetryConfig {
        log: options.log.clone(),
        ..TelemetryConfig::new("penstock")
    })?;
    let result = run(options, &telemetry).await;
    telemetry.shutdown().await;
    result
}

async fn run(options: Serve, telemetry: &Telemetry) -> Result<()> {
    let mut parts = Parts::default();
    let outcome = start(&options, &telemetry.metrics(), &mut parts).await;
    // Whatever has started is ended in order, also where something else failed.
    let drained = parts.drain().await;
    outcome.and(drained)
}

/// Starts everything, says so, and waits for the signal to end.
async fn start(options: &Serve, metrics: &Metrics, parts: &mut Parts) -> Result<()> {
    let data_dir = data_dir(options)?;
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&data_dir.join("store"))?);
    let models = models(options, &data_dir)?;

    // Every port first: a busy one shows before anything is loaded.
    let control_plane = parts.control_plane(options, store.clone(), metrics).await?;
    let gateway = parts.gateway(options, control_plane, &data_dir, metrics).await?;
    let config = worker::Config {
        control_planes: vec![format!("http://{control_plane}")],
        source: worker::source::SourceConfig::from_env(),
        data_dir: Some(data_dir.join("workers")),
        metrics: metrics.clone(),
        ..worker::Config::new(store, models.clone())
    };
    let workers = parts.workers(options, config).await?;

    let ready = async {
        let rollout = set_up(options, control_plane, &workers).await?;
        let banner = Banner {
            gateway: gateway.listen,
            gateway_ops: gateway.ops,
            control_plane,
            workers: workers.iter().map(|worker| worker.address).collect(),
            data_dir: &data_dir,
            revisions: models.iter().map(ToString::to_string).collect(),
            rollout,
            program: program(),
            explicit: gateway.listen.port() != 8080 || control_plane.port() != 8090,
        };
        say(&banner.render());
        std::future::pending::<Result<()>>().await
    };
    tokio::select! {
        result = ready => result,
        ended = parts.ended() => ended,
        signal = interrupted() => signal.context("cannot wait for signals"),
    }
}

/// The servers of this process, each with the token that ends it.
#[derive(Default)]
struct Parts {
    gateway: Part,
    workers: Part,
    control_plane: Part,
}

#[derive(Default)]
struct Part {
    stop: CancellationToken,
    servers: JoinSet<Result<()>>,
}

struct WorkerHandle {
    address: SocketAddr,
    readiness: watch::Receiver<Readiness>,
}

// === impl Parts ===

impl Parts {
    async fn control_plane(
        &mut self,
        options: &Serve,
        store: Arc<dyn Store>,
        metrics: &Metrics,
    ) -> Result<SocketAddr> {
        let config = control_plane::Config {
            listen: options.control_plane_listen,
            ops_listen: next_port(options.control_plane_listen)?,
            metrics: metrics.clone(),
            ..control_plane::Config::new(store)
        };
        let server = config.build().await?;
        let listen = server.addresses().listen;
        let stop = self.control_plane.stop.clone();
        self.control_plane
            .servers
            .spawn(async move { Ok(server.run(stop).await?) });
        Ok(listen)
    }

    async fn gateway(
        &mut self,
        options: &Serve,
        control_plane: SocketAddr,
        data_dir: &Path,
        metrics: &Metrics,
    ) -> Result<gateway::Addresses> {
        let config = gateway::Config {
            listen: options.listen,
            ops_listen: next_port(options.listen)?,
            state_dir: Some(data_dir.join("gateway")),
            metrics: metrics.clone(),
            ..gateway::Config::new([format!("http://{control_plane}")])
        };
        let server = config.build().await?;
        let addresses = server.addresses();
        let stop = self.gateway.stop.clone();
        self.gateway
            .servers
            .spawn(async move { Ok(server.run(stop).await?) });
        Ok(addresses)
    }

    async fn workers(&mut self, options: &Serve, shared: worker::Config) -> Result<Vec<WorkerHandle>> {
        let mut servers = Vec::new();
        for index in 0..u16::from(options.workers) {
            let listen = shifted(options.worker_listen, index * 10)?;
            let config = worker::Config {
                id: Some(format!("worker-{}", index + 1)),
                listen,
                ops_listen: next_port(listen)?,
                progress: (index == 0).then(|| Arc::new(ProgressBars::new()) as Arc<dyn worker::ObserveLoad>),
                ..shared.clone()
            };
            servers.push(config.build().await?);
        }
        let mut handles = Vec::new();
        for server in servers {
            handles.push(WorkerHandle {
                address: server.addresses().listen,
                readiness: server.readiness(),
            });
            let stop = self.workers.stop.clone();
            self.workers
                .servers
                .spawn(async move { Ok(server.run(stop).await?) });
        }
        Ok(handles)
    }

    /// Completes when a part ends by itself, which only an error makes it do.
    async fn ended(&mut self) -> Result<()> {
        let ended = tokio::select! {
            Some(ended) = self.gateway.servers.join_next() => ended,
            Some(ended) = self.workers.servers.join_next() => ended,
            Some(ended) = self.control_plane.servers.join_next() => ended,
        };
        ended
            .map_err(anyhow::Error::from)
            .flatten()
            .and_then(|()| bail!("a part ended by itself"))
    }

    /// Ends the parts from the outside in, so that none misses one that it still needs: streams finish in the
    /// gateway while workers and control plane still serve.
    async fn drain(self) -> Result<()> {
        let mut result = Ok(());
        for mut part in [self.gateway, self.workers, self.control_plane] {
            part.stop.cancel();
            while let Some(ended) = part.servers.join_next().await {
                result = result.and(ended.map_err(anyhow::Error::from).flatten());
            }
        }
        result
    }
}

/// Waits until requests can be served, and creates the demo's rollout if there is none.
async fn set_up(
    options: &Serve,
    control_plane: SocketAddr,
    workers: &[WorkerHandle],
) -> Result<Option<String>> {
    for worker in workers {
        let mut readiness = worker.readiness.clone();
        let serving = readiness.wait_for(|state| *state == Readiness::Serving).await;
        if serving.is_err() {
            // The worker has ended, and its own error says why better than anything known here.
            std::future::pending::<()>().await;
        }
    }
    let connected = async {
        let address = format!("http://{control_plane}");
        let admin = retry(|| AdminClient::connect(&address)).await;
        let rollout = match options.no_demo {
            true => None,
            false => Some(retry(|| demo::rollout(&admin)).await),
        };
        // Endpoints are pushed before snapshots: a gateway that acknowledged this epoch can serve it.
        while !admin.list_gateways().await.is_ok_and(|list| up_to_date(&list)) {
            tokio::time::sleep(POLL).await;
        }
        rollout
    };
    let started = tokio::time::timeout(START_TIMEOUT, connected).await;
    started.with_context(|| {
        format!("the parts did not find each other within {START_TIMEOUT:?}; see the log above")
    })
}

/// Every gateway serves the published epoch.
fn up_to_date(list: &v1::ListGatewaysResponse) -> bool {
    list.epoch > 0
        && !list.gateways.is_empty()
        && list
            .gateways
            .iter()
            .all(|gateway| gateway.acknowledged_epoch == list.epoch)
}

/// Repeats what fails while the parts find each other.
async fn retry<T, E, F: Future<Output = Result<T, E>>>(mut attempt: impl FnMut() -> F) -> T {
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

fn models(options: &Serve, data_dir: &Path) -> Result<Vec<ModelSpec>> {
    let mut models = Vec::new();
    if !options.no_demo {
        let root = demo::unpack(data_dir)?;
        models.extend(demo::SERVED.map(|revision| ModelSpec {
            model: demo::MODEL.into(),
            revision: revision.into(),
            path: root.join(revision),
        }));
    }
    models.extend(options.models.iter().cloned());
    if models.is_empty() {
        bail!("nothing to serve: give --model NAME@REVISION=PATH, or leave --no-demo out");
    }
    Ok(models)
}

fn data_dir(options: &Serve) -> Result<PathBuf> {
    let directory = match &options.data_dir {
        Some(directory) => directory.clone(),
        None => directories::ProjectDirs::from("", "", "penstock")
            .context("this platform tells no data directory; give --data-dir DIR")?
            .data_dir()
            .to_owned(),
    };
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}; give --data-dir DIR", directory.display()))?;
    Ok(directory)
}

fn next_port(address: SocketAddr) -> Result<SocketAddr> {
    shifted(address, 1)
}

/// The address `by` ports further on; port 0 stays 0, which leaves the choice to the system.
fn shifted(address: SocketAddr, by: u16) -> Result<SocketAddr> {
    let port = match address.port() {
        0 => 0,
        port => port
            .checked_add(by)
            .with_context(|| format!("no port {by} above {address}"))?,
    };
    Ok(SocketAddr::new(address.ip(), port))
}

/// How this binary was called, as the shell that started it can call it again.
fn program() -> String {
    let called = std::env::args().next().unwrap_or_default();
    let path = std::env::current_exe().unwrap_or_else(|_| called.clone().into());
    // `cargo run` starts an absolute path; the shell's directory makes it shorter.
    let here = std::env::current_dir().unwrap_or_default();
    match path.strip_prefix(&here) {
        Ok(relative) => format!("./{}", relative.display()),
        Err(_) => path.display().to_string(),
    }
}

#[allow(clippy::print_stdout, reason = "the banner is what this command prints")]
fn say(text: &str) {
    println!("{text}");
}

/// SIGTERM or Ctrl-C.
async fn interrupted() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}
