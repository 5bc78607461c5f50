//! Match rules: what the gateway knows of a caller decides, over gRPC and HTTP alike.

use std::sync::Arc;

use penstock_client::View;
use penstock_plan::{Ppm, Rule, Snapshot};

use crate::support::{Behaviour, TestGateway, TestWorker, generate, http, prompt, view, with};

/// `demo` with v2 at 0 % and these rules.
pub(crate) fn ruled(worker: &TestWorker, rules: Vec<Rule>) -> View {
    let before = view(0, vec![worker.endpoint("w", &["v1", "v2", "v3"])]);
    let mut snapshot = Snapshot::clone(before.snapshot.as_ref().unwrap());
    snapshot.routes.get_mut("demo").unwrap().rules = rules;
    View {
        snapshot: Some(Arc::new(snapshot)),
        ..before
    }
}

fn from_network(network: &str, trusted_hops: u8) -> Rule {
    Rule {
        priority: 20,
        client_ip: vec![network.parse().unwrap()],
        trusted_hops,
        canary: Ppm::ALL,
        ..Rule::default()
    }
}

/// Revision, reason and rule, told over gRPC and over HTTP, which must agree.
async fn asked(gateway: &TestGateway, headers: &[(&'static str, &str)]) -> [String; 3] {
    let names = ["x-model-version", "x-assignment-reason", "x-assignment-rule"];
    let mut client = gateway.client().await;
    let (metadata, _) = generate(&mut client, with(prompt("demo"), headers))
        .await
        .unwrap();
    let grpc = names.map(|name| {
        let value = metadata.get(name).map(|value| value.to_str().unwrap());
        value.unwrap_or_default().to_owned()
    });
    let body = r#"{"model": "demo", "prompt": "Hello"}"#;
    let reply = http("POST", gateway.address, "/v1/completions", headers, body).await;
    let over_http = names.map(|name| {
        let value = reply.headers.get(name).map(|value| value.to_str().unwrap());
        value.unwrap_or_default().to_owned()
    });
    assert_eq!(grpc, over_http);
    grpc
}

#[tokio::test]
async fn a_rule_on_addresses_sees_the_other_end_of_the_connection() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let inside = TestGateway::start(ruled(&worker, vec![from_network("127.0.0.0/8", 0)])).await;
    assert_eq!(asked(&inside, &[]).await, ["v2", "rule", "20"]);
    let (hop, _) = worker.last();
    assert_eq!(hop.get("x-assignment-rule").unwrap(), "20");
    let outside = TestGateway::start(ruled(&worker, vec![from_network("10.0.0.0/8", 0)])).await;
    // What a caller claims of itself counts for nothing without trusted proxies, and neither does a rule it names.
    let claims = [
        ("x-forwarded-for", "10.1.2.3"),
        ("x-user-id", "ada"),
        ("x-assignment-rule", "7"),
    ];
    assert_eq!(asked(&outside, &claims).await, ["v1", "bucket", ""]);
    assert!(worker.last().0.get("x-assignment-rule").is_none());
}

#[tokio::test]
async fn behind_a_trusted_proxy_the_address_that_it_saw_counts() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let gateway = TestGateway::start(ruled(&worker, vec![from_network("10.0.0.0/8", 1)])).await;
    let user = ("x-user-id", "ada");
    let seen = ("x-forwarded-for", "192.0.2.1, 10.1.2.3");
    assert_eq!(asked(&gateway, &[user, seen]).await, ["v2", "rule", "20"]);
    let forged = ("x-forwarded-for", "10.1.2.3, 192.0.2.1");
    assert_eq!(asked(&gateway, &[user, forged]).await, ["v1", "bucket", ""]);
    assert_eq!(
        asked(&gateway, &[user]).await,
        ["v1", "bucket", ""],
        "no entry matches nothing"
    );
}

#[tokio::test]
async fn a_proxy_that_adds_a_header_of_its_own_is_read_last() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let gateway = TestGateway::start(ruled(&worker, vec![from_network("10.0.0.0/8", 1)])).await;
    let body = r#"{"model": "demo", "prompt": "Hello", "user": "ada"}"#;
    let headers = [("x-forwarded-for", "10.1.2.3"), ("x-forwarded-for", "192.0.2.1")];
    let reply = http("POST", gateway.address, "/v1/completions", &headers, body).await;
    assert_eq!(reply.headers["x-model-version"], "v1");
    let headers = [("x-forwarded-for", "192.0.2.1"), ("x-forwarded-for", "10.1.2.3")];
    let reply = http("POST", gateway.address, "/v1/completions", &headers, body).await;
    assert_eq!(reply.headers["x-model-version"], "v2");
}
