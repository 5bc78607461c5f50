//! Load for a long time while workers die and plans change. `tests/soak.sh` runs it for 30 minutes, the suite for a few
//! seconds.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are worth to be seen")]

use anyhow::{Context as _, Result, ensure};
use penstock_proto::v1;
use penstock_tests::{
    Client, Cluster, HttpClient, Trend, chat, connect, demo, eventually, gap, resident_bytes,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    task::JoinSet,
    time::{sleep, sleep_until},
};
use tonic::Request;

/// Each worker runs so many replies at once and gives each a token at this pace.
const WORKERS: usize = 3;
const RUNNING: u32 = 12;
const PACE: Duration = Duration::from_millis(20);
/// Tokens of a reply, 50 in the mean.
const TOKENS: std::ops::Range<usize> = 25..76;
/// Part of the sustainable rate that is offered.
const LOAD: f64 = 0.7;
/// Different requests; each is asked again and again.
const QUESTIONS: usize = 64;
/// Pause in seconds between two things that happen to the fleet.
const PAUSES: std::ops::Range<f64> = 1.0..4.0;
/// What the line through the resident memory may rise in a minute, in bytes; in a short run, what it may rise in all.
const RISE_PER_MINUTE: f64 = 256.0 * 1024.0;
const RISE: f64 = 4.0 * 1024.0 * 1024.0;
/// Time that a request gets, and one change of the plan.
const PATIENCE: Duration = Duration::from_secs(60);

/// Replies a second that the fleet can give: each takes a step for its prompt and one for each token.
fn sustainable() -> f64 {
    let steps = (TOKENS.start + TOKENS.end - 1) as f64 / 2.0 + 1.0;
    (WORKERS as u32 * RUNNING) as f64 / (steps * PACE.as_secs_f64())
}

/// A reply as a whole; ids are told over gRPC only.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Whole {
    ids: Option<Vec<u32>>,
    text: String,
    /// Tokens of the prompt and of the reply.
    usage: (u64, u64),
}

/// What became of the requests.
#[derive(Debug, Default)]
struct Tally {
    grpc: AtomicUsize,
    http: AtomicUsize,
    ended: AtomicUsize,
    ttft: Mutex<Vec<Duration>>,
    failed: Mutex<Vec<String>>,
    /// The first reply to each question over gRPC and over HTTP.
    first: Mutex<[BTreeMap<usize, Whole>; 2]>,
}

// === impl Tally ===

impl Tally {
    /// The same question has the same answer, whoever began it and whoever ended it.
    fn judge(&self, question: usize, whole: Whole) -> Result<()> {
        let mut first = self.first.lock().unwrap();
        let [grpc, http] = &mut *first;
        let (mine, others) = if whole.ids.is_some() {
            (grpc, http)
        } else {
            (http, grpc)
        };
        if let Some(other) = others.get(&question) {
            ensure!(
                (&other.text, other.usage) == (&whole.text, whole.usage),
                "question {question} is answered by {whole:?}, and over the other protocol by {other:?}"
            );
        }
        let expected = mine.entry(question).or_insert_with(|| whole.clone());
        ensure!(
            *expected == whole,
            "question {question} is answered by {whole:?}, and before by {expected:?}"
        );
        Ok(())
    }

    fn take(&self, index: usize, reply: Result<(Whole, Duration)>) {
        let judged = reply.and_then(|(whole, ttft)| {
            self.judge(index % QUESTIONS, whole)?;
            self.ttft.lock().unwrap().push(ttft);
            Ok(())
        });
        self.ended.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = judged {
            let told = format!("request {index}: {error:#}");
            println!("FAILED {told}");
            self.failed.lock().unwrap().push(told);
        }
    }

    fn asked(&self) -> usize {
        self.grpc.load(Ordering::Relaxed) + self.http.load(Ordering::Relaxed)
    }
}

fn tokens(question: usize) -> u32 {
    u32::try_from(TOKENS.start + question * 31 % TOKENS.len()).unwrap()
}

fn text(question: usize) -> String {
    format!("Tell me about the number {question}")
}

