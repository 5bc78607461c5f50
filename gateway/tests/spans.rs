//! The span of a request. In a process of its own, because the tracer is global.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics, in its helpers too"
)]

#[path = "gateway/support.rs"]
#[allow(dead_code, reason = "shared with the other tests, which use all of it")]
mod support;

use std::{collections::HashMap, sync::Arc};

use opentelemetry::{
    global,
    trace::{SpanKind, Status},
};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};

use penstock_client::View;
use penstock_plan::{Rule, Snapshot};
use support::{Behaviour, TestGateway, TestWorker, endpoint, eventually, generate, prompt, view, with};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// The one span that there is, with its attributes. OTLP wants each key but once.
async fn only(exporter: &InMemorySpanExporter) -> (SpanData, HashMap<String, String>) {
    eventually("the span ends", async || {
        exporter.get_finished_spans().unwrap().len() == 1
    })
    .await;
    let span = exporter.get_finished_spans().unwrap().remove(0);
    exporter.reset();
    let mut attributes = HashMap::new();
    for attribute in &span.attributes {
        let before = attributes.insert(attribute.key.to_string(), attribute.value.to_string());
        assert_eq!(before, None, "{} is there twice", attribute.key);
    }
    (span, attributes)
}

/// The same view with a rule for everybody.
fn ruled(view: View) -> View {
    let mut snapshot = Snapshot::clone(view.snapshot.as_ref().unwrap());
    snapshot.routes.get_mut("demo").unwrap().rules = vec![Rule {
        priority: 9,
        ..Rule::default()
    }];
    View {
        snapshot: Some(Arc::new(snapshot)),
        ..view
    }
}

#[tokio::test]
async fn a_request_is_one_span_between_its_caller_and_its_worker() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    global::set_tracer_provider(provider);

    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut dead = TestWorker::start(Behaviour::Speak).await;
    dead.kill();
    let endpoints = vec![
        endpoint("dead", dead.address, &["v1"]),
        worker.endpoint("alive", &["v1"]),
    ];
    let gateway = TestGateway::start(ruled(view(0, endpoints))).await;
    let mut client = gateway.client().await;
    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    // Enough of them that the dead worker is asked first at least once.
    for _ in 0..8 {
        let request = with(
            prompt("demo"),
            &[("traceparent", &traceparent), ("x-user-id", "ada")],
        );
        generate(&mut client, request).await.unwrap();
        let (span, attributes) = only(&exporter).await;
        assert_eq!(span.name, "generate demo");
        assert_eq!(span.span_kind, SpanKind::Server);
        assert_eq!(span.span_context.trace_id().to_string(), TRACE);
        assert_eq!(span.parent_span_id.to_string(), PARENT);
        for (key, value) in [
            ("penstock.model", "demo"),
            ("penstock.revision", "v1"),
            ("penstock.rollout.epoch", "42"),
            ("penstock.assignment.reason", "rule"),
            ("penstock.assignment.rule", "9"),
            ("penstock.endpoint", "alive"),
            ("gen_ai.request.model", "demo"),
            ("gen_ai.usage.input_tokens", "11"),
            ("gen_ai.usage.output_tokens", "2"),
            ("gen_ai.usage.cache_read.input_tokens", "4"),
        ] {
            assert_eq!(attributes.get(key).map(String::as_str), Some(value), "{key}");
        }
        let passed_on = worker
            .last()
            .0
            .get("traceparent")
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        assert_eq!(
            passed_on,
            format!("00-{TRACE}-{}-01", span.span_context.span_id())
        );
    }

    generate(&mut client, with(prompt("nothing"), &[]))
        .await
        .unwrap_err();
    let (span, attributes) = only(&exporter).await;
    assert_eq!(attributes["error.type"], "not_found");
    assert!(!attributes.contains_key("penstock.endpoint"));
    assert!(matches!(span.status, Status::Error { .. }), "{span:?}");
}
