//! The same system as separate processes over a real etcd.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::Result;
use penstock_tests::{Client, Cluster, chat, connect, demo, eventually, generate, get, revisions_by_user};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// etcd, a control plane, `workers` workers with v1 and v2 of the demo model, `gateways` gateways, a rollout at 0 %.
async fn start(workers: usize, gateways: usize, arguments: &[&str]) -> Result<Cluster> {
    let mut cluster = Cluster::start(None).await?;
    let models = demo(&["v1", "v2"]);
    let mut arguments = arguments.to_vec();
    arguments.extend(models.iter().map(String::as_str));
    for _ in 0..workers {
        cluster.add_worker(&arguments).await?;
    }
    for _ in 0..gateways {
        cluster.add_gateway().await?;
    }
    let create = cluster
        .ctl(&["rollout", "create", "demo", "--stable", "v1", "--canary", "v2"])
        .await?;
    assert!(
        create.status.success(),
        "{}",
        String::from_utf8_lossy(&create.stderr)
    );
    Ok(cluster)
}

async fn listed(cluster: &Cluster, noun: &str) -> Result<serde_json::Value> {
    let list = cluster.ctl(&[noun, "list", "-o", "json"]).await?;
    anyhow::ensure!(list.status.success(), "{}", String::from_utf8_lossy(&list.stderr));
    let mut listed: serde_json::Value = serde_json::from_slice(&list.stdout)?;
    Ok(listed[format!("{noun}s")].take())
}

#[tokio::test]
async fn five_percent_of_users_stay_the_same_on_every_gateway_and_after_its_restart() -> Result<()> {
    let mut cluster = start(3, 2, &[]).await?;
    let set = cluster.ctl(&["rollout", "set", "--canary", "5%"]).await?;
    let said = String::from_utf8_lossy(&set.stdout).into_owned();
    assert!(
        set.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&set.stderr)
    );
    assert!(said.contains("2/2 acknowledged"), "{said}");

    let first = revisions_by_user(cluster.gateways[0].port, 0..1000).await?;
    let canary = first.values().filter(|revision| *revision == "v2").count();
    assert!((29..=71).contains(&canary), "{canary} of 1000 users on v2");
    let second = revisions_by_user(cluster.gateways[1].port, 0..1000).await?;
    assert_eq!(first, second, "both gateways assign alike");

    cluster.restart_gateway(0).await?;
    let restarted = revisions_by_user(cluster.gateways[0].port, 0..1000).await?;
    assert_eq!(first, restarted);
    Ok(())
}

