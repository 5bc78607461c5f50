//! Command line and environment of the control plane.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use penstock_store::Store;

use crate::{Config, notify::Target};

/// Stores rollouts, decides what happens next and pushes traffic weights to gateways.
#[derive(Debug, Clone, clap::Parser)]
#[command(
    version,
    after_help = "\
Examples:
  control-plane --etcd http://127.0.0.1:2379
  control-plane --data-dir /var/lib/penstock      one process, no etcd"
)]
pub struct Args {
    /// gRPC and HTTP
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8090",
        env = "PENSTOCK_CONTROL_PLANE_LISTEN"
    )]
    listen: SocketAddr,

    /// Operations: /metrics
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8091",
        env = "PENSTOCK_CONTROL_PLANE_OPS_LISTEN"
    )]
    ops_listen: SocketAddr,

    /// Where others reach this control plane [default: the listen address]
    #[arg(long, value_name = "HOST:PORT", env = "PENSTOCK_CONTROL_PLANE_ADVERTISE")]
    advertise: Option<String>,

    #[command(flatten)]
    store: StoreArgs,

    /// Webhook that is told of phase changes, pauses and verdicts: URL[,format=json|slack][,secret-file=PATH]
    /// (repeatable)
    #[arg(long, value_name = "TARGET", env = "PENSTOCK_NOTIFY")]
    notify: Vec<Target>,

    /// What to log, in the syntax of RUST_LOG
    #[arg(long, value_name = "FILTER", env = "RUST_LOG")]
    log: Option<String>,
}

/// Where everything is kept: one of the two.
#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = false)]
pub struct StoreArgs {
    /// etcd endpoints, separated by commas
    #[cfg(feature = "etcd")]
    #[arg(long, value_name = "ENDPOINTS", value_delimiter = ',', env = "PENSTOCK_ETCD")]
    pub etcd: Vec<String>,

    /// Directory of the embedded store
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
}

impl Args {
    /// The log filter, if one was given.
    pub fn log(&self) -> Option<&str> {
        self.log.as_deref()
    }

    /// Where everything is kept.
    pub fn store(&self) -> &StoreArgs {
        &self.store
    }

    /// Everything else, on a store.
    pub fn into_config(self, store: Arc<dyn Store>) -> Config {
        Config {
            listen: self.listen,
            ops_listen: self.ops_listen,
            advertise: self.advertise,
            notify: self.notify,
            ..Config::new(store)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[test]
    fn one_store_must_be_named() {
        assert!(Args::try_parse_from(["control-plane"]).is_err());
        let args = Args::try_parse_from(["control-plane", "--data-dir", "/d"]).unwrap();
        assert_eq!(args.store().data_dir.as_deref(), Some(std::path::Path::new("/d")));
    }
}