/// Asks over gRPC; offsets say that nothing is missing and nothing comes twice.
async fn ask_grpc(mut client: Client, question: usize, user: String) -> Result<(Whole, Duration)> {
    let began = Instant::now();
    let mut asked = chat("demo", &text(question), tokens(question));
    asked.sampling.as_mut().unwrap().ignore_eos = Some(true);
    let mut asked = Request::new(asked);
    asked.set_timeout(PATIENCE);
    asked.metadata_mut().insert("x-user-id", user.parse()?);
    let mut chunks = client.generate(asked).await?.into_inner();
    let (mut ids, mut text, mut usage, mut ttft) = (Vec::new(), String::new(), None, None);
    while let Some(chunk) = chunks.message().await? {
        ttft.get_or_insert_with(|| began.elapsed());
        ensure!(usage.is_none(), "goes on after its end");
        let at = text.len() as u64;
        ensure!(
            chunk.text_offset == at,
            "is at {at} and says {}",
            chunk.text_offset
        );
        ids.extend(chunk.token_ids);
        text.push_str(&chunk.text);
        let told = |usage: v1::Usage| (usage.prompt_tokens.into(), usage.completion_tokens.into());
        usage = chunk.usage.map(told);
    }
    let usage: (u64, u64) = usage.context("has no end")?;
    ensure!(
        usage.1 == ids.len() as u64,
        "has {} tokens and says {usage:?}",
        ids.len()
    );
    let ids = Some(ids);
    Ok((Whole { ids, text, usage }, ttft.context("has no token")?))
}

