//! What goes down does not take serving down: control plane, store, both, and a gateway that restarts meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use penstock_tests::{Cluster, chat, connect, demo, eventually, generate, revisions_by_user};
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(40);
/// Users whose revisions are compared.
const USERS: std::ops::Range<u32> = 0..60;

/// Requests through one gateway, one after the other, until it is told to end.
struct Traffic {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Traffic {
    async fn start(port: u16) -> Result<Self> {
        let mut client = connect(port).await?;
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let failed: Arc<Mutex<Vec<String>>> = Arc::default();
        let task = tokio::spawn({
            let (stop, served, failed) = (stop.clone(), served.clone(), failed.clone());
            async move {
                while !stop.load(Ordering::Relaxed) {
                    match generate(&mut client, chat("demo", "Hello", 4), &[]).await {
                        Ok(reply) if reply.complete => drop(served.fetch_add(1, Ordering::Relaxed)),
                        Ok(_) => failed.lock().unwrap().push("a reply without its end".into()),
                        Err(status) => failed.lock().unwrap().push(status.to_string()),
                    }
                }
            }
        });
        Ok(Self {
            stop,
            served,
            failed,
            task,
        })
    }

    async fn end(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        let failed = std::mem::take(&mut *self.failed.lock().unwrap());
        (self.served.load(Ordering::Relaxed), failed)
    }
}

async fn said(cluster: &Cluster, arguments: &[&str]) -> Result<(i32, String)> {
    let output = cluster.ctl(arguments).await?;
    let said = [output.stdout, output.stderr].concat();
    Ok((
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&said).into_owned(),
    ))
}

async fn done(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let (code, said) = said(cluster, arguments).await?;
    anyhow::ensure!(code == 0, "{arguments:?}: {code}: {said}");
    Ok(said)
}

/// Two gateways, two revisions of a worker that makes tokens up, a fifth of the users on v2.
async fn start() -> Result<Cluster> {
    let mut cluster = Cluster::start(None).await?;
    let models = demo(&["v1", "v2"]);
    let mut arguments = vec!["--runner", "fake", "--pace", "2ms"];
    arguments.extend(models.iter().map(String::as_str));
    cluster.add_worker(&arguments).await?;
    cluster.add_gateway().await?;
    cluster.add_gateway().await?;
    done(
        &cluster,
        &["rollout", "create", "demo", "--stable", "v1", "--canary", "v2"],
    )
    .await?;
    done(&cluster, &["rollout", "set", "demo", "--canary", "20%", "-y"]).await?;
    Ok(cluster)
}

async fn revisions(cluster: &Cluster, gateway: usize) -> Result<BTreeMap<u32, String>> {
    revisions_by_user(cluster.gateways[gateway].port, USERS).await
}

#[tokio::test]
async fn what_goes_down_does_not_take_serving_down() -> Result<()> {
    let mut cluster = start().await?;
    let traffic = Traffic::start(cluster.gateways[1].port).await?;
    let expected = revisions(&cluster, 0).await?;
    assert!(expected.values().any(|revision| revision == "v2"));

    // The control plane: gateways go by the last snapshot.
    cluster.control_plane.kill()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(revisions(&cluster, 0).await?, expected);
    assert_eq!(revisions(&cluster, 1).await?, expected);
    cluster.restart_control_plane().await?;
    done(&cluster, &["rollout", "get", "demo"]).await?;

    // The store: reads come from memory, writes say what is wrong, nothing moves.
    cluster.etcd.kill()?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let set = [
        "rollout",
        "set",
        "demo",
        "--canary",
        "30%",
        "-y",
        "--timeout",
        "8s",
    ];
    let (code, told) = said(&cluster, &set).await?;
    assert_eq!(code, 5, "{told}");
    assert!(told.contains("etcd") || told.contains("store"), "{told}");
    assert!(done(&cluster, &["rollout", "get", "demo"]).await?.contains("20%"));
    assert_eq!(revisions(&cluster, 0).await?, expected);

    // Both, and a gateway that restarts: it begins with its snapshot on disk.
    cluster.control_plane.kill()?;
    cluster.restart_gateway(0).await?;
    assert_eq!(revisions(&cluster, 0).await?, expected);

    // An override needs nothing but the gateway, and ends by itself.
    let ops = format!("127.0.0.1:{}", cluster.gateways[0].ops);
    let direct = ["gateway", "override", "--gateway", &ops, "--model", "demo"];
    let to_v1 = [
        "--to",
        "v1",
        "--ttl",
        "8s",
        "--reason",
        "outage drill",
        "--actor",
        "ada",
    ];
    done(&cluster, &[&direct[..], &to_v1].concat()).await?;
    let all_v1 = revisions(&cluster, 0).await?;
    assert!(all_v1.values().all(|revision| revision == "v1"), "{all_v1:?}");
    assert_eq!(
        revisions(&cluster, 1).await?,
        expected,
        "the other gateway is left alone"
    );
    eventually("the end of the override", PATIENCE, || async {
        Ok((revisions(&cluster, 0).await? == expected).then_some(()))
    })
    .await?;

    // All is back: changes go through, and the override is on record.
    cluster.etcd.restart().await?;
    cluster.restart_control_plane().await?;
    eventually("a change after all is back", PATIENCE, || async {
        let (code, _) = said(&cluster, &["rollout", "set", "demo", "--canary", "25%", "-y"]).await?;
        Ok((code == 0).then_some(()))
    })
    .await?;
    eventually("the override in the audit log", PATIENCE, || async {
        let audit = done(&cluster, &["audit", "-o", "json"]).await?;
        Ok((audit.contains("outage drill") && audit.contains("ada")).then_some(()))
    })
    .await?;
    let (served, failed) = traffic.end().await;
    assert_eq!(failed, Vec::<String>::new(), "of {} requests", served);
    assert!(served > 100, "{served} requests");
    Ok(())
}
