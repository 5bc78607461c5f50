//! How fast a control plane reaches many gateways: `cargo run --release -p control-plane --example push`.
//!
//! The control plane runs in a process of its own, so that its memory can be told apart; the gateways are real
//! subscriptions in this one, each with its own connection, which report once a second as gateways do.

#![allow(clippy::print_stdout, reason = "it is a command-line tool")]

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser as _;
use control_plane::Config;
use penstock_client::{AdminClient, Subscription, SyncConfig, subscribe};
use penstock_plan::{PublishedRevision, ServedRevision, WorkerRecord};
use penstock_proto::v1;
use penstock_store::{Key, Operation, Store, Transaction, embedded::EmbeddedStore};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);
/// Requests of each revision that a gateway reports.
const REQUESTS: u64 = 100;
/// Those that fail in the first gateway: enough to decide, whatever all others saw.
const FAILED: u64 = 50_000;

/// Measures pushes from one control plane to many gateways.
#[derive(Debug, Clone, clap::Parser)]
struct Args {
    /// Gateway streams
    #[arg(long, default_value_t = 1000)]
    gateways: usize,
    /// Changes of the share that are timed
    #[arg(long, default_value_t = 50)]
    changes: u32,
    /// Aborts that are timed, by an operator and by a verdict each
    #[arg(long, default_value_t = 10)]
    aborts: u32,
    /// Store in etcd at these endpoints, separated by commas, instead of files
    #[arg(long, value_name = "URLS", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Serve on this address instead: what the measuring process starts
    #[arg(long, hide = true)]
    serve: Option<SocketAddr>,
    /// Directory of the store, with --serve
    #[arg(long, hide = true)]
    data_dir: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    match args.serve {
        Some(listen) => runtime.block_on(serve(&args, listen)),
        None => runtime.block_on(measure(&args)),
    }
}

// The control plane.

async fn serve(args: &Args, listen: SocketAddr) -> Result<()> {
    let store: Arc<dyn Store> = if args.etcd.is_empty() {
        let directory = args.data_dir.as_deref().context("--serve needs --data-dir")?;
        Arc::new(EmbeddedStore::open(directory)?)
    } else {
        Arc::new(penstock_store::etcd::EtcdStore::connect(&args.etcd).await?)
    };
    publish(&*store).await?;
    let config = Config {
        listen,
        ops_listen: "127.0.0.1:0".parse()?,
        ..Config::new(store)
    };
    let server = config.build().await?;
    server.run(CancellationToken::new()).await?;
    Ok(())
}

/// Two revisions of a model and a worker that serves them.
async fn publish(store: &dyn Store) -> Result<()> {
    let mut operations = Vec::new();
    let mut put = |key: Key, value: Vec<u8>| {
        let value = value.into();
        operations.push(Operation::Put {
            key,
            value,
            lease: None,
        });
    };
    for revision in ["v1", "v2"] {
        let published = PublishedRevision {
            model: "demo".into(),
            revision: revision.into(),
            digest: format!("digest of {revision}"),
            ..PublishedRevision::default()
        };
        let key = Key::Model {
            model: "demo".into(),
            revision: revision.into(),
        };
        put(key, serde_json::to_vec(&published)?);
    }
    let served = |revision: &str| ServedRevision {
        model: "demo".into(),
        revision: revision.into(),
        digest: format!("digest of {revision}"),
        context_length: 128,
    };
    let worker = WorkerRecord {
        id: "w1".into(),
        boot_id: "b".into(),
        address: "127.0.0.1:1".into(),
        ops_address: "127.0.0.1:2".into(),
        region: String::new(),
        runner: "fake".into(),
        device: String::new(),
        draining: false,
        started_ms: 1,
        revisions: vec![served("v1"), served("v2")],
    };
    put(Key::Worker("w1".into()), serde_json::to_vec(&worker)?);
    store
        .commit(Transaction {
            preconditions: Vec::new(),
            operations,
        })
        .await?;
    Ok(())
}

/// The control plane's process.
struct ControlPlane {
    child: Child,
    args: Args,
    listen: SocketAddr,
    directory: tempfile::TempDir,
}

impl ControlPlane {
    async fn start(args: &Args) -> Result<Self> {
        let listen = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let directory = tempfile::tempdir()?;
        let child = Self::spawn(args, listen, &directory)?;
        Ok(Self {
            child,
            args: args.clone(),
            listen,
            directory,
        })
    }

