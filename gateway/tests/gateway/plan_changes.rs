//! Plan changes, told by a control plane whose part the test plays by hand.

use std::{sync::Arc, time::Duration};

use penstock_client::View;
use penstock_plan::{EndpointSet, Snapshot};
use penstock_proto::v1::node_message::Message;

use crate::{
    plane::{ControlPlane, acknowledged},
    support::{Behaviour, TestGateway, TestWorker, config, eventually, generate, prompt, view, with},
};

#[tokio::test]
async fn a_canary_that_nobody_serves_is_refused_until_somebody_does() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut plane = ControlPlane::start().await;
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(View::default());
    config.control_planes = vec![plane.address.to_string()];
    config.state_dir = Some(directory.path().to_owned());
    let gateway = TestGateway::run(config).await;
    let mut session = plane.sessions.recv().await.unwrap();
    assert!(matches!(session.next().await, Message::Hello(_)));

    let without = view(0, vec![worker.endpoint("w", &["v1"])]);
    session.endpoints(&without).await;
    assert_eq!(acknowledged(&session.snapshot(&without, 1).await), Some(1));

    let all = view(100, vec![worker.endpoint("w", &["v1", "v2"])]);
    match session.snapshot(&all, 2).await {
        Message::Nack(nack) => {
            assert_eq!((nack.epoch, nack.code.as_str()), (2, "canary_unreachable"));
            assert_eq!(nack.field, "routes[demo].canary");
            assert!(nack.message.contains("demo@v2"), "{}", nack.message);
        }
        other => panic!("{other:?}"),
    }
    let mut client = gateway.client().await;
    let mut served = async || {
        let reply = generate(&mut client, with(prompt("demo"), &[("x-user-id", "ada")]));
        let (metadata, _) = reply.await.unwrap();
        ["x-rollout-epoch", "x-model-version"]
            .map(|name| metadata.get(name).unwrap().to_str().unwrap().to_owned())
    };
    assert_eq!(served().await, ["1", "v1"], "the old snapshot stays in force");

    // Once a worker serves the canary, the snapshot that was refused is taken without being sent again.
    let more = View {
        endpoints: Arc::new(EndpointSet {
            version: 2,
            ..(*all.endpoints).clone()
        }),
        ..all.clone()
    };
    let first = session.endpoints(&more).await;
    let acknowledgement = match acknowledged(&first) {
        Some(_) => first,
        None => session.next().await,
    };
    assert_eq!(acknowledged(&acknowledgement), Some(2), "{acknowledgement:?}");
    assert_eq!(served().await, ["2", "v2"]);
    eventually("the snapshot in force is on disk", async || {
        let kept = std::fs::read_to_string(directory.path().join("view.json"));
        kept.is_ok_and(|kept| {
            let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
            kept["snapshot"]["epoch"] == 2
        })
    })
    .await;
}

#[tokio::test]
async fn a_stream_keeps_its_revision_when_the_plan_changes() {
    let worker = TestWorker::start(Behaviour::Hang).await;
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    let none = view(0, vec![worker.endpoint("w", &["v1", "v2"])]);
    session.endpoints(&none).await;
    session.snapshot(&none, 1).await;

    let mut client = gateway.client().await;
    let response = client.generate(prompt("demo")).await.unwrap();
    assert_eq!(response.metadata().get("x-model-version").unwrap(), "v1");
    let mut stream = response.into_inner();
    stream.message().await.unwrap().unwrap();
    let all = view(100, vec![]);
    assert_eq!(
        acknowledged(&session.snapshot(&view(100, vec![]), 2).await),
        Some(2)
    );
    // Not even the loss of every worker in the view ends a stream that is under way.
    let gone = View {
        endpoints: Arc::new(EndpointSet {
            version: 9,
            ..(*all.endpoints).clone()
        }),
        ..all
    };
    session.endpoints(&gone).await;
    let status = generate(&mut gateway.client().await, with(prompt("demo"), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert_eq!(status.metadata().get("x-model-version").unwrap(), "v2");
    let more = tokio::time::timeout(Duration::from_millis(200), stream.message()).await;
    assert!(more.is_err(), "the stream goes on: {more:?}");
    assert_eq!(worker.requests(), 1);
}

/// The same view under the next version of the endpoints.
fn version(view: &View, version: u64, endpoints: Vec<penstock_plan::Endpoint>) -> View {
    View {
        endpoints: Arc::new(EndpointSet { version, endpoints }),
        ..view.clone()
    }
}

#[tokio::test]
async fn a_canary_that_wants_workers_is_acknowledged_once_so_many_answer() {
    let first = TestWorker::start(Behaviour::Speak).await;
    let mut second = TestWorker::start(Behaviour::Speak).await;
    second.kill();
    let mut plane = ControlPlane::start().await;
    let (_gateway, mut session) = plane.gateway().await;
    let endpoints = vec![
        first.endpoint("a", &["v1", "v2"]),
        second.endpoint("b", &["v1", "v2"]),
    ];
    let all = view(100, endpoints);
    let wanting = |least| {
        let mut snapshot = Snapshot::clone(all.snapshot.as_ref().unwrap());
        let route = snapshot.routes.get_mut("demo").unwrap();
        route.canary.as_mut().unwrap().min_ready = least;
        View {
            snapshot: Some(Arc::new(snapshot)),
            ..all.clone()
        }
    };
    session.endpoints(&all).await;
    match session.snapshot(&wanting(2), 1).await {
        Message::Nack(nack) => {
            assert_eq!(nack.code, "canary_unreachable");
            assert!(
                nack.message.contains("reaches 1") && nack.message.contains("knows 2"),
                "{}",
                nack.message
            );
        }
        other => panic!("{other:?}"),
    }
    // It answers again, and nothing needs to be pushed for it.
    let _again = TestWorker::start_on(second.address, Behaviour::Speak).await;
    let late = session.next().await;
    assert_eq!(acknowledged(&late), Some(1), "{late:?}");
    assert_eq!(acknowledged(&session.snapshot(&wanting(1), 2).await), Some(2));
}

#[tokio::test]
async fn workers_that_vanish_all_at_once_serve_on_while_they_answer() {
    let mut workers = Vec::new();
    for _ in 0..4 {
        workers.push(TestWorker::start(Behaviour::Speak).await);
    }
    let mut plane = ControlPlane::start().await;
    let (gateway, mut session) = plane.gateway().await;
    let named = ["a", "b", "c", "d"].iter().zip(&workers);
    let endpoints = named.map(|(id, worker)| worker.endpoint(id, &["v1"])).collect();
    let all = view(0, endpoints);
    session.endpoints(&all).await;
    session.snapshot(&all, 1).await;
    session.endpoints(&version(&all, 2, vec![])).await;
    let mut client = gateway.client().await;
    generate(&mut client, with(prompt("demo"), &[])).await.unwrap();
    let known = async || {
        let reply = crate::support::http("GET", gateway.ops, "/metrics", &[], "").await;
        let line = |line: &&str| line.starts_with("penstock_gateway_endpoints");
        let line = reply.body.lines().find(line).unwrap().to_owned();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(known().await, "4");
    workers[0].kill();
    eventually("the dead one is dropped", async || known().await == "3").await;
    generate(&mut client, with(prompt("demo"), &[])).await.unwrap();
}
