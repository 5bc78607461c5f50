//! Canaries judged under real load: a regressed one undoes itself, a good one becomes stable, an equal one is left
//! alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use penstock_proto::v1::{self, generate_request::Input};
use penstock_tests::{QuickStart, connect, eventually, generate, repository};
use serde_json::Value;
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(60);
/// Streams at once.
const STREAMS: usize = 8;

/// Chats of many prompts at temperature 0.7, each by a user of its own, until it is told to end.
struct Load {
    stop: Arc<AtomicBool>,
    served: Arc<Mutex<std::collections::BTreeMap<String, u64>>>,
    failed: Arc<Mutex<Vec<String>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    async fn start(port: u16) -> Result<Self> {
        let prompts = Arc::new(prompts()?);
        let load = Self {
            stop: Arc::default(),
            served: Arc::default(),
            failed: Arc::default(),
            tasks: Vec::new(),
        };
        let mut tasks = Vec::new();
        for stream in 0..STREAMS {
            let (prompts, stop) = (prompts.clone(), load.stop.clone());
            let (served, failed) = (load.served.clone(), load.failed.clone());
            let mut client = connect(port).await?;
            tasks.push(tokio::spawn(async move {
                for round in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    // Another user and another prompt each time, spread over all of them.
                    let number = round * STREAMS as u64 + stream as u64;
                    let request = chat(&prompts[(number as usize * 7919) % prompts.len()], number);
                    let user = format!("user-{number}");
                    match generate(&mut client, request, &[("x-user-id", &user)]).await {
                        Ok(reply) => *served.lock().unwrap().entry(reply.revision).or_default() += 1,
                        Err(status) => failed.lock().unwrap().push(format!("{status:?}")),
                    }
                }
            }));
        }
        Ok(Self { tasks, ..load })
    }

    fn served(&self, revision: &str) -> u64 {
        self.served
            .lock()
            .unwrap()
            .get(revision)
            .copied()
            .unwrap_or_default()
    }

    async fn end(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        std::mem::take(&mut *self.failed.lock().unwrap())
    }
}