    fn spawn(args: &Args, listen: SocketAddr, directory: &tempfile::TempDir) -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["--serve", &listen.to_string(), "--data-dir"])
            .arg(directory.path())
            .stdout(Stdio::null());
        if !args.etcd.is_empty() {
            command.args(["--etcd", &args.etcd.join(",")]);
        }
        Ok(command.spawn()?)
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.child = Self::spawn(&self.args, self.listen, &self.directory)?;
        Ok(())
    }

    fn address(&self) -> String {
        format!("http://{}", self.listen)
    }

    async fn admin(&self) -> Result<AdminClient> {
        let started = Instant::now();
        loop {
            if let Ok(admin) = AdminClient::connect(&self.address()).await
                && admin.list_models().await.is_ok_and(|models| !models.is_empty())
            {
                return Ok(admin);
            }
            ensure!(started.elapsed() < PATIENCE, "the control plane does not come up");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Resident memory, in bytes.
    fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line
            .and_then(|line| line.split_whitespace().next())
            .context("VmRSS")?;
        Ok(kib.parse::<u64>()? * 1024)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.kill();
    }
}

// The gateways.

/// What all gateways share.
#[derive(Default)]
struct Shared {
    /// The instant of each application of a snapshot: epoch and when.
    applied: Mutex<Vec<(u64, Instant)>>,
    /// Trial under way, as the newest snapshot names it: uid, attempt and step.
    trial: Mutex<(String, u32, u32)>,
    /// Whether the first gateway's canary requests fail, and when its next report will say so.
    failing: AtomicBool,
    told: Mutex<Option<Instant>>,
    reports: AtomicU64,
}

