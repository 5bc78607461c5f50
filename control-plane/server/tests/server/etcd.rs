//! The control plane over a real etcd.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_client::AdminError;
use penstock_proto::v1::Phase;
use penstock_store::etcd::EtcdStore;
use tempfile::TempDir;

use crate::harness::{PATIENCE, Running};

/// Longer than a leader's lease.
const OUTAGE: Duration = Duration::from_secs(7);

/// One etcd member, killed when it is dropped.
struct Etcd {
    child: Child,
    directory: TempDir,
    client: String,
    peer: String,
}

impl Etcd {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let free = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] = free.map(|port| format!("http://{}", port.local_addr().unwrap()));
        let child = spawn(directory.path(), &client, &peer);
        Self {
            child,
            directory,
            client,
            peer,
        }
    }

    async fn store(&self) -> EtcdStore {
        let until = Instant::now() + PATIENCE;
        loop {
            match EtcdStore::connect(&[&self.client]).await {
                Ok(store) => return store,
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = spawn(self.directory.path(), &self.client, &self.peer);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(directory: &Path, client: &str, peer: &str) -> Child {
    let log = std::fs::File::create(directory.join("log")).unwrap();
    Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.join("data"))
        .args(["--listen-client-urls", client, "--advertise-client-urls", client])
        .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
        .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("etcd starts; on Debian it comes with `apt-get install etcd-server`")
}

#[tokio::test]
async fn a_killed_etcd_stops_change_but_no_gateway_and_change_goes_on_afterwards() {
    let mut etcd = Etcd::start().await;
    let running = Running::fresh(Arc::new(etcd.store().await)).await;
    let mut gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.set(50_000, None).await.unwrap();
    gateway.has_share(50_000).await;
    running.phase(Phase::Paused).await;
    let epoch = running.admin.get_snapshot().await.unwrap().epoch;

    etcd.kill();
    match running.set(60_000, None).await {
        Err(AdminError::Unavailable { .. }) => {}
        other => panic!("{other:?}"),
    }
    // Leadership runs out with its lease; what is in memory is told all the same.
    tokio::time::sleep(OUTAGE).await;
    assert!(gateway.view.borrow().connected);
    assert_eq!(running.status().await.live_gateways, 1);
    let mut late = running.gateway("g2");
    late.has_share(50_000).await;

    etcd.restart();
    running
        .until("it leads again", async |running| {
            running.set(60_000, None).await.is_ok()
        })
        .await;
    gateway.has_share(60_000).await;
    late.has_share(60_000).await;
    assert!(running.admin.get_snapshot().await.unwrap().epoch > epoch);
}

#[tokio::test]
async fn a_restart_on_etcd_keeps_epoch_and_rollout() {
    let etcd = Etcd::start().await;
    let running = Running::fresh(Arc::new(etcd.store().await)).await;
    let mut gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.set(50_000, None).await.unwrap();
    gateway.has_share(50_000).await;
    let before = running.admin.get_snapshot().await.unwrap();
    let running = running.restart().await;
    assert_eq!(running.admin.get_snapshot().await.unwrap(), before);
    assert_eq!(running.status().await.rollout.unwrap().canary_ppm, 50_000);
}
