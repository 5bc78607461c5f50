//! What users thought of replies.

use std::sync::Arc;

use penstock_client::View;
use penstock_plan::{Snapshot, Threshold, Trial};
use penstock_proto::v1::{self, feedback_request::Value as Given};
use serde_json::json;
use tonic::Code;

use crate::{
    plane::{ControlPlane, Session},
    support::{Behaviour, TestGateway, TestWorker, generate, http, prompt, view, with},
};

/// `demo` with everybody on v2, in this step of a trial that judges feedback.
fn trial(step: u32, worker: &TestWorker) -> View {
    let before = view(100, vec![worker.endpoint("w", &["v1", "v2"])]);
    let mut snapshot = Snapshot::clone(before.snapshot.as_ref().unwrap());
    snapshot.routes.get_mut("demo").unwrap().trial = Some(Trial {
        attempt: 1,
        step,
        thresholds: vec![Threshold {
            metric: "negative_feedback".into(),
            over: 0.0,
        }],
        window_s: 60,
    });
    View {
        snapshot: Some(Arc::new(snapshot)),
        ..before
    }
}

async fn start(worker: &TestWorker) -> (TestGateway, Session) {
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    session.endpoints(&trial(0, worker)).await;
    session.snapshot(&trial(0, worker), 1).await;
    (gateway, session)
}

async fn reply_id(gateway: &TestGateway) -> String {
    let mut client = gateway.client().await;
    let (metadata, _) = generate(&mut client, with(prompt("demo"), &[])).await.unwrap();
    metadata.get("x-reply-id").unwrap().to_str().unwrap().to_owned()
}

/// Feedback of v2 by step: all, bad, and the counts of the metric.
async fn counted(session: &mut Session, all: u64) -> Vec<(u32, u64, u64, u64, u64)> {
    loop {
        let stats = session.stats().await.revisions;
        if stats.iter().map(|stats| stats.feedback).sum::<u64>() == all {
            let given = stats.iter().filter(|stats| stats.feedback > 0).map(|stats| {
                let counts = stats.metrics[0].strata[0];
                (
                    stats.step,
                    stats.feedback,
                    stats.negative_feedback,
                    counts.requests,
                    counts.bad,
                )
            });
            let mut given: Vec<_> = given.collect();
            given.sort_unstable();
            return given;
        }
    }
}

#[tokio::test]
async fn feedback_counts_once_in_the_trial_in_which_its_reply_was_given() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let (gateway, mut session) = start(&worker).await;
    let mut client = gateway.client().await;
    let first = reply_id(&gateway).await;
    session.snapshot(&trial(1, &worker), 2).await;
    let second = reply_id(&gateway).await;
    assert_ne!(first, second);
    for (id, value) in [
        (&first, Given::ThumbUp(false)),
        (&first, Given::ThumbUp(false)),
        (&second, Given::Score(0.5)),
    ] {
        let request = v1::FeedbackRequest {
            reply_id: id.clone(),
            value: Some(value),
            comment: "well".into(),
        };
        let given = client.feedback(request).await.unwrap().into_inner();
        assert_eq!((given.model.as_str(), given.revision.as_str()), ("demo", "v2"));
    }
    assert_eq!(counted(&mut session, 2).await, [(0, 1, 1, 1, 1), (1, 1, 0, 1, 0)]);
}

#[tokio::test]
async fn openai_clients_give_feedback_by_the_id_of_the_reply() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let (gateway, mut session) = start(&worker).await;
    let mut ids = Vec::new();
    for (path, body, prefix) in [
        ("/v1/completions", json!({ "prompt": "Hello" }), "cmpl-"),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "Hi" }] }),
            "chatcmpl-",
        ),
    ] {
        let reply = http("POST", gateway.address, path, &[], body.to_string()).await;
        let id = reply.json()["id"].as_str().unwrap().to_owned();
        assert_eq!(reply.headers["x-reply-id"], id);
        assert!(id.starts_with(prefix), "{id}");
        ids.push(id);
    }
    let body = json!({ "prompt": "Hello", "stream": true });
    let reply = http("POST", gateway.address, "/v1/completions", &[], body.to_string()).await;
    let id = reply.headers["x-reply-id"].to_str().unwrap().to_owned();
    assert_eq!(reply.events()[0]["id"], id);
    ids.push(id);
    let native = http(
        "POST",
        gateway.address,
        "/generate",
        &[],
        json!({ "text": "Hello" }).to_string(),
    )
    .await;
    assert_eq!(
        native.headers["x-reply-id"],
        native.json()["meta_info"]["id"].as_str().unwrap()
    );
    for (id, given) in ids.iter().zip([
        json!({ "thumb": "down" }),
        json!({ "score": 0.2, "comment": "no" }),
        json!({ "thumb": "up" }),
    ]) {
        let mut body = given.clone();
        body["id"] = id.as_str().into();
        let reply = http("POST", gateway.address, "/v1/feedback", &[], body.to_string()).await;
        assert_eq!(
            (reply.status, reply.json()),
            (200, json!({ "model": "demo", "revision": "v2" }))
        );
    }
    assert_eq!(counted(&mut session, 3).await, [(0, 3, 2, 3, 2)]);
}

#[tokio::test]
async fn what_is_no_feedback_is_named() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let (gateway, mut session) = start(&worker).await;
    let id = reply_id(&gateway).await;
    let garbled = id.replace(&id[10..12], "xx");
    for (body, words) in [
        (
            json!({ "id": garbled, "thumb": "up" }),
            "is not the id of a reply",
        ),
        (json!({ "thumb": "up" }), "is not the id of a reply"),
        (json!({ "id": id }), "score"),
        (json!({ "id": id, "thumb": "sideways" }), "up or down"),
        (json!({ "id": id, "score": 7 }), "from 0 to 1"),
        (
            json!({ "id": id, "thumb": "up", "comment": "x".repeat(5000) }),
            "4096",
        ),
    ] {
        let reply = http("POST", gateway.address, "/v1/feedback", &[], body.to_string()).await;
        let error = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(
            reply.status == 400 && error.contains(words),
            "{} {error}",
            reply.status
        );
    }
    // The revision leaves the plan: nobody knows any more whose reply it was.
    let mut without = Snapshot::clone(trial(0, &worker).snapshot.as_ref().unwrap());
    without.routes.get_mut("demo").unwrap().canary = None;
    let without = View {
        snapshot: Some(Arc::new(without)),
        ..trial(0, &worker)
    };
    session.snapshot(&without, 2).await;
    let request = v1::FeedbackRequest {
        reply_id: id,
        value: Some(Given::ThumbUp(true)),
        ..Default::default()
    };
    let refused = gateway.client().await.feedback(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
}
