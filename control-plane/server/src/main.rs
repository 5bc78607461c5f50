//! The control-plane process.

use std::{process::ExitCode, sync::Arc};

use anyhow::Context as _;
use clap::Parser as _;
use control_plane::config::{Args, StoreArgs};
use penstock_store::{Store, embedded::EmbeddedStore};
use penstock_telemetry::{Telemetry, TelemetryConfig};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let log = args.log().map(Into::into);
    let telemetry = penstock_telemetry::init(TelemetryConfig {
        log,
        ..TelemetryConfig::new("control-plane")
    })?;
    let result = serve(args, &telemetry).await;
    telemetry.shutdown().await;
    result
}

async fn serve(args: Args, telemetry: &Telemetry) -> anyhow::Result<()> {
    let store = open(args.store()).await?;
    let mut config = args.into_config(store);
    config.metrics = telemetry.metrics();
    let server = config.build().await?;
    let addresses = server.addresses();
    tracing::info!(listen = %addresses.listen, ops = %addresses.ops, "control plane listens");
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let signals = tokio::spawn(async move {
        match interrupted().await {
            Ok(()) => stop.cancel(),
            Err(error) => tracing::error!(%error, "cannot wait for signals"),
        }
    });
    let result = server.run(shutdown).await;
    signals.abort();
    Ok(result?)
}

async fn open(store: &StoreArgs) -> anyhow::Result<Arc<dyn Store>> {
    #[cfg(feature = "etcd")]
    if !store.etcd.is_empty() {
        let etcd = penstock_store::etcd::EtcdStore::connect(&store.etcd).await?;
        return Ok(Arc::new(etcd));
    }
    let directory = store
        .data_dir
        .as_deref()
        .context("name a store with --data-dir")?;
    Ok(Arc::new(EmbeddedStore::open(directory)?))
}

/// SIGTERM or Ctrl-C.
async fn interrupted() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}
