//! The suite against a real etcd, and what happens when it goes away.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use etcd_client::Client;
use penstock_store::{CommitError, Key, Prefix, Store, StoreError, WatchEvent, etcd::EtcdStore};
use tempfile::TempDir;

use crate::{
    leases,
    support::{PATIENCE, apply_until, get, gone, key, next, put, put_leased, write},
    watches,
};

/// In its directory.
const LOG: &str = "etcd.log";

/// One etcd member of its own, killed when it is dropped.
struct Etcd {
    child: Child,
    directory: TempDir,
    client: u16,
    peer: u16,
}

impl Etcd {
    async fn start() -> Self {
        // Somebody may take a free port before etcd does: etcd then ends at once, and others are tried.
        let mut log = String::new();
        for _ in 0..5 {
            let directory = tempfile::tempdir().unwrap();
            let (client, peer) = free_ports();
            let child = spawn(directory.path(), client, peer);
            let mut etcd = Self {
                child,
                directory,
                client,
                peer,
            };
            if etcd.is_ready().await {
                return etcd;
            }
            log = fs::read_to_string(etcd.directory.path().join(LOG)).unwrap_or_default();
        }
        panic!("etcd does not start:\n{log}");
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client)
    }

    /// A client that is not ours.
    async fn raw(&self) -> Client {
        Client::connect([self.endpoint()], None).await.unwrap()
    }

    async fn store(&self) -> Arc<dyn Store> {
        Arc::new(EtcdStore::connect(&[self.endpoint()]).await.unwrap())
    }

    /// Whether it answers in time.
    async fn is_ready(&mut self) -> bool {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if EtcdStore::connect(&[self.endpoint()]).await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// SIGKILL: no goodbye, as when the machine dies.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on the same data and ports.
    async fn restart(&mut self) {
        self.child = spawn(self.directory.path(), self.client, self.peer);
        assert!(self.is_ready().await, "etcd does not start again");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_ports() -> (u16, u16) {
    let bound = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [client, peer] = bound.map(|listener| listener.local_addr().unwrap().port());
    (client, peer)
}

fn spawn(directory: &Path, client: u16, peer: u16) -> Child {
    let (client, peer) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    let log = File::options()
        .append(true)
        .create(true)
        .open(directory.join(LOG))
        .unwrap();
    Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        .args(["--name", "test", "--log-level", "error"])
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("test={peer}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| {
            panic!("cannot start etcd ({error}); install it (Debian: apt-get install etcd-server)")
        })
}

async fn fresh() -> (Arc<dyn Store>, Etcd) {
    let etcd = Etcd::start().await;
    (etcd.store().await, etcd)
}

whole_suite!(fresh());

#[tokio::test]
async fn a_watch_from_lost_history_starts_anew() {
    let (store, etcd) = fresh().await;
    let mut raw = etcd.raw().await;
    let compact = async move |revision: u64| {
        raw.compact(revision.cast_signed(), None).await.unwrap();
    };
    watches::a_watch_from_lost_history_starts_anew(store, compact).await;
}

#[tokio::test]
async fn a_lease_ended_by_somebody_else_is_lost() {
    let (store, etcd) = fresh().await;
    let mut raw = etcd.raw().await;
    let end = async move |lease: penstock_store::LeaseId| {
        raw.lease_revoke(lease.0).await.unwrap();
    };
    leases::a_lease_ended_by_somebody_else_is_lost(store, end).await;
}

#[tokio::test]
async fn keys_that_are_none_of_ours_spoil_nothing() {
    let (store, etcd) = fresh().await;
    let mut raw = etcd.raw().await;
    let mut watch = store.watch(Prefix::All, 1).await.unwrap();
    raw.put("/penstock/rollouts/a/b", "1", None).await.unwrap();
    raw.put(b"/penstock/rollouts/\xff\xfe".to_vec(), "1", None)
        .await
        .unwrap();
    raw.delete("/penstock/rollouts/a/b", None).await.unwrap();
    let a = key("a");
    write(&store, put(&a, "1")).await;

    match next(&mut watch).await {
        WatchEvent::Put(entry) => assert_eq!(entry.key, a),
        other => panic!("{other:?}"),
    }
    let listing = store.list(Prefix::Rollouts).await.unwrap();
    assert_eq!(
        listing.entries.into_iter().map(|e| e.key).collect::<Vec<_>>(),
        [a]
    );
}

#[tokio::test]
async fn listings_may_be_larger_than_one_message_by_default() {
    let (store, _etcd) = fresh().await;
    let mut watch = store.watch(Prefix::Rollouts, 1).await.unwrap();
    let value = "x".repeat(1 << 20);
    for i in 0..6 {
        write(&store, put(&key(&i.to_string()), value.clone())).await;
    }
    assert_eq!(store.list(Prefix::Rollouts).await.unwrap().entries.len(), 6);
    for _ in 0..6 {
        assert!(matches!(next(&mut watch).await, WatchEvent::Put(_)));
    }
}

#[tokio::test]
async fn a_wrong_address_is_an_error_that_names_it() {
    let (port, _) = free_ports();
    let nobody = format!("http://127.0.0.1:{port}");
    let error = EtcdStore::connect(&[&nobody]).await.unwrap_err();
    assert!(error.to_string().contains(&nobody), "{error}");
    assert!(error.is_retryable(), "{error:?}");

    // Somebody who accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let connect = EtcdStore::connect(std::slice::from_ref(&address));
    let error = tokio::time::timeout(PATIENCE, connect)
        .await
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
    assert!(error.is_retryable(), "{error:?}");

    let error = EtcdStore::connect(&["http://not an address"]).await.unwrap_err();
    assert!(error.to_string().contains("not an address"), "{error}");
    assert!(!error.is_retryable(), "{error:?}");

    let none: [&str; 0] = [];
    assert!(!EtcdStore::connect(&none).await.unwrap_err().is_retryable());
}

#[tokio::test]
async fn calls_fail_as_retryable_while_etcd_is_away_and_work_again_after() {
    let (store, mut etcd) = fresh().await;
    let a = key("a");
    write(&store, put(&a, "1")).await;
    etcd.kill();
    let errors = [
        store.health().await.unwrap_err(),
        store.get(&a).await.unwrap_err(),
        store.list(Prefix::All).await.unwrap_err(),
        store.grant_lease(PATIENCE).await.unwrap_err(),
    ];
    for error in errors {
        assert!(error.is_retryable(), "{error:?}");
    }
    let commit = store
        .commit(crate::support::transaction([], [put(&a, "2")]))
        .await;
    assert!(
        matches!(&commit, Err(CommitError::Store(error)) if error.is_retryable()),
        "{commit:?}"
    );
    etcd.restart().await;
    healthy(&store).await;
    assert_eq!(get(&store, &a).await.unwrap().value.as_ref(), b"1");
}

#[tokio::test]
async fn a_watch_outlives_etcd_and_misses_nothing() {
    let (store, mut etcd) = fresh().await;
    let first = write(&store, put(&key("first"), "")).await;
    let mut watch = store.watch(Prefix::Rollouts, first).await.unwrap();
    let mut state = BTreeMap::new();
    let mut seen = apply_until(&mut watch, &mut state, &key("first")).await;

    for round in 0..2 {
        etcd.kill();
        etcd.restart().await;
        // Written through another connection, which is there before the watch's may be.
        let other = etcd.store().await;
        for i in 0..20 {
            write(&other, put(&key(&format!("{round}-{i}")), "1")).await;
        }
        let last = key(&format!("last-{round}"));
        write(&other, put(&last, "")).await;
        seen.extend(apply_until(&mut watch, &mut state, &last).await);
    }
    let other = etcd.store().await;
    assert_eq!(
        state,
        watches::by_key(other.list(Prefix::Rollouts).await.unwrap().entries)
    );
    let all: Vec<u64> = (first..=*seen.last().unwrap()).collect();
    assert_eq!(seen, all, "each revision once, in order");
}

/// What was compacted while a watch was cut off comes as a whole.
#[tokio::test]
async fn a_watch_that_was_cut_off_while_history_was_compacted_starts_anew() {
    let (store, mut etcd) = fresh().await;
    let (a, b) = (key("a"), key("b"));
    let first = write(&store, put(&a, "1")).await;
    let mut watch = store.watch(Prefix::Rollouts, first).await.unwrap();
    let mut state = BTreeMap::new();
    apply_until(&mut watch, &mut state, &a).await;
    etcd.kill();

    // Meanwhile it is where the watch does not find it.
    let usual = etcd.client;
    (etcd.client, _) = free_ports();
    etcd.restart().await;
    let other = etcd.store().await;
    for _ in 0..10 {
        write(&other, put(&a, "2")).await;
    }
    let last = write(&other, put(&b, "1")).await;
    etcd.raw().await.compact(last.cast_signed(), None).await.unwrap();
    etcd.kill();
    etcd.client = usual;
    etcd.restart().await;

    let listing = match next(&mut watch).await {
        WatchEvent::Resync(listing) => listing,
        other => panic!("a resync was expected, not {other:?}"),
    };
    healthy(&store).await;
    assert_eq!(listing, store.list(Prefix::Rollouts).await.unwrap());
    let after = write(&store, put(&a, "3")).await;
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(entry) if entry.mod_revision == after));
}