struct Fleet {
    shared: Arc<Shared>,
    subscriptions: Vec<Subscription>,
    stop: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    fn start(args: &Args, address: &str) -> Result<Self> {
        let (shared, stop) = (Arc::new(Shared::default()), CancellationToken::new());
        let mut subscriptions = Vec::new();
        for index in 0..args.gateways {
            let (applied, reported) = (shared.clone(), shared.clone());
            let config = SyncConfig {
                stats: Some(Arc::new(move || report(&reported, index == 0))),
                ..SyncConfig::new([address], format!("gateway-{index}"), format!("boot-{index}"))
            };
            let apply = Box::new(move |candidate: penstock_client::Candidate<'_>| {
                lock(&applied.applied).push((candidate.snapshot.epoch, Instant::now()));
                let route = candidate.snapshot.routes.get("demo");
                if let Some((route, trial)) = route.and_then(|route| Some((route, route.trial.as_ref()?))) {
                    *lock(&applied.trial) = (route.rollout_uid.clone(), trial.attempt, trial.step);
                }
                Ok(())
            });
            subscriptions.push(subscribe(config, apply, stop.clone())?);
        }
        Ok(Self {
            shared,
            subscriptions,
            stop,
        })
    }

    /// The newest snapshot's epoch, once all gateways have it, and when the last one applied it.
    async fn all_have(&self, least: u64) -> Result<(u64, Instant)> {
        let started = Instant::now();
        loop {
            let newest = {
                let applied = lock(&self.shared.applied);
                let epoch = applied.iter().map(|(epoch, _)| *epoch).max().unwrap_or(0);
                let of_epoch = applied.iter().filter(|(found, _)| *found == epoch);
                let count = of_epoch.clone().count();
                let last = of_epoch.map(|(_, at)| *at).max();
                last.filter(|_| count >= self.subscriptions.len() && epoch >= least)
                    .map(|last| (epoch, last))
            };
            if let Some(found) = newest {
                return Ok(found);
            }
            ensure!(
                started.elapsed() < PATIENCE,
                "not every gateway got epoch {least}"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn forget(&self) {
        lock(&self.shared.applied).clear();
    }
}

/// What a gateway counted: as many requests on either side, of which the first gateway's fail while they are to.
fn report(shared: &Shared, is_first: bool) -> v1::Stats {
    shared.reports.fetch_add(1, Ordering::Relaxed);
    let (rollout_uid, attempt, step) = lock(&shared.trial).clone();
    let fails = is_first && shared.failing.load(Ordering::Relaxed);
    if fails {
        lock(&shared.told).get_or_insert_with(Instant::now);
    }
    let side = |revision: &str, bad: u64| v1::RevisionStats {
        model: "demo".into(),
        revision: revision.into(),
        rollout_uid: rollout_uid.clone(),
        attempt,
        step,
        requests: REQUESTS + bad,
        errors: bad,
        metrics: vec![v1::MetricCounts {
            metric: "error_rate".into(),
            strata: vec![v1::Counts {
                requests: REQUESTS + bad,
                bad,
            }],
        }],
        ..v1::RevisionStats::default()
    };
    v1::Stats {
        revisions: vec![side("v1", 0), side("v2", if fails { FAILED } else { 0 })],
        ..v1::Stats::default()
    }
}

// The measurement.

async fn measure(args: &Args) -> Result<()> {
    ensure!(args.gateways > 0, "there is nothing to measure without gateways");
    let mut control_plane = ControlPlane::start(args).await?;
    let admin = control_plane.admin().await?;
    let before = control_plane.resident()?;
    let fleet = Fleet::start(args, &control_plane.address())?;
    admin.create_rollout(create()).await?;
    fleet.all_have(1).await?;
    settle(&admin, args.gateways).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    println!(
        "{} gateways, each with its own connection and a report a second",
        args.gateways
    );

    let (mut swapped, mut acknowledged) = (Vec::new(), Vec::new());
    for change in 0..args.changes {
        let (swap, acknowledgement) = timed_change(&fleet, &admin, 10_000 + change, args.gateways).await?;
        swapped.push(swap);
        acknowledged.push(acknowledgement);
    }
    show("request -> last gateway's swap", &mut swapped);
    show("request -> all acknowledged", &mut acknowledged);
    let per_stream = (control_plane.resident()?.saturating_sub(before)) as f64 / args.gateways as f64;
    println!(
        "{:<48} {:.1} KiB",
        "control plane's memory per stream",
        per_stream / 1024.0
    );

    let mut aborted = Vec::new();
    for _ in 0..args.aborts {
        aborted.push(timed_abort(&fleet, &admin, args.gateways).await?);
    }
    show("abort by an operator -> last gateway's swap", &mut aborted);
    let (mut observed, mut reported) = (Vec::new(), Vec::new());
    for _ in 0..args.aborts {
        let (from_observation, from_report) = timed_verdict(&fleet, &admin, args.gateways).await?;
        observed.push(from_observation);
        reported.push(from_report);
    }
    show("deciding observation -> last gateway's swap", &mut observed);
    show("  of that, after the report was sent", &mut reported);
    storm(&mut control_plane, &fleet, args.gateways).await?;
    fleet.stop.cancel();
    Ok(())
}

fn create() -> v1::CreateRolloutRequest {
    v1::CreateRolloutRequest {
        model: "demo".into(),
        stable: "v1".into(),
        canary: "v2".into(),
        ..Default::default()
    }
}

/// Waits until every gateway has acknowledged what is published.
async fn settle(admin: &AdminClient, gateways: usize) -> Result<()> {
    let started = Instant::now();
    loop {
        let status = admin.get_rollout("demo").await?;
        if status.epoch > 0 && status.acknowledged as usize == gateways && status.pending.is_empty() {
            return Ok(());
        }
        ensure!(
            started.elapsed() < PATIENCE,
            "{} of {gateways} acknowledged",
            status.acknowledged
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// From the request for another share to the last swap, and to the control plane's word that all acknowledged.
async fn timed_change(
    fleet: &Fleet,
    admin: &AdminClient,
    ppm: u32,
    gateways: usize,
) -> Result<(Duration, Duration)> {
    fleet.forget();
    let started = Instant::now();
    let request = v1::SetRolloutRequest {
        model: "demo".into(),
        canary_ppm: ppm,
        ..Default::default()
    };
    let written = admin.set_rollout(request).await?;
    let mut watch = admin.watch_rollout("demo").await?;
    let acknowledged = loop {
        let status = watch.message().await?.context("the watch ended")?;
        let now = status.rollout.as_ref().map_or(0, |rollout| rollout.generation);
        if now >= written.generation && status.epoch > 0 && status.acknowledged as usize == gateways {
            break started.elapsed();
        }
    };
    let (_, last) = fleet.all_have(1).await?;
    Ok((last - started, acknowledged))
}

async fn restart_rollout(admin: &AdminClient, gateways: usize, manifest: Option<&str>) -> Result<()> {
    let started = Instant::now();
    loop {
        let before = admin.get_rollout("demo").await?.rollout.unwrap_or_default();
        if !matches!(before.phase(), v1::Phase::RolledBack | v1::Phase::Succeeded) {
            ensure!(started.elapsed() < PATIENCE, "it does not end: {before:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        let made = match manifest {
            None => admin.create_rollout(create()).await.map(drop),
            Some(manifest) => {
                let request = v1::ApplyRolloutRequest {
                    manifest: manifest.into(),
                    ..Default::default()
                };
                let applied = admin.apply_rollout(request).await?;
                ensure!(
                    applied.rollout.is_some(),
                    "the plan is refused: {:?}",
                    applied.findings
                );
                Ok(())
            }
        };
        match made {
            Ok(()) => return settle(admin, gateways).await,
            // The one before is still rolling back.
            Err(error) if started.elapsed() > PATIENCE => bail!(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn timed_abort(fleet: &Fleet, admin: &AdminClient, gateways: usize) -> Result<Duration> {
    // The first finds the rollout of the changes.
    let request = v1::SetRolloutRequest {
        model: "demo".into(),
        canary_ppm: 50_000,
        ..Default::default()
    };
    if admin.set_rollout(request.clone()).await.is_err() {
        restart_rollout(admin, gateways, None).await?;
        admin.set_rollout(request).await?;
    }
    settle(admin, gateways).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    fleet.forget();
    let started = Instant::now();
    let request = v1::AbortRolloutRequest {
        model: "demo".into(),
        reason: "bench".into(),
        ..Default::default()
    };
    admin.abort_rollout(request).await?;
    let (_, last) = fleet.all_have(1).await?;
    Ok(last - started)
}

/// From the failures in one gateway, at any time between two of its reports, to the last gateway's swap.
async fn timed_verdict(fleet: &Fleet, admin: &AdminClient, gateways: usize) -> Result<(Duration, Duration)> {
    const PLAN: &str = "kind: Rollout\nmodel: demo\nstable: v1\ncanary: {revision: v2}\n\
        steps: [{canary: 5%, hold: 1h}, {canary: 25%, hold: 1h}, {canary: 100%, bake: 1h}]\n\
        analysis: {metrics: [{name: error_rate, max: 5%}]}\n";
    fleet.shared.failing.store(false, Ordering::Relaxed);
    restart_rollout(admin, gateways, Some(PLAN)).await?;
    let started = Instant::now();
    while admin
        .get_rollout("demo")
        .await?
        .canary_stats
        .is_none_or(|stats| stats.requests == 0)
    {
        ensure!(started.elapsed() < PATIENCE, "no report is counted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(u64::from(rand::random::<u16>()) % 1000)).await;
    fleet.forget();
    lock(&fleet.shared.told).take();
    let started = Instant::now();
    fleet.shared.failing.store(true, Ordering::Relaxed);
    let swapped = fleet.all_have(1).await;
    if swapped.is_err() {
        let status = admin.get_rollout("demo").await?;
        bail!("no verdict in time: {status:?}");
    }
    let (_, last) = swapped?;
    let told = lock(&fleet.shared.told).context("the failures were reported")?;
    fleet.shared.failing.store(false, Ordering::Relaxed);
    Ok((last - started, last - told))
}

/// The control plane is killed and comes back: all gateways connect again, spread by their jitter.
async fn storm(control_plane: &mut ControlPlane, fleet: &Fleet, gateways: usize) -> Result<()> {
    control_plane.kill()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let connected = |fleet: &Fleet| {
        fleet
            .subscriptions
            .iter()
            .filter(|s| s.view().borrow().connected)
            .count()
    };
    ensure!(connected(fleet) == 0, "a stream outlived the control plane");
    control_plane.restart()?;
    let started = Instant::now();
    let (mut first, mut busiest, mut before) = (None, 0, 0);
    let mut window = Instant::now();
    while before < gateways {
        ensure!(started.elapsed() < PATIENCE, "{before} of {gateways} came back");
        tokio::time::sleep(Duration::from_millis(5)).await;
        let now = connected(fleet);
        if now > 0 && first.is_none() {
            first = Some(Instant::now());
        }
        if window.elapsed() >= Duration::from_millis(100) || now == gateways {
            busiest = busiest.max(now.saturating_sub(before));
            (before, window) = (now, Instant::now());
        }
    }
    let spread = first.map_or(Duration::ZERO, |first| first.elapsed());
    let admin = control_plane.admin().await?;
    settle_all(&admin, gateways).await?;
    println!(
        "{:<48} spread over {:.2} s, at most {busiest} in 0.1 s; all acknowledged {:.2} s after the start",
        "storm: the control plane is killed and started",
        spread.as_secs_f64(),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

async fn settle_all(admin: &AdminClient, gateways: usize) -> Result<()> {
    let started = Instant::now();
    loop {
        let listed = admin.list_gateways().await?;
        let current = |gateway: &&v1::Gateway| gateway.live && gateway.acknowledged_epoch == listed.epoch;
        if listed.gateways.iter().filter(current).count() == gateways {
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "not every gateway is back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn show(what: &str, durations: &mut [Duration]) {
    durations.sort_unstable();
    let Some(worst) = durations.last() else {
        return;
    };
    let at = |share: f64| durations[((durations.len() - 1) as f64 * share).ceil() as usize];
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    println!(
        "{what:<48} p50 {:>7.1} ms   p99 {:>7.1} ms   worst {:>7.1} ms   of {}",
        ms(at(0.5)),
        ms(at(0.99)),
        ms(*worst),
        durations.len()
    );
}
