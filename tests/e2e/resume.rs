//! Streams outlive their workers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use anyhow::Result;
use futures_util::future::try_join_all;
use penstock_proto::v1;
use penstock_tests::{Client, Cluster, HttpClient, chat, connect, demo, get};
use serde_json::json;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tonic::Request;

/// Two workers hold half of them each.
const STREAMS: usize = 128;
const HTTP_STREAMS: usize = 32;
/// Tokens of a reply that is cut in its middle by hand, and of one whose worker dies by the clock.
const LONG: u32 = 600;
const SHORT: u32 = 150;
/// Every stream has so many tokens when the worker dies.
const BEGUN: usize = 5;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Whole {
    token_ids: Vec<u32>,
    text: String,
    usage: Option<(u32, u32)>,
}

/// Half of the requests are greedy, half are drawn with a seed and penalties.
fn request(index: usize, tokens: u32) -> v1::GenerateRequest {
    let mut request = chat("demo", &format!("Tell me about the number {index}"), tokens);
    let sampling = request.sampling.as_mut().unwrap();
    sampling.ignore_eos = Some(true);
    if index % 2 == 1 {
        sampling.temperature = Some(1.0);
        sampling.seed = Some(index as u64);
        sampling.frequency_penalty = Some(0.3);
    }
    request
}

/// Reads one reply whole; no token and no byte may be missing or come twice.
async fn ask(mut client: Client, index: usize, tokens: u32, begun: Arc<AtomicUsize>) -> Result<Whole> {
    let mut asked = Request::new(request(index, tokens));
    asked.set_timeout(Duration::from_secs(240));
    let mut chunks = client.generate(asked).await?.into_inner();
    let mut whole = Whole::default();
    while let Some(chunk) = chunks.message().await? {
        anyhow::ensure!(whole.usage.is_none(), "stream {index} goes on after its end");
        anyhow::ensure!(
            chunk.text_offset == whole.text.len() as u64,
            "stream {index} is at {} and says {}",
            whole.text.len(),
            chunk.text_offset
        );
        let before = whole.token_ids.len();
        whole.token_ids.extend(&chunk.token_ids);
        whole.text.push_str(&chunk.text);
        whole.usage = chunk
            .usage
            .map(|usage| (usage.prompt_tokens, usage.completion_tokens));
        if before < BEGUN && whole.token_ids.len() >= BEGUN {
            begun.fetch_add(1, Ordering::SeqCst);
        }
    }
    anyhow::ensure!(whole.usage.is_some(), "stream {index} has no end");
    Ok(whole)
}

async fn ask_all(port: u16, tokens: u32, begun: &Arc<AtomicUsize>) -> Result<Vec<Whole>> {
    let client = connect(port).await?;
    let asked = (0..STREAMS).map(|index| ask(client.clone(), index, tokens, begun.clone()));
    try_join_all(asked).await
}

