//! The dashboard in a real browser: what an operator sees and presses.

use anyhow::Result;
use penstock_tests::{Browser, QuickStart, eventually, get, revisions_by_user};
use serde_json::Value;
use std::time::Duration;

const PLAN: &str = "kind: Rollout
model: demo
canary: {revision: v2}
max_jump: 100
steps:
- {canary: 50%, hold: 10m}
- {canary: 75%, hold: 10m, approval: true}
- {canary: 100%, bake: 10m}
analysis:
  metrics:
  - {name: error_rate, max: 20%}
  - {name: latency_p99, max: 30s}
";
const PHASE: &str = "[data-model=demo] [data-phase]";

#[tokio::test]
async fn an_operator_watches_pauses_and_aborts_in_the_browser() -> Result<()> {
    let data = tempfile::tempdir()?;
    let penstock = QuickStart::start(data.path(), &[]).await?;
    penstock.make_room().await?;
    penstock.apply(PLAN).await?;
    let home = format!("http://127.0.0.1:{}/", penstock.control_plane);
    let browser = Browser::start(data.path(), 1280, 1100).await?;
    browser.open(&home).await?;

    // The rollout, its steps and the fleet.
    browser.wait_for(PHASE, |text| text == "soaking").await?;
    let card = browser.text("[data-model=demo]").await?;
    for part in [
        "demo: v1 → v2",
        "50 %",
        "75 %",
        "approval",
        "100 %",
        "bake 10 min",
        "error_rate",
    ] {
        assert!(card.contains(part), "{part:?} is not in {card}");
    }
    assert_eq!(
        browser
            .run("return document.querySelectorAll('.ladder li').length")
            .await?,
        3
    );
    browser
        .wait_for(".ladder .current", |text| text.contains("50 %"))
        .await?;
    browser.wait_for("#gateways .live", |text| text == "live").await?;
    browser
        .wait_for("#models", |text| {
            text.contains("demo@v1") && text.contains("canary")
        })
        .await?;

    // A little load becomes lines in the charts and evidence in the verdicts.
    for first in [0, 100, 200] {
        let users = revisions_by_user(penstock.gateway, first..first + 100).await?;
        assert!(users.values().any(|revision| revision == "v2"), "{users:?}");
        // A line needs two points, and a point is taken each second.
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    browser
        .wait_for("[data-model=demo] tbody tr:first-child", |text| {
            text.contains("error_rate") && text.contains("pass")
        })
        .await?;
    drawn(&browser).await?;

    // A button asks first; Cancel changes nothing.
    browser.click("[data-action=pause]").await?;
    let asked = browser
        .wait_for("#ask", |text| text.contains("Pause the rollout of demo?"))
        .await?;
    assert!(asked.contains("50 %"), "{asked}");
    browser.click("#ask button[value=no]").await?;
    assert_eq!(
        browser.run("return document.getElementById('ask').open").await?,
        false
    );
    assert_eq!(phase(&home).await?, "soaking");

    browser.click("[data-action=pause]").await?;
    browser.write("#why", "lunch").await?;
    browser.click("#yes").await?;
    browser.wait_for(PHASE, |text| text == "paused: manual").await?;
    assert_eq!(phase(&home).await?, "paused");
    browser.screenshot(&data.path().join("dashboard.png")).await?;

    browser.click("[data-action=abort]").await?;
    browser.write("#why", "enough seen").await?;
    browser.click("#yes").await?;
    browser
        .wait_for(PHASE, |text| text.starts_with("rolled back"))
        .await?;
    let users = revisions_by_user(penstock.gateway, 0..40).await?;
    assert!(users.values().all(|revision| revision == "v1"), "{users:?}");

    // Who did it, what and why.
    for (call, why) in [("PauseRollout", "lunch"), ("AbortRollout", "enough seen")] {
        let rows = browser.wait_for("#audit", |text| text.contains(call)).await?;
        let recorded = rows
            .lines()
            .any(|line| [call, "dashboard", why].iter().all(|part| line.contains(part)));
        assert!(recorded, "{call} by the dashboard for {why:?} is not in\n{rows}");
    }

    // On a telephone the page is as wide as the screen; wide tables scroll by themselves.
    browser.phone().await?;
    let width = browser
        .run("return [innerWidth, document.documentElement.scrollWidth]")
        .await?;
    assert_eq!(width, serde_json::json!([390, 390]));

    let console = browser.console().await?;
    assert!(console.is_empty(), "{console:#?}");
    let requests = browser.requests().await?;
    assert!(
        requests.iter().any(|url| url.ends_with("/api/events")),
        "{requests:#?}"
    );
    let elsewhere: Vec<_> = requests
        .iter()
        .filter(|url| !url.starts_with(&home) && !url.starts_with("data:"))
        .collect();
    assert!(elsewhere.is_empty(), "{elsewhere:#?}");
    Ok(())
}

/// Waits until every chart has a line for both sides.
async fn drawn(browser: &Browser) -> Result<()> {
    let script =
        "return [...document.querySelectorAll('[data-model=demo] svg path')].map(p => p.getAttribute('d'))";
    eventually("lines in the charts", Duration::from_secs(15), || async {
        let paths = browser.run(script).await?;
        let paths = paths.as_array().cloned().unwrap_or_default();
        let lines = paths
            .iter()
            .filter(|path| path.as_str().is_some_and(|path| path.contains('L')))
            .count();
        Ok((lines == paths.len() && lines >= 4).then_some(()))
    })
    .await
}

/// The phase as the control plane tells it.
async fn phase(home: &str) -> Result<Value> {
    let mut state = get(&format!("{home}api/state")).await?.json()?;
    Ok(state["rollouts"][0]["rollout"]["phase"].take())
}
