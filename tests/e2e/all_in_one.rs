//! The quick start: one process, embedded store, the bundled demo model.

use anyhow::Result;
use penstock_tests::{QuickStart, eventually, free_port_pairs, get, post_json, revisions_by_user};
use serde_json::json;
use std::{fs, time::Duration};

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn it_answers_and_splits_and_remembers() -> Result<()> {
    let data = tempfile::tempdir()?;
    let mut penstock = QuickStart::start(data.path(), &[]).await?;

    for part in ["curl ", "ctl generate", "ctl rollout set --canary 5%"] {
        let shown = || async { Ok(penstock.process.output().contains(part).then_some(())) };
        eventually(&format!("a banner with {part:?}"), PATIENCE, shown).await?;
    }

    let url = format!("http://127.0.0.1:{}/v1/chat/completions", penstock.gateway);
    let body = json!({
        "model": "demo",
        "messages": [{"role": "user", "content": "地球的周长是多少?"}],
        "temperature": 0,
    });
    let reply = post_json(&url, &body).await?;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let text = reply.json()?["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(text.contains("40,075") || text.contains("40075"), "{text}");
    assert_eq!(reply.header("x-model-version"), Some("v1"));

    let set = penstock.ctl(&["rollout", "set", "--canary", "5%"]).await?;
    let said = String::from_utf8_lossy(&set.stdout).into_owned();
    assert!(
        set.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&set.stderr)
    );
    assert!(said.contains("5%") && said.contains("1/1 acknowledged"), "{said}");

    let before = revisions_by_user(penstock.gateway, 0..1000).await?;
    let canary = before.values().filter(|revision| *revision == "v2").count();
    assert!((29..=71).contains(&canary), "{canary} of 1000 users on v2 at 5 %");

    // Ctrl-C drains and exits 0; a new start knows the rollout.
    penstock.process.interrupt()?;
    assert_eq!(
        penstock.process.ended(PATIENCE).await?.code(),
        Some(0),
        "{}",
        penstock.process.output()
    );
    let penstock = QuickStart::start(data.path(), &[]).await?;
    let after = revisions_by_user(penstock.gateway, 0..1000).await?;
    assert_eq!(before, after, "the same users are on the canary after a restart");

    let set = penstock.ctl(&["rollout", "set", "--canary", "20%", "-y"]).await?;
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
    let wider = revisions_by_user(penstock.gateway, 0..1000).await?;
    let moved_back = before
        .iter()
        .filter(|(user, revision)| *revision == "v2" && wider[user] != "v2")
        .count();
    assert_eq!(moved_back, 0, "raising the share moves nobody back");
    let canary = wider.values().filter(|revision| *revision == "v2").count();
    assert!(
        (162..=238).contains(&canary),
        "{canary} of 1000 users on v2 at 20 %"
    );
    Ok(())
}

#[tokio::test]
async fn promote_and_abort_end_where_they_say() -> Result<()> {
    let data = tempfile::tempdir()?;
    let penstock = QuickStart::start(data.path(), &[]).await?;

    let set = penstock.ctl(&["rollout", "set", "--canary", "50%", "-y"]).await?;
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
    let abort = penstock.ctl(&["rollout", "abort", "--reason", "test"]).await?;
    assert!(
        abort.status.success(),
        "{}",
        String::from_utf8_lossy(&abort.stderr)
    );
    let users = revisions_by_user(penstock.gateway, 0..50).await?;
    assert!(users.values().all(|revision| revision == "v1"), "{users:?}");

    let set = penstock.ctl(&["rollout", "set", "--canary", "5%"]).await?;
    assert_eq!(set.status.code(), Some(4), "a rolled-back rollout takes no share");

    let create = penstock
        .ctl(&["rollout", "create", "demo", "--canary", "v2"])
        .await?;
    assert!(
        create.status.success(),
        "{}",
        String::from_utf8_lossy(&create.stderr)
    );
    let promote = penstock.ctl(&["rollout", "promote", "-y"]).await?;
    assert!(
        promote.status.success(),
        "{}",
        String::from_utf8_lossy(&promote.stderr)
    );
    let users = revisions_by_user(penstock.gateway, 0..50).await?;
    assert!(users.values().all(|revision| revision == "v2"), "{users:?}");

    let missing = penstock.ctl(&["rollout", "get", "nothing"]).await?;
    assert_eq!(
        missing.status.code(),
        Some(3),
        "{}",
        String::from_utf8_lossy(&missing.stderr)
    );
    Ok(())
}

#[tokio::test]
async fn each_start_that_cannot_work_says_why_in_one_line() -> Result<()> {
    let data = tempfile::tempdir()?;
    let running = QuickStart::start(data.path(), &[]).await?;

    // The data directory is in use.
    let mut second = QuickStart::spawn(data.path(), &[])?;
    let status = second.process.ended(PATIENCE).await?;
    let said = second.process.output();
    assert!(!status.success());
    assert!(
        said.contains(&data.path().display().to_string()) && said.contains("another"),
        "{said}"
    );

    // The port is in use.
    let other = tempfile::tempdir()?;
    let [free, free_worker] = free_port_pairs()?;
    let mut busy = QuickStart::spawn_on([running.gateway, free, free_worker], other.path(), &[])?;
    assert!(!busy.process.ended(PATIENCE).await?.success());
    let said = busy.process.output();
    assert!(
        said.contains(&format!(":{}", running.gateway)) && said.contains("in use"),
        "{said}"
    );

    // The checkpoint is not one.
    let broken = tempfile::tempdir()?;
    fs::write(broken.path().join("tokenizer.json"), "{")?;
    let model = format!("mine@a={}", broken.path().display());
    let another = tempfile::tempdir()?;
    let mut unreadable = QuickStart::spawn(another.path(), &["--no-demo", "--model", &model])?;
    assert!(!unreadable.process.ended(PATIENCE).await?.success());
    let said = unreadable.process.output();
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    assert!(
        errors[0].contains("tokenizer.json") && errors[0].contains("mine@a"),
        "{said}"
    );

    let health = get(&format!("http://127.0.0.1:{}/healthz", running.gateway)).await?;
    assert_eq!(health.status, 200, "the first instance is untouched");
    Ok(())
}
