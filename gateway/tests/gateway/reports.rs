//! What a gateway tells the control plane of its requests.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use gateway::Overload;
use penstock_client::View;
use penstock_plan::{Snapshot, Threshold, Trial};
use penstock_proto::v1;
use tonic::{Code, Status};

use crate::{
    plane::{ControlPlane, Session},
    support::{Behaviour, TestWorker, generate, http, prompt, view, with},
};

/// `demo` with everybody on v2, in this step of a trial of errors and latencies.
fn trial(step: u32, worker: &TestWorker) -> View {
    let before = view(100, vec![worker.endpoint("w", &["v1", "v2"])]);
    let mut snapshot = Snapshot::clone(before.snapshot.as_ref().unwrap());
    let threshold = |metric: &str, over| Threshold {
        metric: metric.into(),
        over,
    };
    snapshot.routes.get_mut("demo").unwrap().trial = Some(Trial {
        attempt: 1,
        step,
        thresholds: vec![threshold("error_rate", 0.0), threshold("latency_p99", 60.0)],
        window_s: 3600,
    });
    View {
        snapshot: Some(Arc::new(snapshot)),
        ..before
    }
}

/// The counts of v2 by step, once `enough` holds for one of them.
async fn counted(
    session: &mut Session,
    enough: impl Fn(&v1::RevisionStats) -> bool,
) -> BTreeMap<u32, v1::RevisionStats> {
    loop {
        let stats = session.stats().await;
        if stats.revisions.iter().any(&enough) {
            let canary = stats.revisions.into_iter().filter(|stats| stats.revision == "v2");
            return canary.map(|stats| (stats.step, stats)).collect();
        }
    }
}

fn strata(stats: &v1::RevisionStats) -> Vec<(&str, Vec<(u64, u64)>)> {
    let counts = |metric: &v1::MetricCounts| metric.strata.iter().map(|c| (c.requests, c.bad)).collect();
    let metrics = stats.metrics.iter();
    metrics
        .map(|metric| (metric.metric.as_str(), counts(metric)))
        .collect()
}

#[tokio::test]
async fn each_trial_has_its_own_counts_and_reports_are_numbered() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    session.endpoints(&trial(0, &worker)).await;
    session.snapshot(&trial(0, &worker), 1).await;
    // At once after an apply, without waiting for the second to end.
    let first = session.stats().await;
    let mut client = gateway.client().await;
    for user in ["ada", "ada", "eve"] {
        generate(&mut client, with(prompt("demo"), &[("x-user-id", user)]))
            .await
            .unwrap();
    }
    session.snapshot(&trial(1, &worker), 2).await;
    generate(&mut client, with(prompt("demo"), &[("x-user-id", "ada")]))
        .await
        .unwrap();
    let counts = counted(&mut session, |stats| stats.step == 1 && stats.requests == 1).await;
    let (before, after) = (&counts[&0], &counts[&1]);
    assert_eq!((before.requests, after.requests), (3, 1));
    assert_eq!((before.rollout_uid.as_str(), before.attempt), ("r-1", 1));
    assert_eq!((before.errors, before.in_flight), (0, 0));
    assert_eq!(
        (before.prompt_tokens, before.cached_tokens, before.output_tokens),
        (33, 12, 6)
    );
    // 4 of 11 tokens of each prompt were cached.
    assert_eq!(
        strata(before),
        [
            ("error_rate", vec![(0, 0), (3, 0), (0, 0), (0, 0), (0, 0), (0, 0)]),
            (
                "latency_p99",
                vec![(0, 0), (3, 0), (0, 0), (0, 0), (0, 0), (0, 0)]
            ),
        ]
    );
    let values = |sketch: &Option<v1::Sketch>| {
        let sketch = sketch.as_ref().unwrap();
        sketch.zeros + sketch.count.iter().sum::<u64>()
    };
    assert_eq!(
        [
            &before.ttft_s,
            &before.tpot_s,
            &before.total_s,
            &before.output_length
        ]
        .map(values),
        [3; 4]
    );
    assert_eq!(
        before.keys.iter().filter(|register| **register > 0).count(),
        2,
        "two users"
    );
    assert!(session.stats().await.sequence > first.sequence);
}

