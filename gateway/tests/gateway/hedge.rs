//! Workers that take long to begin.

use std::{sync::atomic::Ordering, time::Duration};

use gateway::{Config, HedgeAfter, balance::Policy};
use tonic::{Code, Status};

use crate::support::{
    self, Behaviour, TestGateway, TestWorker, eventually, generate, http, prompt, view, with,
};

/// A worker that begins nothing, one that does, and a gateway that asks either.
async fn slow_and_sound(hedge_after: Option<HedgeAfter>) -> (TestWorker, TestWorker, TestGateway) {
    let slow = TestWorker::start(Behaviour::Silent).await;
    let sound = TestWorker::start(Behaviour::Speak).await;
    let endpoints = vec![slow.endpoint("slow", &["v1"]), sound.endpoint("sound", &["v1"])];
    let gateway = TestGateway::run(Config {
        routing: Policy::Random,
        hedge_after,
        ..support::config(view(0, endpoints))
    })
    .await;
    (slow, sound, gateway)
}

async fn ask(gateway: &TestGateway, times: usize) -> Vec<Result<(), Status>> {
    let mut client = gateway.client().await;
    let mut replies = Vec::new();
    for _ in 0..times {
        let mut request = with(prompt("demo"), &[]);
        request.set_timeout(Duration::from_millis(1500));
        replies.push(generate(&mut client, request).await.map(drop));
    }
    replies
}

#[tokio::test]
async fn a_second_worker_is_asked_when_the_first_takes_long_and_the_first_is_told_to_stop() {
    let after = HedgeAfter::Time(Duration::from_millis(30));
    let (slow, sound, gateway) = slow_and_sound(Some(after)).await;
    for reply in ask(&gateway, 30).await {
        reply.unwrap();
    }
    let hedged = slow.requests();
    assert!(hedged > 0, "of 30 some went to the slow one");
    assert_eq!(sound.requests(), 30);
    eventually("the slow one is told to stop each time", async || {
        slow.seen.dropped.load(Ordering::SeqCst) == hedged
    })
    .await;
    let metrics = http("GET", gateway.ops, "/metrics", &[], "").await.body;
    let line = |line: &&str| line.starts_with("penstock_gateway_hedges");
    let counted = metrics.lines().find(line).unwrap();
    assert!(counted.ends_with(&format!(" {hedged}")), "{counted}");
}

#[tokio::test]
async fn nothing_is_hedged_unasked() {
    let (slow, _sound, gateway) = slow_and_sound(None).await;
    let replies = ask(&gateway, 8).await;
    let late = replies.iter().filter_map(|reply| reply.as_ref().err());
    let late: Vec<Code> = late.map(Status::code).collect();
    assert!(
        !late.is_empty()
            && late
                .iter()
                .all(|code| matches!(code, Code::DeadlineExceeded | Code::Cancelled)),
        "{late:?}"
    );
    assert_eq!(slow.requests(), late.len());
}

#[tokio::test]
async fn a_hedge_that_fails_leaves_the_first_its_time() {
    let slow = TestWorker::start(Behaviour::Silent).await;
    let broken = TestWorker::start(Behaviour::Refuse(Status::unavailable("not now"))).await;
    let endpoints = vec![slow.endpoint("slow", &["v1"]), broken.endpoint("broken", &["v1"])];
    let gateway = TestGateway::run(Config {
        hedge_after: Some(HedgeAfter::Time(Duration::from_millis(10))),
        ..support::config(view(0, endpoints))
    })
    .await;
    let status = ask(&gateway, 1).await.remove(0).unwrap_err();
    let late = matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled);
    assert!(late, "the first one is still waited for: {status}");
    assert!(slow.requests() > 0 && broken.requests() > 0);
}
