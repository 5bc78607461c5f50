//! Plans in files.

use super::*;
use penstock_proto::v1::Finding;
use std::path::PathBuf;

const PLAN: &str = "kind: Rollout\nmodel: demo\ncanary: {revision: v2}\n";

fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plan.yaml");
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

async fn with_file(fake: &Fake, text: &str, words: &[&str]) -> (Ran, String) {
    let (_dir, path) = file(text);
    let path = path.to_str().unwrap().to_owned();
    let ran = ctl(fake, &[words, &["-f", &path]].concat()).await;
    (ran, path)
}

fn finding(severity: &str) -> Finding {
    Finding {
        severity: severity.into(),
        path: "match[2].priority".into(),
        line: 12,
        code: "duplicate-priority".into(),
        message: "priority 3 is given twice".into(),
    }
}

#[tokio::test]
async fn apply_sends_the_file_waits_and_says_what_came_of_it() {
    let fake = Fake::start().await;
    let words = ["rollout", "apply", "--reason", "fewer repeats", "--actor", "ada"];
    let (ran, _) = with_file(&fake, PLAN, &words).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(
        ran.out
            .starts_with("updated: demo: v1 → v2 at 1%, paused; epoch 8; 2/2 acknowledged in "),
        "{}",
        ran.out
    );
    let sent = fake.state().last_apply.clone().unwrap();
    assert_eq!(
        (sent.manifest.as_str(), sent.reason.as_str(), sent.actor.as_str()),
        (PLAN, "fewer repeats", "ada")
    );
}

#[tokio::test]
async fn findings_read_as_a_compilers_and_an_error_writes_nothing() {
    let fake = Fake::start().await;
    fake.state().findings = vec![finding("error"), finding("warning")];
    let (ran, path) = with_file(&fake, PLAN, &["rollout", "apply"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    let line = format!(
        "{path}:12: error[duplicate-priority]: match[2].priority: priority 3 is given twice\n{path}:12: warning["
    );
    assert!(ran.err.starts_with(&line), "{}", ran.err);
    assert!(
        ran.err.contains("has an error; nothing is written"),
        "{}",
        ran.err
    );
    fake.state().findings = vec![finding("warning")];
    let (applied, path) = with_file(&fake, PLAN, &["rollout", "apply"]).await;
    assert_eq!(applied.code, 0);
    assert!(
        applied.err.starts_with(&format!("{path}:12: warning")),
        "{}",
        applied.err
    );
    assert!(fake.state().last_apply.is_some());
}

#[tokio::test]
async fn diff_compares_meanings_and_its_exit_code_tells() {
    let fake = Fake::start().await;
    fake.state().rollout.manifest = PLAN.to_owned();
    let same = "# the same\nmodel: demo\nkind: Rollout\ncanary:\n  revision: v2\n";
    let (ran, _) = with_file(&fake, same, &["rollout", "diff"]).await;
    assert_eq!(
        (ran.code, ran.out.as_str(), ran.err.as_str()),
        (0, "", ""),
        "{}",
        ran.err
    );
    let other = PLAN.replace("v2", "v3");
    let (ran, path) = with_file(&fake, &other, &["rollout", "diff"]).await;
    assert_eq!((ran.code, ran.err.as_str()), (1, ""));
    assert!(
        ran.out.starts_with(&format!("--- in force\n+++ {path}\n")),
        "{}",
        ran.out
    );
    assert!(
        ran.out.contains("\n-  revision: v2\n+  revision: v3\n"),
        "{}",
        ran.out
    );
    let (json, _) = with_file(&fake, &other, &["rollout", "diff", "-o", "json"]).await;
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((json.code, &value["differs"]), (1, &true.into()));
    assert!(fake.state().last_apply.is_none());
}

#[tokio::test]
async fn a_dry_run_shows_the_difference_and_writes_nothing() {
    let fake = Fake::start().await;
    fake.state().rollout.manifest = PLAN.replace("v2", "v1");
    let (ran, _) = with_file(&fake, PLAN, &["rollout", "apply", "--dry-run"]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.out.contains("+  revision: v2\n") && ran.out.ends_with("would be updated; nothing is written\n"),
        "{}",
        ran.out
    );
    assert!(fake.state().last_apply.is_none());
}

#[tokio::test]
async fn what_is_queued_or_unchanged_is_not_waited_for() {
    for (outcome, says) in [
        ("unchanged", "unchanged: the manifest says what is in force\n"),
        ("queued", "queued: demo: v1 → v2 at 1%"),
    ] {
        let fake = Fake::start().await;
        fake.state().outcome = outcome;
        fake.state().refuses = true;
        let (ran, _) = with_file(&fake, PLAN, &["rollout", "apply"]).await;
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert!(ran.out.starts_with(says), "{}", ran.out);
    }
}

#[tokio::test]
async fn a_lost_race_shows_the_manifest_that_is_there_and_the_one_asked_for() {
    let fake = Fake::start().await;
    fake.state().rollout.manifest = PLAN.replace("v2", "v9");
    let (ran, _) = with_file(&fake, PLAN, &["rollout", "apply", "--expect-revision", "6"]).await;
    assert_eq!(ran.code, 4);
    for part in [
        "SEEN AT 6",
        "ASKED: apply",
        "-  revision: v9",
        "+  revision: v2",
        "revision 7 by now, not at 6",
    ] {
        assert!(ran.err.contains(part), "{part} in {}", ran.err);
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_read_is_a_usage_error_that_names_it() {
    let fake = Fake::start().await;
    let ran = ctl(&fake, &["rollout", "apply", "-f", "/nowhere/plan.yaml"]).await;
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.contains("cannot read /nowhere/plan.yaml: No such file"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn lint_asks_nobody() {
    let lint = async |text: &str| {
        let (_dir, path) = file(text);
        let path = path.to_str().unwrap().to_owned();
        let ran = answered("http://127.0.0.1:1", None, &["rollout", "lint", "-f", &path]).await;
        (ran, path)
    };
    let (good, path) = lint(PLAN).await;
    assert_eq!(good.code, 0, "{} {}", good.out, good.err);
    assert_eq!(good.out, format!("{path}: nothing to find fault with\n"));
    let (bad, path) = lint("kind: Rollout\nmodel: demo\n").await;
    assert_eq!(bad.code, 2);
    assert!(
        bad.out.starts_with(&path) && bad.out.contains("error[") && bad.out.contains("canary"),
        "{}",
        bad.out
    );
}

#[tokio::test]
async fn a_plan_with_a_rate_is_simulated_without_asking_anybody() {
    let steps = "steps: [{canary: 5%, hold: 1h}, {canary: 100%, bake: 1h}]\n";
    let (_dir, path) = file(&format!("{PLAN}{steps}"));
    let path = path.to_str().unwrap().to_owned();
    let run = async |more: &[&str]| {
        let mut words = vec!["rollout", "simulate", "-f", &path, "--rate", "50/s"];
        words.extend(more);
        answered("http://127.0.0.1:1", None, &words).await
    };
    let good = run(&["-o", "json"]).await;
    assert_eq!(good.code, 0, "{}", good.err);
    let told: serde_json::Value = serde_json::from_str(&good.out).unwrap();
    assert_eq!(told["outcome"], "succeeded");
    assert!(told["false_abort"].as_f64().unwrap() <= told["alpha"].as_f64().unwrap());
    let table = run(&[]).await;
    for part in ["demo at 50.000 requests/s", "soaking", "succeeded"] {
        assert!(table.out.contains(part), "{part} in {}", table.out);
    }
}
