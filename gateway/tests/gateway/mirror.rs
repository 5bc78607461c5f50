//! Copies of stable's requests for the canary.

use std::{sync::Arc, time::Duration};

use penstock_client::View;
use penstock_plan::{Mirror, Ppm, Snapshot};
use penstock_proto::v1;

use crate::{
    plane::ControlPlane,
    support::{Behaviour, TestGateway, TestWorker, endpoint, eventually, generate, prompt, view, with},
};

/// `demo` with v2 at `percent`, and a copy of each of stable's requests.
fn mirrored(percent: u32, stable: &TestWorker, canary: &TestWorker) -> View {
    let endpoints = vec![
        endpoint("stable", stable.address, &["v1", "v3"]),
        endpoint("canary", canary.address, &["v2"]),
    ];
    let before = view(percent, endpoints);
    let mut snapshot = Snapshot::clone(before.snapshot.as_ref().unwrap());
    snapshot.routes.get_mut("demo").unwrap().mirror = Some(Mirror {
        share: Ppm::ALL,
        max_output_tokens: 32,
    });
    View {
        snapshot: Some(Arc::new(snapshot)),
        ..before
    }
}

fn asking_for(max_tokens: Option<u32>) -> v1::GenerateRequest {
    v1::GenerateRequest {
        sampling: Some(v1::SamplingParams {
            max_tokens,
            seed: Some(7),
            ..Default::default()
        }),
        ..prompt("demo")
    }
}

#[tokio::test]
async fn a_copy_is_shorter_and_says_that_it_is_one() {
    let (stable, canary) = (
        TestWorker::start(Behaviour::Speak).await,
        TestWorker::start(Behaviour::Speak).await,
    );
    let gateway = TestGateway::start(mirrored(0, &stable, &canary)).await;
    let mut client = gateway.client().await;
    for (count, (asked, copied)) in [(Some(100), 32), (Some(5), 5), (None, 32)]
        .into_iter()
        .enumerate()
    {
        // That a client claims to be a copy is nobody's business.
        let headers = [("x-user-id", "ada"), ("x-penstock-mirror", "1")];
        let (metadata, _) = generate(&mut client, with(asking_for(asked), &headers))
            .await
            .unwrap();
        assert_eq!(metadata.get("x-model-version").unwrap(), "v1");
        let (own, message) = stable.last();
        assert!(own.get("x-penstock-mirror").is_none());
        assert_eq!(
            message,
            asking_for(asked),
            "the client's own request is untouched"
        );
        eventually("a copy", async || canary.requests() == count + 1).await;
        let (copy, message) = canary.last();
        assert_eq!(copy.get("x-penstock-mirror").unwrap(), "1");
        assert_eq!(copy.get("x-model-version").unwrap(), "v2");
        assert_eq!(message, asking_for(Some(copied)));
    }
}

#[tokio::test]
async fn only_who_takes_part_in_the_rollout_is_copied() {
    let (stable, canary) = (
        TestWorker::start(Behaviour::Speak).await,
        TestWorker::start(Behaviour::Speak).await,
    );
    let gateway = TestGateway::start(mirrored(0, &stable, &canary)).await;
    let mut client = gateway.client().await;
    for pin in ["v1", "v3"] {
        generate(&mut client, with(prompt("demo"), &[("x-model-version", pin)]))
            .await
            .unwrap();
    }
    let everybody = TestGateway::start(mirrored(100, &stable, &canary)).await;
    generate(&mut everybody.client().await, with(prompt("demo"), &[]))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(canary.requests(), 1, "the canary's own request and no copy");
}

#[tokio::test]
async fn a_canary_that_hangs_holds_up_nobody_and_its_copies_are_bounded_and_no_requests() {
    let (stable, canary) = (
        TestWorker::start(Behaviour::Speak).await,
        TestWorker::start(Behaviour::Hang).await,
    );
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    let both = mirrored(0, &stable, &canary);
    session.endpoints(&both).await;
    session.snapshot(&both, 1).await;
    let mut client = gateway.client().await;
    for _ in 0..80 {
        generate(&mut client, with(prompt("demo"), &[])).await.unwrap();
    }
    let counted = loop {
        let stats = session.stats().await;
        let canary = stats.revisions.into_iter().find(|stats| stats.revision == "v2");
        if let Some(canary) = canary.filter(|canary| canary.mirrored > 0) {
            break canary;
        }
    };
    assert_eq!(counted.requests, 0);
    eventually("as many as may be", async || canary.requests() == 64).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(canary.requests(), 64, "what is too many is not sent");
}