/// Replies that went on at another worker, as the first gateway has counted them.
async fn resumes(cluster: &Cluster) -> Result<f64> {
    let metrics = get(&format!("http://127.0.0.1:{}/metrics", cluster.gateways[0].ops)).await?;
    let lines = metrics.body.lines();
    Ok(lines
        .filter(|line| line.starts_with("penstock_gateway_resumes"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum())
}

#[tokio::test]
async fn a_killed_worker_costs_no_stream_and_no_token() -> Result<()> {
    let mut cluster = Cluster::start(None).await?;
    let mut arguments = vec!["--dtype".to_owned(), "f32".to_owned()];
    arguments.extend(["--max-running".to_owned(), "128".to_owned()]);
    arguments.extend(demo(&["v1"]));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    for _ in 0..2 {
        cluster.add_worker(&arguments).await?;
    }
    // By load alone: prompts that begin alike would go to one worker, up to what it can bear.
    cluster.gateway_arguments = vec!["--routing", "two-choices"];
    cluster.add_gateway().await?;
    let port = cluster.gateways[0].port;
    let undisturbed = ask_all(port, LONG, &Arc::default()).await?;

    let begun = Arc::new(AtomicUsize::new(0));
    let asking = tokio::spawn({
        let begun = begun.clone();
        async move { ask_all(port, LONG, &begun).await }
    });
    while begun.load(Ordering::SeqCst) < STREAMS && !asking.is_finished() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.workers[0].process.kill()?;
    let disturbed = asking.await??;
    for (index, (disturbed, undisturbed)) in disturbed.iter().zip(&undisturbed).enumerate() {
        assert_eq!(disturbed, undisturbed, "stream {index}");
    }
    let resumes = resumes(&cluster).await?;
    assert!(
        (48.0..=80.0).contains(&resumes),
        "{resumes} of {STREAMS} streams went on at the other worker"
    );
    Ok(())
}

#[tokio::test]
async fn a_worker_that_is_told_to_end_before_its_streams_have_hands_them_over() -> Result<()> {
    let mut cluster = Cluster::start(None).await?;
    let models = demo(&["v1"]);
    let mut arguments = vec!["--runner", "fake", "--pace", "20ms", "--drain-timeout", "500ms"];
    arguments.extend(models.iter().map(String::as_str));
    for _ in 0..2 {
        cluster.add_worker(&arguments).await?;
    }
    cluster.add_gateway().await?;
    let port = cluster.gateways[0].port;
    let undisturbed = ask_all(port, SHORT, &Arc::default()).await?;
    let begun = Arc::new(AtomicUsize::new(0));
    let asking = tokio::spawn({
        let begun = begun.clone();
        async move { ask_all(port, SHORT, &begun).await }
    });
    // Half of them run, the others wait for a place.
    while begun.load(Ordering::SeqCst) < STREAMS / 4 && !asking.is_finished() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.workers[0].process.terminate()?;
    assert_eq!(asking.await??, undisturbed);
    Ok(())
}

#[tokio::test]
async fn a_fleet_that_loses_a_worker_every_few_seconds_fails_nobody() -> Result<()> {
    const CLIENTS: usize = 24;
    let mut cluster = Cluster::start(None).await?;
    let models = demo(&["v1"]);
    let mut arguments = vec!["--runner", "fake", "--pace", "10ms"];
    arguments.extend(models.iter().map(String::as_str));
    for _ in 0..3 {
        cluster.add_worker(&arguments).await?;
    }
    cluster.add_gateway().await?;
    let client = connect(cluster.gateways[0].port).await?;
    let over = Arc::new(AtomicBool::new(false));
    let mut load = tokio::task::JoinSet::new();
    for index in 0..CLIENTS {
        let (client, over) = (client.clone(), over.clone());
        load.spawn(async move {
            let (mut whole, mut replies) = (None, 0);
            while !over.load(Ordering::SeqCst) {
                let reply = ask(client.clone(), index, SHORT, Arc::default()).await?;
                // The same question has the same answer, whoever began it and whoever ended it.
                let first = whole.get_or_insert_with(|| reply.clone());
                anyhow::ensure!(*first == reply, "stream {index} is another one");
                replies += 1;
            }
            Ok(replies)
        });
    }
    for victim in 0..5 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.workers[victim].process.kill()?;
        cluster.add_worker(&arguments).await?;
    }
    over.store(true, Ordering::SeqCst);
    let mut replies = 0;
    while let Some(joined) = load.join_next().await {
        replies += joined??;
    }
    // Each takes some 1.5 s of ten, and what was lost in between.
    assert!(replies >= 4 * CLIENTS, "{replies}");
    Ok(())
}

/// Reads one reply of server-sent events whole: its text, why it ended, and its tokens.
async fn ask_http(
    client: HttpClient,
    port: u16,
    index: usize,
    begun: Arc<AtomicUsize>,
) -> Result<(String, String, u64)> {
    let body = json!({
        "model": "demo",
        "messages": [{ "role": "user", "content": format!("Tell me about the number {index}") }],
        "max_tokens": SHORT,
        "temperature": if index.is_multiple_of(2) { 0.0 } else { 1.0 },
        "seed": index,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let mut events = client.stream(port, "/v1/chat/completions", &body, "").await?;
    let (mut text, mut reason, mut tokens, mut parts) = (String::new(), None, None, 0);
    while let Some(event) = events.next().await? {
        anyhow::ensure!(tokens.is_none(), "stream {index} goes on after its end: {event}");
        let choice = &event["choices"][0];
        if let Some(content) = choice["delta"]["content"]
            .as_str()
            .filter(|part| !part.is_empty())
        {
            anyhow::ensure!(reason.is_none(), "stream {index} goes on after its end: {event}");
            text.push_str(content);
            parts += 1;
            if parts == BEGUN {
                begun.fetch_add(1, Ordering::SeqCst);
            }
        }
        reason = reason.or(choice["finish_reason"].as_str().map(str::to_owned));
        tokens = event["usage"]["completion_tokens"].as_u64();
    }
    match (reason, tokens) {
        (Some(reason), Some(tokens)) => Ok((text, reason, tokens)),
        ended => anyhow::bail!("stream {index} has no end: {ended:?}"),
    }
}

async fn ask_all_http(port: u16, begun: &Arc<AtomicUsize>) -> Result<Vec<(String, String, u64)>> {
    let client = HttpClient::new();
    let asked = (0..HTTP_STREAMS).map(|index| ask_http(client.clone(), port, index, begun.clone()));
    try_join_all(asked).await
}

#[tokio::test]
async fn a_killed_worker_costs_no_event_of_a_stream_over_http() -> Result<()> {
    let mut cluster = Cluster::start(None).await?;
    let models = demo(&["v1"]);
    let mut arguments = vec!["--runner", "fake", "--pace", "20ms"];
    arguments.extend(models.iter().map(String::as_str));
    for _ in 0..2 {
        cluster.add_worker(&arguments).await?;
    }
    cluster.gateway_arguments = vec!["--routing", "two-choices"];
    cluster.add_gateway().await?;
    let port = cluster.gateways[0].port;
    let undisturbed = ask_all_http(port, &Arc::default()).await?;

    let begun = Arc::new(AtomicUsize::new(0));
    let asking = tokio::spawn({
        let begun = begun.clone();
        async move { ask_all_http(port, &begun).await }
    });
    while begun.load(Ordering::SeqCst) < HTTP_STREAMS && !asking.is_finished() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster.workers[0].process.kill()?;
    assert_eq!(asking.await??, undisturbed);
    let resumes = resumes(&cluster).await?;
    assert!(
        resumes >= 8.0,
        "{resumes} of {HTTP_STREAMS} streams went on at the other worker"
    );
    Ok(())
}
