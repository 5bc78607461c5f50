//! The worker process.

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Parser as _;
use penstock_telemetry::TelemetryConfig;
use tokio_util::sync::CancellationToken;
use worker::{Server, config::Args, progress::ProgressBars};

/// Threads that still load a checkpoint when the process is told to end get so much time.
const RUNTIME_TIMEOUT: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&anyhow::Error::new(error).context("cannot start the runtime")),
    };
    let result = runtime.block_on(run(args));
    runtime.shutdown_timeout(RUNTIME_TIMEOUT);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let telemetry = penstock_telemetry::init(TelemetryConfig {
        log: args.log().map(Into::into),
        ..TelemetryConfig::new("worker")
    })?;
    let shutdown = CancellationToken::new();
    let result = serve(args, &telemetry, shutdown).await;
    telemetry.shutdown().await;
    result
}

async fn serve(
    args: Args,
    telemetry: &penstock_telemetry::Telemetry,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let store = open_store(&args).await?;
    let mut config = args.into_config(store);
    config.metrics = telemetry.metrics();
    config.progress = Some(Arc::new(ProgressBars::new()));
    let server = config.build().await?;
    announce(&server);
    let signals = tokio::spawn(cancel_on_signal(shutdown.clone()));
    let result = server.run(shutdown).await;
    signals.abort();
    Ok(result?)
}

#[cfg(feature = "etcd")]
async fn open_store(args: &Args) -> anyhow::Result<Arc<dyn penstock_store::Store>> {
    use penstock_store::{Store, StoreError, etcd::EtcdStore};

    let endpoints = args.etcd().to_vec();
    let connect = move || {
        let endpoints = endpoints.clone();
        async move {
            let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(&endpoints).await?);
            Ok::<_, StoreError>(store)
        }
    };
    match connect().await {
        Ok(store) => Ok(store),
        Err(error) if error.is_retryable() => {
            tracing::warn!(%error, "serving without etcd until it is there");
            Ok(Arc::new(worker::LateStore::new(Box::new(move || {
                Box::pin(connect())
            }))))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(feature = "etcd"))]
async fn open_store(_: &Args) -> anyhow::Result<Arc<dyn penstock_store::Store>> {
    anyhow::bail!("this worker was built without the feature `etcd`, so that it has no store to register in")
}

fn announce(server: &Server) {
    let addresses = server.addresses();
    tracing::info!(listen = %addresses.listen, ops = %addresses.ops, "worker listens");
}

/// SIGTERM and Ctrl-C drain; a second one ends the process at once.
async fn cancel_on_signal(shutdown: CancellationToken) {
    if let Err(error) = signal().await {
        tracing::error!(%error, "cannot wait for signals");
        return;
    }
    shutdown.cancel();
    if signal().await.is_ok() {
        std::process::exit(130);
    }
}

async fn signal() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}

/// One line, causes included.
fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