#[tokio::test]
async fn a_lease_survives_a_restart_of_etcd_or_is_told_lost() {
    const TTL: Duration = Duration::from_secs(8);
    let (store, mut etcd) = fresh().await;
    let worker = Key::Worker("w".into());
    let lease = store.grant_lease(TTL).await.unwrap();
    write(&store, put_leased(&worker, "1", lease.id())).await;
    let killed = Instant::now();
    etcd.kill();
    etcd.restart().await;
    let in_time = killed.elapsed() < TTL / 2;
    // Longer than etcd keeps it by itself.
    tokio::time::sleep(TTL * 2).await;
    healthy(&store).await;
    if lease.is_lost() {
        assert!(!in_time, "lost although etcd was back in time");
        gone(&store, &worker).await;
    } else {
        assert!(get(&store, &worker).await.is_some());
    }
}

#[tokio::test]
async fn a_lease_is_lost_when_etcd_stays_away() {
    let (store, mut etcd) = fresh().await;
    let worker = Key::Worker("w".into());
    let lease = store.grant_lease(Duration::from_secs(2)).await.unwrap();
    write(&store, put_leased(&worker, "1", lease.id())).await;
    assert!(!lease.is_lost());
    etcd.kill();
    tokio::time::timeout(PATIENCE, lease.lost()).await.expect("told");
    etcd.restart().await;
    healthy(&store).await;
    // Nobody keeps it any more.
    gone(&store, &worker).await;
}

