//! Penstock in one process: control plane, gateway and workers on the embedded store.
//!
//! It wires the same servers that run as separate processes; it adds no behaviour of its own beyond the bundled
//! demo model and its rollout.

mod banner;
mod config;
mod demo;
mod serve;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = config::Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("cannot start the runtime")),
    };
    match cli.command {
        Some(config::Command::Ctl(arguments)) => runtime.block_on(ctl::run(arguments)),
        None => match runtime.block_on(serve::serve(cli.serve)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
    }
}

/// One line, causes included.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
