//! Operators who act at the same time: one change wins, the other is told what it lost against; an abort always wins.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{process::Output, time::Duration};

use anyhow::Result;
use penstock_tests::{Cluster, demo, eventually};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(40);

async fn start() -> Result<Cluster> {
    let mut cluster = Cluster::start(None).await?;
    let models = demo(&["v1", "v2"]);
    let mut arguments = vec!["--runner", "fake"];
    arguments.extend(models.iter().map(String::as_str));
    cluster.add_worker(&arguments).await?;
    cluster.add_gateway().await?;
    Ok(cluster)
}

async fn json(cluster: &Cluster, arguments: &[&str]) -> Result<Value> {
    let output = cluster.ctl(arguments).await?;
    anyhow::ensure!(output.status.success(), "{arguments:?}: {}", told(&output));
    Ok(serde_json::from_slice(&output.stdout)?)
}

async fn create(cluster: &Cluster) -> Result<()> {
    let words = ["rollout", "create", "demo", "--stable", "v1", "--canary", "v2"];
    eventually("a rollout", PATIENCE, || async {
        let output = cluster.ctl(&words).await?;
        Ok(output.status.success().then_some(()))
    })
    .await
}

fn told(output: &Output) -> String {
    let said = [output.stdout.clone(), output.stderr.clone()].concat();
    String::from_utf8_lossy(&said).into_owned()
}

#[tokio::test]
async fn of_two_operators_one_wins_and_the_other_sees_the_difference() -> Result<()> {
    let cluster = start().await?;
    create(&cluster).await?;
    for round in 0..5_u32 {
        let now = json(&cluster, &["rollout", "get", "demo", "-o", "json"]).await?;
        let seen = now["store_revision"].as_u64().unwrap().to_string();
        let (low, high) = (format!("{}%", 2 * round + 1), format!("{}%", 2 * round + 2));
        let set = async |share: &str| {
            let words = [
                "rollout",
                "set",
                "demo",
                "--canary",
                share,
                "-y",
                "--expect-revision",
                &seen,
            ];
            cluster.ctl(&words).await
        };
        let (first, second) = tokio::join!(set(&low), set(&high));
        let (first, second) = (first?, second?);
        let mut codes = [first.status.code(), second.status.code()];
        codes.sort_unstable();
        assert_eq!(codes, [Some(0), Some(4)], "{}\n{}", told(&first), told(&second));
        let (lost, won) = if first.status.success() {
            (told(&second), low)
        } else {
            (told(&first), high)
        };
        // What was seen, what is there now, what was asked for.
        for part in ["SEEN", "NOW", "ASKED", &won] {
            assert!(lost.contains(part), "{part} in {lost}");
        }
        let now = json(&cluster, &["rollout", "get", "demo", "-o", "json"]).await?;
        assert_eq!(now["share"], won.as_str());
    }
    Ok(())
}

#[tokio::test]
async fn an_abort_that_races_a_change_always_ends_aborted() -> Result<()> {
    let cluster = start().await?;
    let (mut before, mut after) = (0, 0);
    for round in 0..12_u64 {
        create(&cluster).await?;
        let set = ["rollout", "set", "demo", "--canary", "5%", "-y", "--no-wait"];
        let abort = ["rollout", "abort", "demo", "--reason", "race"];
        let delayed = async {
            // Now the one comes first, now the other.
            tokio::time::sleep(Duration::from_millis(round % 6 * 4)).await;
            cluster.ctl(&abort).await
        };
        let (set, abort) = tokio::join!(cluster.ctl(&set), delayed);
        let (set, abort) = (set?, abort?);
        assert!(abort.status.success(), "{}", told(&abort));
        match set.status.success() {
            true => before += 1,
            false => after += 1,
        }
        let now = json(&cluster, &["rollout", "get", "demo", "-o", "json"]).await?;
        assert!(
            ["rolling_back", "rolled_back"].contains(&now["phase"].as_str().unwrap()),
            "round {round}: {now}"
        );
        let route = json(&cluster, &["route", "test", "--user", "u1", "-o", "json"]).await?;
        assert_eq!(route["revision"], "v1", "{route}");
    }
    assert!(
        before + after == 12,
        "{before} changes came first, {after} too late"
    );
    Ok(())
}
