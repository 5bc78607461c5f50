//! A rollout that is judged by a number of the operator's own Prometheus.

use anyhow::{Context as _, Result, ensure};
use penstock_tests::{Prometheus, QuickStart, eventually, get, revisions_by_user};
use serde_json::Value;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(15);

#[tokio::test]
async fn a_query_above_its_limit_rolls_back_and_one_without_data_does_not() -> Result<()> {
    let data = tempfile::tempdir()?;
    let prometheus = Prometheus::start(data.path(), "heat").await?;
    let penstock = QuickStart::start(data.path(), &[]).await?;
    penstock.make_room().await?;
    let url = prometheus.url();
    penstock
        .apply(&format!(
            "kind: Rollout
model: demo
canary: {{revision: v2}}
max_jump: 100
steps:
- {{canary: 50%, hold: 10m}}
- {{canary: 100%, bake: 10m}}
analysis:
  metrics:
  - {{name: 'prometheus:heat', max: 90, prometheus: {{url: '{url}', query: heat, every: 1s, failures: 2}}}}
"
        ))
        .await?;

    // Several questions without an answer: nothing is concluded from that, and nothing is undone.
    let asked = judged(&penstock, "insufficient", |metric| {
        metric["canary"][0].as_u64() >= Some(3)
    });
    let metric = asked.await?;
    assert_eq!(metric["would_change"], "the query gives no number", "{metric}");
    assert_eq!(rollout(&penstock).await?["rollout"]["phase"], "soaking");

    prometheus.set(50.0);
    let metric = judged(&penstock, "pass", |metric| metric["rates"][0] == 50.0).await?;
    assert_eq!(metric["rule"], "at most 90", "{metric}");
    let users = revisions_by_user(penstock.gateway, 0..40).await?;
    assert!(users.values().any(|revision| revision == "v2"), "{users:?}");

    prometheus.set(95.0);
    let status = eventually("the rollback", PATIENCE, || async {
        let status = rollout(&penstock).await?;
        let phase = &status["rollout"]["phase"];
        ensure!(phase == "rolled back", "the rollout is {phase}");
        Ok(Some(status))
    })
    .await?;
    let cause = status["rollout"]["cause"].as_str().unwrap_or_default();
    assert!(
        cause.contains("prometheus:heat") && cause.contains("at most 90"),
        "{cause:?}"
    );
    let metric = &status["metrics"][0];
    assert_eq!(metric["verdict"], "fail", "{metric}");
    assert!(
        metric["canary"][1].as_u64() >= Some(2),
        "one value alone failed it: {metric}"
    );
    let users = revisions_by_user(penstock.gateway, 0..40).await?;
    assert!(users.values().all(|revision| revision == "v1"), "{users:?}");
    Ok(())
}

/// The one metric, as soon as it has `verdict` and satisfies `wanted`.
async fn judged(penstock: &QuickStart, verdict: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    eventually(&format!("the verdict {verdict}"), PATIENCE, || async {
        let status = rollout(penstock).await?;
        let metric = status["metrics"].get(0).context("no metric is judged")?;
        ensure!(metric["verdict"] == verdict && wanted(metric), "{metric}");
        Ok(Some(metric.clone()))
    })
    .await
}

/// Where the one rollout stands.
async fn rollout(penstock: &QuickStart) -> Result<Value> {
    let url = format!("http://127.0.0.1:{}/api/state", penstock.control_plane);
    let mut state = get(&url).await?.json()?;
    Ok(state["rollouts"][0].take())
}