/// Asks over HTTP; what is missing or comes twice makes another text than gRPC's.
async fn ask_http(client: HttpClient, port: u16, question: usize, user: String) -> Result<(Whole, Duration)> {
    let began = Instant::now();
    let body = json!({
        "model": "demo",
        "messages": [{ "role": "user", "content": text(question) }],
        "max_tokens": tokens(question),
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let mut events = client.stream(port, "/v1/chat/completions", &body, &user).await?;
    let (mut text, mut usage, mut ttft) = (String::new(), None, None);
    while let Some(event) = events.next().await? {
        ensure!(usage.is_none(), "goes on after its end");
        if let Some(content) = event["choices"][0]["delta"]["content"]
            .as_str()
            .filter(|c| !c.is_empty())
        {
            ttft.get_or_insert_with(|| began.elapsed());
            text.push_str(content);
        }
        let count = |name: &str| event["usage"][name].as_u64();
        usage = count("prompt_tokens").zip(count("completion_tokens"));
    }
    let usage = usage.context("has no end")?;
    Ok((
        Whole {
            ids: None,
            text,
            usage,
        },
        ttft.context("has no token")?,
    ))
}

/// Sends requests at a rate until `end`, whether or not earlier ones have ended: half over gRPC, half over HTTP, half
/// to each gateway.
async fn offer(ports: [u16; 2], per_second: f64, end: Instant, tally: Arc<Tally>) -> Result<()> {
    let (mut clients, http) = (Vec::new(), HttpClient::new());
    for port in ports {
        clients.push(connect(port).await?);
    }
    let mut asked = JoinSet::new();
    let mut at = Instant::now();
    for index in 0.. {
        at += Duration::from_secs_f64(gap(index) / per_second);
        if at >= end {
            break;
        }
        sleep_until(at.into()).await;
        while asked.try_join_next().transpose()?.is_some() {}
        // Of the numbers below, none goes always with the same question.
        let (gateway, over_http) = (index / 2 % 2, (index + index / QUESTIONS).is_multiple_of(2));
        let user = format!("u{}", index % 1009);
        let (question, tally) = (index % QUESTIONS, tally.clone());
        if over_http {
            tally.http.fetch_add(1, Ordering::Relaxed);
            let (client, port) = (http.clone(), ports[gateway]);
            let asking = async move { ask_http(client, port, question, user).await };
            asked.spawn(async move { tally.take(index, within(asking).await) });
        } else {
            tally.grpc.fetch_add(1, Ordering::Relaxed);
            let client = clients[gateway].clone();
            let asking = async move { ask_grpc(client, question, user).await };
            asked.spawn(async move { tally.take(index, within(asking).await) });
        }
    }
    while asked.join_next().await.transpose()?.is_some() {}
    Ok(())
}

async fn within<T>(asking: impl Future<Output = Result<T>>) -> Result<T> {
    let patience = PATIENCE + Duration::from_secs(5);
    tokio::time::timeout(patience, asking).await.context("no end")?
}

/// The fleet, and what happens to it.
struct Fleet {
    cluster: Cluster,
    arguments: Vec<String>,
    /// Workers that live.
    live: Vec<usize>,
    rng: StdRng,
    /// Revisions in force and on trial, and how far the trial is.
    stable: &'static str,
    canary: &'static str,
    step: usize,
    kills: usize,
    changes: usize,
}

// === impl Fleet ===

impl Fleet {
    async fn start(seed: u64) -> Result<Self> {
        let mut arguments: Vec<String> = ["--runner", "fake", "--pace"].map(str::to_owned).into();
        arguments.push(format!("{}ms", PACE.as_millis()));
        arguments.extend(["--max-running".to_owned(), RUNNING.to_string()]);
        arguments.extend(demo(&["v1", "v2"]));
        let mut fleet = Self {
            cluster: Cluster::start(None).await?,
            arguments,
            live: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            stable: "v1",
            canary: "v2",
            step: 0,
            kills: 0,
            changes: 0,
        };
        for _ in 0..WORKERS {
            fleet.add_worker().await?;
        }
        for _ in 0..2 {
            fleet.cluster.add_gateway().await?;
        }
        fleet.change_plan().await?;
        Ok(fleet)
    }

    async fn add_worker(&mut self) -> Result<()> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        self.cluster.add_worker(&arguments).await?;
        self.live.push(self.cluster.workers.len() - 1);
        Ok(())
    }

    /// Kills one worker in the middle of its work; another one takes its place.
    async fn kill_worker(&mut self) -> Result<()> {
        let victim = self.live.swap_remove(self.rng.random_range(0..self.live.len()));
        self.cluster.workers[victim].process.kill()?;
        self.kills += 1;
        self.add_worker().await
    }

    /// The next step of a rollout: it begins, goes up twice, and is promoted or aborted.
    async fn change_plan(&mut self) -> Result<()> {
        let (stable, canary) = (self.stable, self.canary);
        let share = format!("{}%", self.rng.random_range(1..=60));
        let abort = self.rng.random_bool(0.5);
        let words = match self.step {
            0 => vec!["create", "demo", "--stable", stable, "--canary", canary],
            1 | 2 => vec!["set", "demo", "--canary", &share, "-y"],
            _ if abort => vec!["abort", "demo", "--reason", "the soak says so"],
            _ => vec!["promote", "demo", "-y"],
        };
        let words = [vec!["rollout"], words].concat();
        eventually(&format!("{words:?}"), PATIENCE, || async {
            let output = self.cluster.ctl(&words).await?;
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "{told}");
            Ok(Some(()))
        })
        .await?;
        if self.step == 3 && !abort {
            (self.stable, self.canary) = (canary, stable);
        }
        self.step = (self.step + 1) % 4;
        self.changes += 1;
        Ok(())
    }

    /// Now a worker is killed, now the plan changes, until `end`.
    async fn disturb(&mut self, end: Instant) -> Result<()> {
        loop {
            let pause = Duration::from_secs_f64(self.rng.random_range(PAUSES));
            if Instant::now() + pause >= end {
                return Ok(());
            }
            sleep(pause).await;
            if self.kills <= self.changes {
                self.kill_worker().await?;
            } else {
                self.change_plan().await?;
            }
        }
    }
}

/// Resident memory of one process over time.
struct Memory {
    name: String,
    process: u32,
    trend: Trend,
}

