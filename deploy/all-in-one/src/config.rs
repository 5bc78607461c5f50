//! Command line and environment of the all-in-one.

use clap::{Args, Parser, Subcommand};
use std::{net::SocketAddr, path::PathBuf};

/// Serves language models and changes them safely: control plane, gateway and workers in one process.
///
/// Without a subcommand it serves the bundled demo model as demo@v1 and demo@v2, with a rollout of v2 at 0 %.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  penstock                                     serve the bundled demo model
  penstock --model qwen@base=/models/qwen      serve a checkpoint of your own beside it
  penstock --no-demo --model m@a=/ckpt/a --model m@b=/ckpt/b
  penstock ctl rollout set --canary 5%         send 5 % of the users to the canary
  penstock ctl --help                          everything an operator can do"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) serve: Serve,
}

/// What else this binary does.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Operate rollouts, workers and gateways (the same command as the `ctl` binary)
    Ctl(ctl::Args),
}

/// How to serve.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Where rollouts are kept [default: the platform's data directory]
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,

    /// A checkpoint to serve: a directory in Hugging Face layout (repeatable)
    #[arg(long = "model", value_name = "NAME@REVISION=PATH")]
    pub(crate) models: Vec<worker::ModelSpec>,

    /// Leave the bundled demo model out
    #[arg(long)]
    pub(crate) no_demo: bool,

    /// Workers in this process
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16), value_name = "N")]
    pub(crate) workers: u8,

    /// Gateway, gRPC and HTTP; its operations port is the next one
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
    pub(crate) listen: SocketAddr,

    /// Control plane, gRPC and HTTP; its operations port is the next one
    #[arg(long, default_value = "127.0.0.1:8090", value_name = "ADDR")]
    pub(crate) control_plane_listen: SocketAddr,

    /// First worker; its operations port is the next one, further workers follow ten ports apart
    #[arg(long, default_value = "127.0.0.1:8100", value_name = "ADDR")]
    pub(crate) worker_listen: SocketAddr,

    /// What to log, in the syntax of RUST_LOG
    #[arg(long, value_name = "FILTER", env = "RUST_LOG")]
    pub(crate) log: Option<String>,
}