/// A peer that is there but silent, as behind a cut cable: SIGSTOP keeps the connection open.
#[tokio::test]
async fn silence_is_noticed() {
    let (store, etcd) = fresh().await;
    let lease = store.grant_lease(Duration::from_secs(2)).await.unwrap();
    let first = write(&store, put(&key("first"), "")).await;
    let mut watch = store.watch(Prefix::Rollouts, first).await.unwrap();
    next(&mut watch).await;
    signal(&etcd, "-STOP");
    stopped(&etcd).await;
    let error = tokio::time::timeout(PATIENCE, store.health())
        .await
        .unwrap()
        .unwrap_err();
    assert!(
        matches!(error, StoreError::Timeout(_) | StoreError::Unavailable(_)),
        "{error:?}"
    );
    tokio::time::timeout(PATIENCE, lease.lost()).await.expect("told");
    signal(&etcd, "-CONT");
    healthy(&store).await;
    let last = key("last");
    write(&store, put(&last, "")).await;
    let seen = apply_until(&mut watch, &mut BTreeMap::new(), &last).await;
    assert_eq!(seen.len(), 1);
}

fn signal(etcd: &Etcd, signal: &str) {
    let status = Command::new("kill")
        .args([signal, &etcd.child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Waits until every thread of etcd has stopped: the signal takes its time on a busy machine.
async fn stopped(etcd: &Etcd) {
    let tasks = format!("/proc/{}/task", etcd.child.id());
    // The state follows the name, which stands in parentheses.
    let is_stopped = |stat: String| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'));
    loop {
        let threads = std::fs::read_dir(&tasks)
            .unwrap()
            .map(|task| task.unwrap().path().join("stat"));
        if threads
            .into_iter()
            .all(|stat| std::fs::read_to_string(stat).map_or(true, is_stopped))
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until the store answers again.
async fn healthy(store: &Arc<dyn Store>) {
    let wait = async {
        while store.health().await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("answers again");
}
