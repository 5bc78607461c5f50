//! The gateway process.

use std::process::ExitCode;

use clap::Parser as _;
use gateway::{Server, config::Args};
use penstock_telemetry::{Telemetry, TelemetryConfig};
use tokio_util::sync::CancellationToken;

/// A gateway allocates a hundred small things for each request, and glibc takes its time for each.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, causes included.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let telemetry = penstock_telemetry::init(TelemetryConfig {
        log: args.log().map(Into::into),
        ..TelemetryConfig::new("gateway")
    })?;
    let result = serve(args, &telemetry).await;
    telemetry.shutdown().await;
    result
}

async fn serve(args: Args, telemetry: &Telemetry) -> anyhow::Result<()> {
    let mut config = args.into_config();
    config.metrics = telemetry.metrics();
    let server = config.build().await?;
    announce(&server);
    let shutdown = CancellationToken::new();
    let signals = tokio::spawn(cancel_on_signal(shutdown.clone()));
    let result = server.run(shutdown).await;
    signals.abort();
    Ok(result?)
}

fn announce(server: &Server) {
    let addresses = server.addresses();
    tracing::info!(listen = %addresses.listen, ops = %addresses.ops, "gateway listens");
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