#[tokio::test]
async fn errors_count_once_per_user_and_what_clients_do_wrong_counts_for_nobody() {
    let worker = TestWorker::start(Behaviour::Break(Status::internal("broken"))).await;
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    session.endpoints(&trial(0, &worker)).await;
    session.snapshot(&trial(0, &worker), 1).await;
    let mut client = gateway.client().await;
    for user in ["ada", "ada", "ada", "eve"] {
        generate(&mut client, with(prompt("demo"), &[("x-user-id", user)]))
            .await
            .unwrap_err();
    }
    let counts = counted(&mut session, |stats| stats.requests == 4).await;
    assert_eq!((counts[&0].errors, counts[&0].timeouts), (4, 0));
    assert_eq!(
        strata(&counts[&0])[0],
        ("error_rate", vec![(4, 2), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)])
    );

    let refusing = TestWorker::start(Behaviour::Refuse(Status::invalid_argument("no"))).await;
    session.endpoints(&trial(1, &refusing)).await;
    session.snapshot(&trial(1, &refusing), 2).await;
    generate(&mut client, with(prompt("demo"), &[]))
        .await
        .unwrap_err();
    let counts = counted(&mut session, |stats| stats.step == 1 && stats.requests == 1).await;
    assert_eq!(counts[&1].errors, 0);
    assert_eq!(strata(&counts[&1])[0], ("error_rate", vec![(0, 0); 6]));
}

#[tokio::test]
async fn running_ones_and_those_whose_client_left_are_told() {
    let worker = TestWorker::start(Behaviour::Hang).await;
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    session.endpoints(&trial(0, &worker)).await;
    session.snapshot(&trial(0, &worker), 1).await;
    let mut client = gateway.client().await;
    let reply = client.generate(prompt("demo")).await.unwrap();
    let counts = counted(&mut session, |stats| stats.in_flight == 1).await;
    assert_eq!(counts[&0].requests, 0, "it has not ended");
    drop(reply);
    let counts = counted(&mut session, |stats| stats.cancelled == 1).await;
    assert_eq!(
        (counts[&0].requests, counts[&0].errors, counts[&0].in_flight),
        (1, 0, 0)
    );
}

#[tokio::test]
async fn what_the_gateway_sheds_is_not_the_revisions_error() {
    let worker = TestWorker::start(Behaviour::Hang).await;
    let mut plane = ControlPlane::start().await;
    // Seven requests fit, and nobody waits for the eighth.
    let overload = Overload {
        max_worker_tokens: 0,
        max_queue_wait: Duration::from_millis(50),
        ..Overload::default()
    };
    let (gateway, mut session) = plane.gateway_with(|config| config.overload = overload).await;
    session.endpoints(&trial(0, &worker)).await;
    session.snapshot(&trial(0, &worker), 1).await;
    let mut client = gateway.client().await;
    let mut streams = Vec::new();
    for _ in 0..7 {
        streams.push(client.generate(prompt("demo")).await.unwrap());
    }
    let status = client.generate(prompt("demo")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    let counts = counted(&mut session, |stats| stats.requests == 1).await;
    assert_eq!((counts[&0].errors, counts[&0].timeouts), (0, 0));
    assert_eq!(strata(&counts[&0])[0], ("error_rate", vec![(0, 0); 6]));
    let metrics = http("GET", gateway.ops, "/metrics", &[], "").await.body;
    let line = |line: &&str| line.starts_with("penstock_requests_total") && line.contains("v2");
    let told = metrics.lines().find(line).unwrap();
    assert!(
        told.contains("penstock_outcome=\"shed\"") && told.ends_with(" 1"),
        "{told}"
    );
}