/// Samples each second until `end`, and says now and then how it goes.
async fn watch(mut memories: Vec<Memory>, end: Instant, tally: Arc<Tally>) -> Result<Vec<Memory>> {
    let began = Instant::now();
    for second in 0.. {
        let at = began + Duration::from_secs(second);
        if at > end {
            break;
        }
        sleep_until(at.into()).await;
        for memory in &mut memories {
            memory.trend.push(resident_bytes(memory.process)? as f64);
        }
        if second % 30 == 0 {
            let memories = memories.iter().filter_map(|memory| {
                let (_, now) = memory.trend.ends()?;
                Some(format!("{} {:.1} MiB", memory.name, mib(now)))
            });
            let (asked, ended) = (tally.asked(), tally.ended.load(Ordering::Relaxed));
            println!(
                "{second:5} s: {ended} of {asked} requests ended, {} failed; {}",
                tally.failed.lock().unwrap().len(),
                memories.collect::<Vec<_>>().join(", ")
            );
        }
    }
    Ok(memories)
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

/// How long: `PENSTOCK_SOAK_SECONDS`, else some seconds.
fn length() -> Result<Duration> {
    let seconds = std::env::var("PENSTOCK_SOAK_SECONDS").unwrap_or_else(|_| "20".into());
    let seconds: u64 = seconds
        .parse()
        .with_context(|| format!("PENSTOCK_SOAK_SECONDS is {seconds:?}: give whole seconds"))?;
    Ok(Duration::from_secs(seconds))
}

/// Prints what was counted; the error says which process grows.
fn report(fleet: &Fleet, tally: &Tally, memories: &[Memory]) -> Result<()> {
    let mut ttft = std::mem::take(&mut *tally.ttft.lock().unwrap());
    ttft.sort_unstable();
    let quantile = |share: f64| ttft.get((ttft.len() as f64 * share) as usize).copied();
    println!("workers killed    {:>8}", fleet.kills);
    println!("plan changes      {:>8}", fleet.changes);
    println!("requests (gRPC)   {:>8}", tally.grpc.load(Ordering::Relaxed));
    println!("requests (HTTP)   {:>8}", tally.http.load(Ordering::Relaxed));
    println!("failed            {:>8}", tally.failed.lock().unwrap().len());
    for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
        println!(
            "ttft {name:<6} {:>12} ms",
            quantile(share).unwrap_or_default().as_millis()
        );
    }
    println!("resident memory       first      last    slope of the second half");
    let mut grown = Vec::new();
    for memory in memories {
        let half = memory.trend.last(0.5);
        let (first, last) = memory.trend.ends().context("samples")?;
        let minutes = half.length().as_secs_f64() / 60.0;
        let (slope, most) = (half.per_minute(), RISE_PER_MINUTE.max(RISE / minutes));
        let line = format!(
            "{:<16} {:>6.1} MiB {:>5.1} MiB {:>8.1} KiB/min, at most {:.1}",
            memory.name,
            mib(first),
            mib(last),
            slope / 1024.0,
            most / 1024.0
        );
        println!("{line}");
        if slope > most {
            grown.push(line);
        }
    }
    ensure!(grown.is_empty(), "memory grows: {grown:?}");
    Ok(())
}

#[tokio::test]
async fn workers_die_and_plans_change_and_nobody_notices_for_as_long_as_it_goes_on() -> Result<()> {
    let (length, seed) = (length()?, 7);
    let mut fleet = Fleet::start(seed).await?;
    let rate = LOAD * sustainable();
    println!(
        "a soak of {} s: {rate:.1} requests/s, {:.0} % of the {:.1} that {WORKERS} workers can serve; seed {seed}",
        length.as_secs(),
        100.0 * LOAD,
        sustainable()
    );
    let gateways = &fleet.cluster.gateways;
    let ports = [gateways[0].port, gateways[1].port];
    let memory = |name: &str, process: u32| Memory {
        name: name.into(),
        process,
        trend: Trend::new(),
    };
    let memories = vec![
        memory("gateway 1", gateways[0].process.id()),
        memory("gateway 2", gateways[1].process.id()),
        memory("control plane", fleet.cluster.control_plane.id()),
    ];
    let (tally, end) = (Arc::new(Tally::default()), Instant::now() + length);
    let load = tokio::spawn(offer(ports, rate, end, tally.clone()));
    let watched = tokio::spawn(watch(memories, end, tally.clone()));
    fleet.disturb(end).await?;
    load.await??;
    let memories = watched.await??;
    let flat = report(&fleet, &tally, &memories);
    let failed = tally.failed.lock().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {} failed, first {}",
        failed.len(),
        tally.asked(),
        failed[0]
    );
    assert!(fleet.kills > 0 && fleet.changes > 1);
    // What was offered is what was meant to be.
    let meant = rate * length.as_secs_f64();
    assert!(
        (tally.asked() as f64 - meant).abs() < meant / 4.0,
        "{} of {meant}",
        tally.asked()
    );
    flat
}
