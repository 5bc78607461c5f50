use super::*;
use crate::{OpenTelemetrySpanExt as _, RequestIdentity, propagation, span::record_with};
use http::HeaderMap;
use opentelemetry::{
    Value,
    trace::{TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SpanData};
use std::time::SystemTime;
use tracing::{info_span, subscriber::with_default};

struct Recorder {
    exporter: InMemorySpanExporter,
    provider: SdkTracerProvider,
}

impl Recorder {
    fn new() -> Self {
        let exporter = InMemorySpanExporter::default();
        Self {
            provider: SdkTracerProvider::builder()
                .with_simple_exporter(exporter.clone())
                .build(),
            exporter,
        }
    }

    /// Runs `body` as one process of a trace would.
    fn process<T>(&self, body: impl FnOnce() -> T) -> T {
        let layer = span_layer(self.provider.tracer("test"));
        with_default(tracing_subscriber::registry().with(layer), body)
    }

    fn span(&self, name: &str) -> SpanData {
        let spans = self.exporter.get_finished_spans().unwrap();
        spans
            .iter()
            .find(|span| span.name == name)
            .unwrap_or_else(|| panic!("no `{name}` in {spans:?}"))
            .clone()
    }
}

fn only(traces: &str) -> Environment {
    Environment {
        traces_endpoint: Some(traces.to_owned()),
        ..Environment::default()
    }
}

#[test]
fn a_child_in_another_process_has_the_callers_span_as_parent() {
    let (caller, callee) = (Recorder::new(), Recorder::new());
    let mut headers = HeaderMap::new();
    caller.process(|| {
        let span = info_span!("call");
        propagation::inject(&span.context(), &mut headers);
    });
    callee.process(|| {
        let span = info_span!("serve", otel.name = "generate demo", otel.kind = "server");
        propagation::set_parent(&span, &headers);
        RequestIdentity {
            model: "demo".into(),
            epoch: 7,
            ..Default::default()
        }
        .apply(&span);
        span.in_scope(|| info_span!("inner").in_scope(|| ()));
    });
    let (call, serve, inner) = (
        caller.span("call"),
        callee.span("generate demo"),
        callee.span("inner"),
    );
    assert_eq!(serve.parent_span_id, call.span_context.span_id());
    assert_eq!(serve.span_context.trace_id(), call.span_context.trace_id());
    assert_eq!(inner.parent_span_id, serve.span_context.span_id());
    assert_eq!(serve.span_kind, opentelemetry::trace::SpanKind::Server);
    let epoch = serve
        .attributes
        .iter()
        .find(|pair| pair.key.as_str() == "penstock.rollout.epoch");
    assert_eq!(epoch.map(|pair| &pair.value), Some(&Value::I64(7)));
}

#[test]
fn the_current_traceparent_names_the_innermost_span() {
    let recorder = Recorder::new();
    assert_eq!(propagation::current_traceparent(), None);
    let parent = recorder
        .process(|| info_span!("outer").in_scope(propagation::current_traceparent))
        .unwrap();
    let outer = recorder.span("outer").span_context;
    assert_eq!(parent, format!("00-{}-{}-01", outer.trace_id(), outer.span_id()));
}

#[test]
fn an_interval_is_a_child_with_the_times_given() {
    let recorder = Recorder::new();
    let tracer = recorder.provider.tracer("test");
    let parent = opentelemetry::Context::new().with_span(tracer.start("request"));
    let at = |second| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
    record_with(
        &tracer,
        &parent,
        "queue".into(),
        at(10),
        at(12),
        vec![KeyValue::new("n", 3)],
    );
    record_with(&tracer, &parent, "backwards".into(), at(10), at(9), Vec::new());
    let queue = recorder.span("queue");
    assert_eq!(queue.parent_span_id, parent.span().span_context().span_id());
    assert_eq!((queue.start_time, queue.end_time), (at(10), at(12)));
    assert_eq!(queue.attributes, vec![KeyValue::new("n", 3)]);
    assert_eq!(recorder.span("backwards").end_time, at(10));
}

#[test]
fn spans_of_other_crates_are_not_exported() {
    let recorder = Recorder::new();
    recorder.process(|| {
        info_span!(target: "h2::client", "noise").in_scope(|| ());
        info_span!(target: "gateway::forward", "ours").in_scope(|| ());
        info_span!(target: "control_plane", "theirs").in_scope(|| ());
    });
    let names: Vec<_> = recorder
        .exporter
        .get_finished_spans()
        .unwrap()
        .into_iter()
        .map(|span| span.name)
        .collect();
    assert_eq!(names, ["ours", "theirs"]);
}

#[test]
fn without_any_variable_nothing_is_exported_and_no_runtime_is_needed() {
    let telemetry = Telemetry::build(&TelemetryConfig::new("t"), &Environment::default()).unwrap();
    assert!(!telemetry.exports_traces());
    assert!(
        telemetry.prometheus_text().contains("service_name=\"t\""),
        "{}",
        telemetry.prometheus_text()
    );
}

#[test]
fn an_operators_service_name_is_kept() {
    let environment = Environment {
        names_service: true,
        ..Environment::default()
    };
    let telemetry = Telemetry::build(&TelemetryConfig::new("mine"), &environment).unwrap();
    assert!(!telemetry.prometheus_text().contains("\"mine\""));
}

#[test]
fn exporting_outside_a_runtime_is_an_error() {
    let error = Telemetry::build(&TelemetryConfig::new("t"), &only("http://127.0.0.1:1")).unwrap_err();
    assert!(matches!(error, TelemetryError::NoRuntime), "{error}");
}

#[tokio::test]
async fn an_endpoint_that_is_no_address_and_a_foreign_protocol_are_named() {
    let error = Telemetry::build(&TelemetryConfig::new("t"), &only("not an address")).unwrap_err();
    assert!(error.to_string().contains("`not an address`"), "{error}");
    let foreign = Environment {
        foreign_protocol: Some(("OTEL_EXPORTER_OTLP_PROTOCOL".into(), "http/json".into())),
        ..only("http://127.0.0.1:4318")
    };
    let error = Telemetry::build(&TelemetryConfig::new("t"), &foreign).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("OTEL_EXPORTER_OTLP_PROTOCOL=http/json"),
        "{error}"
    );
}

/// A collector that is not there, and one that accepts connections and never answers.
#[tokio::test]
async fn a_collector_that_is_down_does_not_hold_up_the_end() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    for endpoint in ["http://127.0.0.1:1", silent.as_str()] {
        let environment = Environment {
            metrics_endpoint: Some(endpoint.to_owned()),
            ..only(endpoint)
        };
        let telemetry = Telemetry::build(&TelemetryConfig::new("t"), &environment).unwrap();
        telemetry.traces.as_ref().unwrap().tracer("t").start("lost");
        // The margin is for a busy machine; without the bound the silent collector takes 10 s a signal.
        let bound = Telemetry::SHUTDOWN_LIMIT + Duration::from_secs(4);
        tokio::time::timeout(bound, telemetry.shutdown())
            .await
            .expect(endpoint);
    }
}
