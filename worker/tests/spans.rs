//! The spans of a request. In a process of its own, because the tracer is global.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics, in its helpers too"
)]

#[path = "serving/harness.rs"]
#[allow(dead_code, reason = "shared with the other tests, which use all of it")]
mod harness;

use std::time::Duration;

use futures_util::StreamExt as _;
use opentelemetry::{
    KeyValue, global,
    trace::{SpanKind, Status},
};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};

use harness::{eventually, generate, prompt, slow, tokens, with};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

fn attribute(span: &SpanData, key: &str) -> Option<String> {
    let value = |attribute: &KeyValue| (attribute.key.as_str() == key).then(|| attribute.value.to_string());
    span.attributes.iter().find_map(value)
}

fn named<'a>(spans: &'a [SpanData], name: &str) -> &'a SpanData {
    spans
        .iter()
        .find(|span| span.name == name)
        .unwrap_or_else(|| panic!("no {name} in {spans:?}"))
}

#[tokio::test]
async fn a_request_is_a_span_of_its_callers_trace_with_its_phases_below() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    global::set_tracer_provider(provider);
    let mut running = slow().await;

    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    let metadata = [
        ("traceparent", traceparent.as_str()),
        ("x-model-version", "v1"),
        ("x-rollout-epoch", "7"),
        ("x-assignment-reason", "bucket"),
    ];
    let reply = generate(&mut running.client, with(prompt("Hello", tokens(8)), &metadata))
        .await
        .unwrap();
    assert!(reply.status.is_none());
    let spans = exporter.get_finished_spans().unwrap();
    let request = named(&spans, "generate demo");
    assert_eq!(request.span_context.trace_id().to_string(), TRACE);
    assert_eq!(request.parent_span_id.to_string(), PARENT);
    assert_eq!(request.span_kind, SpanKind::Server);
    assert_eq!(
        attribute(request, "gen_ai.usage.output_tokens").as_deref(),
        Some("8")
    );
    let phases = ["queue", "prefill", "decode"].map(|name| named(&spans, name));
    for phase in phases {
        assert_eq!(phase.parent_span_id, request.span_context.span_id());
        assert!(
            request.start_time <= phase.start_time && phase.end_time <= request.end_time,
            "{phase:?}"
        );
    }
    assert!(phases[0].end_time == phases[1].start_time && phases[1].end_time == phases[2].start_time);
    // Seven steps of 10 ms lie between the first token and the eighth.
    assert!(phases[2].end_time.duration_since(phases[2].start_time).unwrap() >= Duration::from_millis(60));
    for span in phases.into_iter().chain([request]) {
        for (key, value) in [
            ("penstock.model", "demo"),
            ("penstock.revision", "v1"),
            ("penstock.rollout.epoch", "7"),
            ("penstock.assignment.reason", "bucket"),
            ("penstock.endpoint", &running.addresses.listen.to_string()),
        ] {
            assert_eq!(attribute(span, key).as_deref(), Some(value), "{key} of {span:?}");
        }
    }

    exporter.reset();
    generate(&mut running.client, with(prompt("", tokens(8)), &metadata))
        .await
        .unwrap_err();
    let spans = exporter.get_finished_spans().unwrap();
    let refused = named(&spans, "generate demo");
    assert_eq!(
        attribute(refused, "error.type").as_deref(),
        Some("invalid_argument")
    );
    assert!(matches!(refused.status, Status::Error { .. }), "{refused:?}");

    exporter.reset();
    let mut stream = running
        .client
        .generate(prompt("Hello", tokens(4000)))
        .await
        .unwrap()
        .into_inner();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    // Three phases and the request itself.
    eventually("the spans end with the client", || async {
        exporter.get_finished_spans().unwrap().len() == 4
    })
    .await;
    let spans = exporter.get_finished_spans().unwrap();
    assert_eq!(
        attribute(named(&spans, "generate demo"), "error.type").as_deref(),
        Some("cancelled")
    );
}
