//! `ctl`, the operator's command: rollouts, what serves them, a prompt to try, and where a request would go.
//!
//! ```text
//! config ──▶ commands/{rollout, worker, gateway, model, audit, generate, feedback, route}
//! (clap,        │        │
//!  env)         │        └─▶ converge: WatchRollout until every live gateway has acknowledged
//!               ├─▶ connect: Admin of the control plane, Inference of a gateway, traceparent on each call
//!               ├─▶ ops: a worker's or a gateway's operations port, for what must work in an outage
//!               ├─▶ live: the view of `--watch` on a terminal
//!               ├─▶ conflict: what was seen, what is there, what was asked for
//!               └─▶ output: data on stdout as table, json or yaml; progress and errors on stderr
//! ```
//!
//! It is a client of the control plane's Admin service, of the gateway's Inference service and of operations
//! ports, and of nothing else: it never reads the store. `penstock ctl …` is this crate under another name.
//!
//! ```
//! use clap::{Args as _, FromArgMatches as _};
//!
//! let matches = ctl::command().get_matches_from(["ctl", "rollout", "set", "--canary", "5%"]);
//! let args = ctl::Args::from_arg_matches(&matches).unwrap();
//! # drop(args);
//! ```

mod commands;
mod config;
mod confirm;
mod conflict;
mod connect;
mod console;
mod converge;
mod error;
mod live;
mod ops;
mod output;
mod view;

pub use config::{Args, command};

use config::Noun;
use console::Console;
use error::CtlError;
use penstock_telemetry::TelemetryConfig;
use std::process::ExitCode;
use tracing::Instrument as _;

/// Runs one command against the process's terminal, with telemetry of its own, and says how it ended. Must be
/// called inside a Tokio runtime.
///
/// Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 conflict, 5 unavailable, 6 denied, 7 rolled back,
/// 8 timed out or not converged, 9 waiting for approval, samples or an operator.
pub async fn run(args: Args) -> ExitCode {
    let mut console = Console::terminal();
    // A command that works says nothing but its answer.
    let config = TelemetryConfig {
        log: args.log.clone(),
        default_log: "warn".to_owned(),
        ..TelemetryConfig::new("ctl")
    };
    let telemetry = match penstock_telemetry::init(config) {
        Ok(telemetry) => telemetry,
        Err(error) => return finish(&mut console, Err(CtlError::Telemetry(error))).into(),
    };
    let code = run_on(args, &mut console).await;
    telemetry.shutdown().await;
    code.into()
}

/// Runs one command against any console; the number is its exit code.
async fn run_on(args: Args, console: &mut Console) -> u8 {
    let span = tracing::info_span!(
        "ctl",
        otel.name = args.noun.name(),
        otel.kind = "client",
        penstock.component = "ctl",
    );
    let result = dispatch(args, console).instrument(span.clone()).await;
    if let Err(error) = &result {
        penstock_telemetry::set_error(&span, error::kind(error.code()), error.to_string());
    }
    finish(console, result)
}

async fn dispatch(args: Args, console: &mut Console) -> Result<(), CtlError> {
    let Args {
        connection,
        output,
        noun,
        log: _,
    } = args;
    match noun {
        Noun::Rollout { verb } => commands::rollout::run(*verb, &connection, output, console).await,
        Noun::Worker { verb } => commands::worker::run(verb, &connection, output, console).await,
        Noun::Gateway { verb } => commands::gateway::run(verb, &connection, output, console).await,
        Noun::Model { verb } => commands::model::run(verb, &connection, output, console).await,
        Noun::Route { verb } => commands::route::run(verb, &connection, output, console).await,
        Noun::Audit(audit) => commands::audit::run(audit, &connection, output, console).await,
        Noun::Feedback(feedback) => commands::feedback::run(feedback, &connection, output, console).await,
        Noun::Completions { shell } => commands::completions(shell, console),
        Noun::Generate(generate) => commands::generate::run(*generate, &connection, output, console).await,
    }
}

fn finish(console: &mut Console, result: Result<(), CtlError>) -> u8 {
    let Err(error) = result else { return 0 };
    if matches!(error, CtlError::Differs) {
        return error.code();
    }
    console.progress(&format!("error: {}", error::chain(&error)));
    error.code()
}

#[cfg(test)]
mod tests;
