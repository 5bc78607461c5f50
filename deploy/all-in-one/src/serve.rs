//! Wires the servers together, in the order in which each needs the others, and ends them in reverse.

use crate::{
    banner::Banner,
    config::Serve,
    demo,
};
use anyhow::{Context as _, Result, bail};
use penstock_client::AdminClient;
use penstock_store::{Store, embedded::EmbeddedStore};
use penstock_telemetry::{Metrics, Telemetry, TelemetryConfig};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker::{ModelSpec, Readiness, progress::ProgressBars};

/// How long the parts may take to find each other once the checkpoints are loaded.
const START_TIMEOUT: Duration = Duration::from_secs(60);

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
    let metrics = telemetry.metrics();
    let data_dir = data_dir(&options)?;
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&data_dir.join("store"))?);
    let models = models(&options, &data_dir)?;

    let stop = Stop::new();
    let mut servers = JoinSet::new();
    let control_plane = start_control_plane(&options, store.clone(), &metrics, &stop, &mut servers).await?;
    let workers = start_workers(&options, &models, store, &metrics, &stop, &mut servers).await?;
    let gateway = start_gateway(&options, control_plane, &data_dir, &metrics, &stop, &mut servers).await?;

    let interrupted = tokio::spawn(interrupted());
    let ready = async {
        let rollout = set_up(&options, control_plane, gateway.listen, &workers).await?;
        let banner = Banner {
            gateway: gateway.listen,
            gateway_ops: gateway.ops,
            control_plane,
            workers: workers.iter().map(|(address, _)| *address).collect(),
            data_dir: &data_dir,
            revisions: models.iter().map(ToString::to_string).collect(),
            rollout,
            program: program(),
            explicit: gateway.listen.port() != 8080 || control_plane.port() != 8090,
        };
        say(&banner.render());
        std::future::pending::<Result<()>>().await
    };
    let outcome = tokio::select! {
        result = ready => result,
        ended = servers.join_next() => ended.unwrap_or_else(|| bail!("nothing runs")),
        signal = interrupted => signal.context("the signal handler ended").and_then(|signal| signal),
    };
    let drained = drain(stop, servers).await;
    outcome.and(drained)
}

/// Ends the parts from the outside in, so that no part misses one that it still needs.
async fn drain(stop: Stop, mut servers: JoinSet<Result<()>>) -> Result<()> {
    stop.gateway.cancel();
    // The gateway finishes its streams while workers and control plane still serve.
    let mut result = Ok(());
    for token in [Some(stop.workers), Some(stop.control_plane), None] {
        if let Some(ended) = servers.join_next().await {
            result = result.and(ended.map_err(anyhow::Error::from).flatten());
        }
        match token {
            Some(token) => token.cancel(),
            None => break,
        }
    }
    while let Some(ended) = servers.join_next().await {
        result = result.and(ended.map_err(anyhow::Error::from).flatten());
    }
    result
}

/// One token per part.
struct Stop {
    gateway: CancellationToken,
    workers: CancellationToken,
    control_plane: CancellationToken,
}

impl Stop {
    fn new() -> Self {
        let token = CancellationToken::new;
        Self { gateway: token(), workers: token(), control_plane: token() }
    }
}
