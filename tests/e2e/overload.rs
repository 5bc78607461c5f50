//! Three times as many requests as can be served.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are worth to be seen")]

use anyhow::Result;
use penstock_tests::{Client, Cluster, chat, connect, demo, gap};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::time::sleep_until;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

/// A worker runs so many replies at once, of so many tokens, 50 in the mean, one each 10 ms: 80 replies a second.
const RUNNING: u32 = 40;
const TOKENS: std::ops::Range<usize> = 25..76;
const CAPACITY: f64 = 80.0;
/// Time before anything counts, and time that counts.
const WARM_UP: Duration = Duration::from_secs(4);
const MEASURED: Duration = Duration::from_secs(10);

/// What became of the requests that were sent while it counted.
#[derive(Debug, Default)]
struct Seen {
    ttft: Vec<Duration>,
    refused: usize,
    /// Replies that ended while it counted.
    ended: usize,
    others: Vec<Status>,
}

impl Seen {
    fn p99(&mut self) -> Duration {
        self.ttft.sort_unstable();
        self.ttft[(self.ttft.len() - 1) * 99 / 100]
    }

    fn per_second(&self) -> f64 {
        self.ended as f64 / MEASURED.as_secs_f64()
    }
}

/// Time to the first token, or why there is none.
async fn ask(mut client: Client, index: usize) -> Result<Duration, Status> {
    let began = Instant::now();
    let tokens = TOKENS.start + index * 31 % TOKENS.len();
    let question = format!("Question {index}");
    let mut request = Request::new(chat("demo", &question, u32::try_from(tokens).unwrap()));
    request.set_timeout(Duration::from_secs(30));
    let mut chunks = client.generate(request).await?.into_inner();
    let mut ttft = None;
    while chunks.message().await?.is_some() {
        ttft.get_or_insert_with(|| began.elapsed());
    }
    ttft.ok_or_else(|| Status::internal("no token came"))
}

/// Sends requests at a rate, whether or not earlier ones have ended.
async fn offer(port: u16, per_second: f64) -> Result<Seen> {
    let mut clients = Vec::new();
    for _ in 0..16 {
        clients.push(connect(port).await?);
    }
    let seen = Arc::new(Mutex::new(Seen::default()));
    let start = Instant::now() + WARM_UP;
    let end = start + MEASURED;
    let mut sent = Instant::now();
    let mut asked = tokio::task::JoinSet::new();
    for index in 0.. {
        sent += Duration::from_secs_f64(gap(index) / per_second);
        if sent >= end {
            break;
        }
        sleep_until(sent.into()).await;
        let (client, seen) = (clients[index % clients.len()].clone(), seen.clone());
        asked.spawn(async move {
            let reply = ask(client, index).await;
            let mut seen = seen.lock().unwrap();
            seen.ended += usize::from(reply.is_ok() && (start..end).contains(&Instant::now()));
            match reply {
                _ if sent < start => {}
                Ok(ttft) => seen.ttft.push(ttft),
                Err(status) if status.code() == Code::ResourceExhausted => {
                    assert!(status.get_details_retry_info().is_some(), "{status}");
                    seen.refused += 1;
                }
                Err(status) => seen.others.push(status),
            }
        });
    }
    sleep_until(end.into()).await;
    while let Some(joined) = asked.join_next().await {
        joined?;
    }
    Ok(std::mem::take(&mut *seen.lock().unwrap()))
}

#[tokio::test]
async fn at_three_times_the_load_the_work_goes_on_and_nobody_admitted_waits_long() -> Result<()> {
    let mut cluster = Cluster::start(None).await?;
    let running = RUNNING.to_string();
    let mut arguments = vec!["--runner", "fake", "--pace", "10ms", "--max-running", &running];
    let models = demo(&["v1"]);
    arguments.extend(models.iter().map(String::as_str));
    cluster.add_worker(&arguments).await?;
    cluster.gateway_arguments = vec!["--max-queue-wait", "25ms"];
    cluster.add_gateway().await?;
    let port = cluster.gateways[0].port;

    // The most that the worker really does on this machine: it is never without work.
    let sustainable = offer(port, 2.0 * CAPACITY).await?.per_second();
    let mut busy = offer(port, 0.9 * sustainable).await?;
    let mut overloaded = offer(port, 3.0 * sustainable).await?;
    let (p99, overloaded_p99) = (busy.p99(), overloaded.p99());
    println!("most: {sustainable:.1} replies a second");
    println!("at 90 %: {:.1}, ttft p99 {p99:?}", busy.per_second());
    println!(
        "at 300 %: {:.1} and {} refused, ttft p99 {overloaded_p99:?}",
        overloaded.per_second(),
        overloaded.refused
    );
    assert!(busy.others.is_empty(), "{:?}", busy.others[0]);
    assert!(overloaded.others.is_empty(), "{:?}", overloaded.others[0]);
    assert!(overloaded.per_second() >= 0.9 * sustainable);
    assert!(overloaded_p99 <= 2 * p99);
    Ok(())
}
