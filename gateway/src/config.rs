//! Command line and environment of the gateway.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{Config, HedgeAfter, Overload, balance::Policy};

/// Takes requests over gRPC and HTTP, assigns each to a revision, and forwards it to a worker.
#[derive(Debug, Clone, clap::Parser)]
#[command(version)]
pub struct Args {
    /// gRPC and HTTP
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8080",
        env = "PENSTOCK_GATEWAY_LISTEN"
    )]
    listen: SocketAddr,

    /// Operations: /metrics, probes, /override
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8081",
        env = "PENSTOCK_GATEWAY_OPS_LISTEN"
    )]
    ops_listen: SocketAddr,

    /// A control plane (repeatable, or separated by commas)
    #[arg(
        long = "control-plane",
        value_name = "ADDR",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8090",
        env = "PENSTOCK_CONTROL_PLANE"
    )]
    control_planes: Vec<String>,

    /// Region of this gateway
    #[arg(long, default_value = "", env = "PENSTOCK_REGION")]
    region: String,

    /// Name of this gateway, unique among all [default: the address that it listens on]
    #[arg(long, env = "PENSTOCK_GATEWAY_NODE")]
    node: Option<String>,

    /// Where the last routes and workers are kept, so that it starts without a control plane
    #[arg(long, value_name = "DIR", env = "PENSTOCK_GATEWAY_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// How a worker is chosen among those of a revision
    #[arg(
        long,
        value_name = "POLICY",
        value_enum,
        default_value = "prefix",
        env = "PENSTOCK_GATEWAY_ROUTING"
    )]
    routing: Policy,

    /// Time that a request waits for a busy worker at most; one that would wait longer is refused at once
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration, env = "PENSTOCK_GATEWAY_MAX_QUEUE_WAIT")]
    max_queue_wait: Duration,

    /// Requests that wait for one revision at most
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1024,
        env = "PENSTOCK_GATEWAY_MAX_QUEUE"
    )]
    max_queue: usize,

    /// Tokens in flight at one worker at most; how many it really takes is learnt from its queue
    #[arg(long, value_name = "N", default_value_t = 1 << 20, env = "PENSTOCK_GATEWAY_MAX_WORKER_TOKENS")]
    max_worker_tokens: u64,

    /// Ask a second worker too when none has begun to answer after so long, or after p95: longer than 95 % of the
    /// revision's last requests took; the first to begin is heard [default: never]
    #[arg(long, value_name = "DURATION|p95", value_parser = parse_hedge, env = "PENSTOCK_GATEWAY_HEDGE_AFTER")]
    hedge_after: Option<HedgeAfter>,

    /// Requests of one tenant in a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), env = "PENSTOCK_GATEWAY_TENANT_REQUESTS_PER_MINUTE")]
    tenant_requests_per_minute: Option<u64>,

    /// Tokens of one tenant in a minute, prompts and replies [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), env = "PENSTOCK_GATEWAY_TENANT_TOKENS_PER_MINUTE")]
    tenant_tokens_per_minute: Option<u64>,

    /// Time that a request gets whose caller sets no grpc-timeout
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse_duration, env = "PENSTOCK_GATEWAY_DEFAULT_TIMEOUT")]
    default_timeout: Duration,

    /// Time that running requests get when the gateway is told to end
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    drain_timeout: Duration,

    /// What to log, in the syntax of RUST_LOG
    #[arg(long, value_name = "FILTER", env = "RUST_LOG")]
    log: Option<String>,
}

impl Args {
    /// The log filter, if one was given.
    pub fn log(&self) -> Option<&str> {
        self.log.as_deref()
    }

    /// Everything else.
    pub fn into_config(self) -> Config {
        Config {
            listen: self.listen,
            ops_listen: self.ops_listen,
            region: self.region,
            node: self.node,
            state_dir: self.state_dir,
            routing: self.routing,
            overload: Overload {
                max_queue_wait: self.max_queue_wait,
                max_queue: self.max_queue,
                max_worker_tokens: self.max_worker_tokens,
                tenant_requests_per_minute: self.tenant_requests_per_minute,
                tenant_tokens_per_minute: self.tenant_tokens_per_minute,
            },
            hedge_after: self.hedge_after,
            default_timeout: self.default_timeout,
            drain_timeout: self.drain_timeout,
            ..Config::new(self.control_planes)
        }
    }
}

/// Reads `p95`, or a time.
fn parse_hedge(value: &str) -> Result<HedgeAfter, String> {
    match value {
        "p95" => Ok(HedgeAfter::P95),
        value => parse_duration(value)
            .map(HedgeAfter::Time)
            .map_err(|error| format!("{error}, nor p95")),
    }
}

/// Reads `250ms`, `1.5s`, `2m`.
fn parse_duration(value: &str) -> Result<Duration, String> {
    let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let seconds = units.iter().find_map(|(unit, scale)| {
        let number: f64 = value.strip_suffix(unit)?.parse().ok()?;
        Some(number * scale)
    });
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "is not a duration such as 250ms, 1.5s or 2m".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[test]
    fn control_planes_are_repeated_or_separated_by_commas() {
        let args = Args::parse_from(["gateway", "--control-plane", "a:1,b:2", "--control-plane", "c:3"]);
        assert_eq!(args.into_config().control_planes, ["a:1", "b:2", "c:3"]);
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for value in ["", "5", "s", "-1s", "1 day"] {
            assert!(parse_duration(value).is_err(), "{value}");
        }
    }

    #[test]
    fn a_hedge_is_a_time_or_a_percentile() {
        assert_eq!(parse_hedge("p95"), Ok(HedgeAfter::P95));
        let time = HedgeAfter::Time(Duration::from_millis(300));
        assert_eq!(parse_hedge("300ms"), Ok(time));
        let error = parse_hedge("p99").unwrap_err();
        assert_eq!(error, "is not a duration such as 250ms, 1.5s or 2m, nor p95");
    }

    #[test]
    fn the_command_line_is_consistent() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }
}
