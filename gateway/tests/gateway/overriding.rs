//! Emergency overrides on the operations port.

use std::net::SocketAddr;

use penstock_client::View;
use serde_json::{Value, json};

use crate::{
    plane::ControlPlane,
    support::{Behaviour, TestGateway, TestWorker, config, generate, http, prompt, view, with},
};

async fn call(method: &str, ops: SocketAddr, path: &str, body: &Value) -> (u16, Value) {
    let reply = http(method, ops, path, &[], body.to_string()).await;
    (reply.status, reply.json())
}

/// Revision and reason of a request of this user, pinned where a revision is given.
async fn served(gateway: &TestGateway, pin: Option<&str>) -> [String; 2] {
    let mut headers = vec![("x-user-id", "ada")];
    headers.extend(pin.map(|pin| ("x-model-version", pin)));
    let mut client = gateway.client().await;
    let (metadata, _) = generate(&mut client, with(prompt("demo"), &headers))
        .await
        .unwrap();
    ["x-model-version", "x-assignment-reason"]
        .map(|name| metadata.get(name).unwrap().to_str().unwrap().to_owned())
}

#[tokio::test]
async fn everything_goes_to_one_revision_until_it_is_ended() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    let all = view(100, vec![worker.endpoint("w", &["v1", "v2", "v3"])]);
    session.endpoints(&all).await;
    session.snapshot(&all, 1).await;
    assert_eq!(served(&gateway, None).await, ["v2", "bucket"]);

    let wish =
        json!({ "model": "demo", "revision": "v1", "ttl_s": 60, "actor": "ada", "reason": "incident" });
    let (status, set) = call("POST", gateway.ops, "/override", &wish).await;
    assert_eq!(
        (status, &set["workers"], &set["kept"]),
        (200, &json!(1), &json!(false))
    );
    for pin in [None, Some("v3"), Some("v2")] {
        assert_eq!(served(&gateway, pin).await, ["v1", "override"], "pins too");
    }
    let told = loop {
        if let Some(record) = session.stats().await.overrides.pop() {
            break record;
        }
    };
    assert_eq!(
        (
            told.model.as_str(),
            told.revision.as_str(),
            told.actor.as_str(),
            told.reason.as_str()
        ),
        ("demo", "v1", "ada", "incident")
    );
    assert_eq!((told.until_ms - told.since_ms, told.ended_ms), (60_000, 0));

    let (status, ended) = call("DELETE", gateway.ops, "/override/demo", &Value::Null).await;
    assert!(
        status == 200 && ended["ended_ms"].as_u64().unwrap() > 0,
        "{ended}"
    );
    assert_eq!(served(&gateway, None).await, ["v2", "bucket"]);
    let (_, list) = call("GET", gateway.ops, "/overrides", &Value::Null).await;
    assert_eq!(list["overrides"][0]["id"], told.id);
    assert_eq!(list["overrides"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn mistakes_are_named() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let gateway = TestGateway::start(view(0, vec![worker.endpoint("w", &["v1"])])).await;
    for (wish, expected, words) in [
        (
            json!({ "model": "demo", "revision": "v9", "actor": "ada" }),
            404,
            "it has v1, v2, v3",
        ),
        (
            json!({ "model": "demo", "revision": "v0", "actor": "ada" }),
            404,
            "aborted",
        ),
        (
            json!({ "model": "other", "revision": "v1", "actor": "ada" }),
            404,
            "there are demo",
        ),
        (json!({ "model": "demo", "revision": "v1" }), 400, "actor"),
        (
            json!({ "model": "demo", "revision": "v1", "actor": "ada", "ttl_s": 90_000 }),
            400,
            "86400",
        ),
    ] {
        let (status, error) = call("POST", gateway.ops, "/override", &wish).await;
        let message = error["error"]["message"].as_str().unwrap();
        assert!(
            status == expected && message.contains(words),
            "{status} {message}"
        );
    }
    let (status, error) = call("DELETE", gateway.ops, "/override/demo", &Value::Null).await;
    assert_eq!(status, 404, "{error}");
    // Clients of the main port must not move everybody.
    let wish = json!({ "model": "demo", "revision": "v1", "actor": "ada" });
    assert_eq!(call("POST", gateway.address, "/override", &wish).await.0, 404);
}

#[tokio::test]
async fn a_restart_keeps_an_override() {
    let directory = tempfile::tempdir().unwrap();
    let worker = TestWorker::start(Behaviour::Speak).await;
    let all = view(100, vec![worker.endpoint("w", &["v1", "v2"])]);
    let kept = |view: View| {
        let mut config = config(view);
        config.state_dir = Some(directory.path().to_owned());
        config
    };
    let gateway = TestGateway::run(kept(all.clone())).await;
    let wish = json!({ "model": "demo", "revision": "v1", "actor": "ada" });
    let (_, set) = call("POST", gateway.ops, "/override", &wish).await;
    assert_eq!(set["kept"], true, "{set}");
    drop(gateway);
    let gateway = TestGateway::run(kept(all)).await;
    assert_eq!(served(&gateway, None).await, ["v1", "override"]);
}