fn chat(question: &str, seed: u64) -> v1::GenerateRequest {
    let message = v1::ChatMessage {
        role: "user".into(),
        content: question.into(),
    };
    v1::GenerateRequest {
        model: "demo".into(),
        input: Some(Input::Chat(v1::Chat {
            messages: vec![message],
        })),
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.7),
            max_tokens: Some(32),
            seed: Some(seed),
            ..v1::SamplingParams::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

/// Every question of the demo's corpus.
fn prompts() -> Result<Vec<String>> {
    let mut prompts = Vec::new();
    for entry in fs::read_dir(repository().join("deploy/models/demo/corpus"))? {
        let text = fs::read_to_string(entry?.path())?;
        let questions = text
            .lines()
            .filter_map(|line| line.strip_prefix("? ").or_else(|| line.strip_prefix("~ ")));
        prompts.extend(questions.map(str::to_owned));
    }
    anyhow::ensure!(prompts.len() > 300, "the corpus has {} questions", prompts.len());
    Ok(prompts)
}

fn plan(directory: &Path, canary: &str, steps: &str, alpha: f64) -> Result<String> {
    let text = format!(
        "kind: Rollout\nmodel: demo\ncanary: {{revision: {canary}}}\nsteps:\n{steps}\nanalysis:\n  alpha: {alpha}\n  \
         metrics:\n  - {{name: error_rate, max: 1%, max_ratio: 2}}\n  - {{name: latency_p99, max: 30s}}\n  \
         - {{name: repetition, max_ratio: 1.5}}\n"
    );
    let path = directory.join(format!("{canary}.yaml"));
    fs::write(&path, text)?;
    Ok(path.display().to_string())
}

async fn ctl(penstock: &QuickStart, arguments: &[&str]) -> Result<String> {
    let output = penstock.ctl(arguments).await?;
    let (said, told) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    anyhow::ensure!(
        output.status.success(),
        "{arguments:?}: {}\n{said}{told}",
        output.status
    );
    Ok(said.into_owned())
}

/// The demo's rollout as `ctl rollout get` shows it.
async fn rollout(penstock: &QuickStart) -> Result<Value> {
    Ok(serde_json::from_str(
        &ctl(penstock, &["rollout", "get", "demo", "-o", "json"]).await?,
    )?)
}

async fn until(penstock: &QuickStart, phase: &str) -> Result<Value> {
    let reached = || async {
        let rollout = rollout(penstock).await?;
        Ok((rollout["phase"] == *phase).then_some(rollout))
    };
    eventually(&format!("phase {phase}"), PATIENCE, reached).await
}

async fn started(data: &Path) -> Result<QuickStart> {
    let penstock = QuickStart::start(data, &[]).await?;
    ctl(&penstock, &["rollout", "abort", "demo", "--reason", "make room"]).await?;
    Ok(penstock)
}

async fn publish(penstock: &QuickStart, revision: &str, checkpoint: &str) -> Result<()> {
    let path = repository().join("deploy/models/demo").join(checkpoint);
    let path = path.canonicalize()?.display().to_string();
    ctl(penstock, &["model", "publish", "demo", revision, "--from", &path])
        .await
        .map(drop)
}

#[tokio::test]
async fn a_regressed_canary_published_under_traffic_is_rolled_back_by_itself_and_nobody_notices() -> Result<()>
{
    let data = tempfile::tempdir()?;
    let penstock = started(data.path()).await?;
    let load = Load::start(penstock.gateway).await?;
    publish(&penstock, "v3", "v3").await?;
    let steps =
        "- {canary: 10%, hold: 1s, min_samples: 5}\n- {canary: 20%, hold: 10m}\n- {canary: 100%, bake: 10m}";
    let plan = plan(data.path(), "v3", steps, 0.01)?;
    ctl(&penstock, &["rollout", "apply", "-f", &plan, "--no-wait"]).await?;
    let rollout = until(&penstock, "rolled_back").await?;
    let cause = rollout["cause"].as_str().context("a cause")?.to_owned();
    assert!(
        cause.contains("repetition") && cause.contains("1.5 times stable's"),
        "{cause}"
    );
    let explained = ctl(&penstock, &["rollout", "explain", "demo"]).await?;
    assert!(explained.contains("repetition: fail"), "{explained}");
    // Nothing goes to the canary any more.
    let before = load.served("v3");
    assert!(before > 0, "the canary was tried");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = load.served("v3");
    assert!(after - before <= STREAMS as u64, "{before} then {after}");
    assert_eq!(load.end().await, Vec::<String>::new(), "no request failed");
    Ok(())
}

#[tokio::test]
async fn a_good_canary_climbs_to_the_top_under_the_same_rules() -> Result<()> {
    let data = tempfile::tempdir()?;
    let penstock = started(data.path()).await?;
    let load = Load::start(penstock.gateway).await?;
    let steps = "- {canary: 10%, hold: 1s, min_samples: 20}\n- {canary: 50%, hold: 1s, min_samples: 50}\n\
                 - {canary: 100%, bake: 1s, min_samples: 50}";
    let plan = plan(data.path(), "v2", steps, 0.01)?;
    ctl(&penstock, &["rollout", "apply", "-f", &plan, "--no-wait"]).await?;
    until(&penstock, "succeeded").await?;
    let before = load.served("v1");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = load.served("v1");
    assert!(
        after - before <= STREAMS as u64,
        "v2 serves everybody: {before} then {after}"
    );
    assert!(load.served("v2") > 100);
    assert_eq!(load.end().await, Vec::<String>::new(), "no request failed");
    Ok(())
}

#[tokio::test]
async fn a_canary_that_is_no_other_than_stable_is_never_accused() -> Result<()> {
    let data = tempfile::tempdir()?;
    let penstock = started(data.path()).await?;
    let load = Load::start(penstock.gateway).await?;
    publish(&penstock, "v1-again", "v1").await?;
    let steps = "- {canary: 10%, hold: 1s, min_samples: 10}\n- {canary: 50%, hold: 1s, min_samples: 50}";
    let plan = plan(data.path(), "v1-again", steps, 0.001)?;
    for round in 0..20 {
        ctl(&penstock, &["rollout", "apply", "-f", &plan, "--no-wait"]).await?;
        let ended = || async {
            let rollout = rollout(&penstock).await?;
            let over = matches!(
                rollout["phase"].as_str(),
                Some("paused" | "rolled_back" | "aborting")
            );
            Ok(over.then_some(rollout))
        };
        let rollout = eventually("the ladder's end", PATIENCE, ended).await?;
        assert_eq!(rollout["phase"], "paused", "round {round}: {rollout}");
        ctl(&penstock, &["rollout", "abort", "demo", "--reason", "next round"]).await?;
    }
    assert_eq!(load.end().await, Vec::<String>::new(), "no request failed");
    Ok(())
}
