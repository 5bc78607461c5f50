//! The `ctl` binary.

use clap::FromArgMatches as _;
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let matches = ctl::command().get_matches();
    match ctl::Args::from_arg_matches(&matches) {
        Ok(args) => ctl::run(args).await,
        Err(error) => error.exit(),
    }
}