#[tokio::test]
async fn killing_a_worker_under_load_loses_nothing() -> Result<()> {
    // Paced replies, so that streams are alive when the worker dies.
    let mut cluster = start(3, 2, &["--runner", "fake", "--pace", "20ms"]).await?;
    let gateways = [cluster.gateways[0].port, cluster.gateways[1].port];

    let completed = Arc::new(AtomicUsize::new(0));
    let mut load = tokio::task::JoinSet::new();
    for stream in 0..24_usize {
        let completed = completed.clone();
        let mut client = connect(gateways[stream % 2]).await?;
        load.spawn(async move {
            for _ in 0..10 {
                let reply = generate(&mut client, chat("demo", "Hello", 20), &[]).await;
                assert!(reply.unwrap().complete, "a stream ended without an end");
                completed.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    tokio::time::sleep(Duration::from_millis(900)).await;
    cluster.workers[1].process.kill()?;
    while let Some(joined) = load.join_next().await {
        joined?;
    }
    assert_eq!(completed.load(Ordering::Relaxed), 240);

    let mut client = connect(gateways[0]).await?;
    for _ in 0..20 {
        assert!(
            generate(&mut client, chat("demo", "Hello", 2), &[])
                .await?
                .complete
        );
    }
    // Its lease runs out and it is gone from the list; the others are still there.
    eventually(
        "the dead worker leaves the list",
        Duration::from_secs(90),
        || async {
            let workers = listed(&cluster, "worker").await?;
            Ok((workers.as_array().map(Vec::len) == Some(2)).then_some(()))
        },
    )
    .await?;
    Ok(())
}

#[tokio::test]
async fn traffic_flows_while_etcd_and_the_control_plane_are_down_and_change_goes_on_after() -> Result<()> {
    let mut cluster = start(1, 1, &[]).await?;
    let port = cluster.gateways[0].port;
    let mut client: Client = connect(port).await?;

    cluster.etcd.kill()?;
    assert!(
        generate(&mut client, chat("demo", "Hello", 2), &[])
            .await?
            .complete
    );
    let set = cluster
        .ctl(&["rollout", "set", "--canary", "5%", "--timeout", "5s"])
        .await?;
    assert_eq!(
        set.status.code(),
        Some(5),
        "{}",
        String::from_utf8_lossy(&set.stderr)
    );

    cluster.etcd.restart().await?;
    eventually("a change after etcd is back", PATIENCE, || async {
        let set = cluster.ctl(&["rollout", "set", "--canary", "5%"]).await?;
        Ok(set.status.success().then_some(()))
    })
    .await?;

    cluster.control_plane.kill()?;
    assert!(
        generate(&mut client, chat("demo", "Hello", 2), &[])
            .await?
            .complete
    );
    cluster.restart_gateway(0).await?;
    let mut client = connect(port).await?;
    assert!(
        generate(&mut client, chat("demo", "Hello", 2), &[])
            .await?
            .complete,
        "a gateway boots from its snapshot on disk"
    );
    Ok(())
}

#[tokio::test]
async fn a_worker_whose_lease_is_lost_registers_again() -> Result<()> {
    let cluster = start(1, 1, &[]).await?;
    let workers = listed(&cluster, "worker").await?;
    let id = workers[0]["id"].as_str().unwrap().to_owned();
    // The key vanishes under the worker, as it does when its lease runs out.
    let deleted = tokio::process::Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &cluster.etcd.endpoint(), "lease", "list"])
        .output()
        .await?;
    let leases = String::from_utf8_lossy(&deleted.stdout).into_owned();
    for lease in leases.lines().skip(1) {
        tokio::process::Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args([
                "--endpoints",
                &cluster.etcd.endpoint(),
                "lease",
                "revoke",
                lease.trim(),
            ])
            .output()
            .await?;
    }
    eventually("the worker is back under a new lease", PATIENCE, || async {
        let workers = listed(&cluster, "worker").await?;
        Ok((workers[0]["id"] == *id).then_some(()))
    })
    .await?;
    let mut client = connect(cluster.gateways[0].port).await?;
    eventually("requests are served again", PATIENCE, || {
        let mut client = client.clone();
        async move {
            Ok(generate(&mut client, chat("demo", "Hello", 2), &[])
                .await
                .ok()
                .map(drop))
        }
    })
    .await?;
    assert!(
        generate(&mut client, chat("demo", "Hello", 2), &[])
            .await?
            .complete
    );
    Ok(())
}

#[tokio::test]
async fn a_drained_worker_finishes_its_streams_and_leaves() -> Result<()> {
    let mut cluster = start(2, 1, &["--runner", "fake", "--pace", "20ms"]).await?;
    let port = cluster.gateways[0].port;
    let mut load = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let mut client = connect(port).await?;
        load.spawn(async move { generate(&mut client, chat("demo", "Hello", 60), &[]).await });
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    cluster.workers[0].process.terminate()?;
    while let Some(reply) = load.join_next().await {
        assert!(reply??.complete, "a drain cuts no stream");
    }
    let status = cluster.workers[0].process.ended(PATIENCE).await?;
    assert_eq!(status.code(), Some(0), "{}", cluster.workers[0].process.output());
    let metrics = get(&format!("http://127.0.0.1:{}/metrics", cluster.gateways[0].ops)).await?;
    assert!(
        metrics.body.contains("gen_ai_server_time_to_first_token"),
        "{}",
        metrics.body
    );
    Ok(())
}
