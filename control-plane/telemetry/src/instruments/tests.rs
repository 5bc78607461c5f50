use super::*;
use crate::Metrics;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

fn line<'a>(text: &'a str, name: &str, labels: &[&str]) -> &'a str {
    text.lines()
        .find(|line| {
            line.split(['{', ' ']).next() == Some(name) && labels.iter().all(|label| line.contains(label))
        })
        .unwrap_or_else(|| panic!("no {name} with {labels:?} in\n{text}"))
}

fn value(text: &str, name: &str, labels: &[&str]) -> String {
    line(text, name, labels)
        .rsplit(' ')
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn record(outcome: &str) -> RequestRecord<'_> {
    RequestRecord {
        outcome,
        duration: Duration::from_millis(900),
        ttft: Some(Duration::from_millis(70)),
        tpot: Some(Duration::from_millis(30)),
        tokens: TokenCounts {
            input: 12,
            cached: 8,
            output: 5,
        },
    }
}

fn boundaries(text: &str, name: &str) -> Vec<f64> {
    let bucket = format!("{name}_bucket{{");
    text.lines()
        .filter(|line| line.starts_with(&bucket))
        .filter_map(|line| line.split("le=\"").nth(1)?.split('"').next()?.parse().ok())
        .filter(|boundary: &f64| boundary.is_finite())
        .collect()
}

#[test]
fn a_request_is_counted_timed_and_told_apart_by_revision_and_outcome() {
    let metrics = Metrics::local();
    let gateway = GatewayMetrics::new(&metrics);
    let (v1, v2) = (Served::new("demo", "v1"), Served::new("demo", "v2"));
    gateway.record(&v1, &record("ok"));
    gateway.record(&v1, &record("ok"));
    gateway.record(&v2, &record("deadline_exceeded"));
    let text = metrics.prometheus_text();
    let first = [
        "penstock_component=\"gateway\"",
        "penstock_model=\"demo\"",
        "penstock_revision=\"v1\"",
    ];
    assert_eq!(
        value(
            &text,
            "penstock_requests_total",
            &[&first[..], &["outcome=\"ok\""]].concat()
        ),
        "2"
    );
    let failed = [
        "penstock_revision=\"v2\"",
        "penstock_outcome=\"deadline_exceeded\"",
    ];
    assert_eq!(value(&text, "penstock_requests_total", &failed), "1");
    for (kind, count) in [("input", "24"), ("cached", "16"), ("output", "10")] {
        let kind = format!("gen_ai_token_type=\"{kind}\"");
        let labels = [&first[..], &[&kind]].concat();
        assert_eq!(value(&text, "penstock_tokens_total", &labels), count);
    }
    let ttft = "gen_ai_server_time_to_first_token_seconds_count";
    assert_eq!(
        value(
            &text,
            ttft,
            &["gen_ai_operation_name=\"generate\"", "revision=\"v1\""]
        ),
        "2"
    );
}

/// The figures are the conventions' own, written out here a second time on purpose.
#[test]
fn histograms_have_the_boundaries_of_the_genai_conventions() {
    let metrics = Metrics::local();
    WorkerMetrics::new(&metrics, "w1").record(&Served::new("demo", "v1"), &record("ok"));
    let text = metrics.prometheus_text();
    let doubling: Vec<f64> = (0..14).map(|power| 0.01 * f64::from(1 << power)).collect();
    let seen = boundaries(&text, "gen_ai_server_request_duration_seconds");
    assert_eq!(seen.len(), doubling.len(), "{seen:?}");
    assert!(
        seen.iter().zip(&doubling).all(|(a, b)| (a - b).abs() < 1e-9),
        "{seen:?}"
    );
    assert_eq!(
        boundaries(&text, "gen_ai_server_time_to_first_token_seconds"),
        [
            0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0
        ]
    );
    assert_eq!(
        boundaries(&text, "gen_ai_server_time_per_output_token_seconds"),
        [
            0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5
        ]
    );
}

#[test]
fn a_request_is_in_flight_until_its_guard_is_dropped() {
    let metrics = Metrics::local();
    let gateway = GatewayMetrics::new(&metrics);
    let guard = gateway.in_flight(&Served::new("demo", "v1"));
    assert_eq!(
        value(&metrics.prometheus_text(), "penstock_inflight", &["v1"]),
        "1"
    );
    drop(guard);
    assert_eq!(
        value(&metrics.prometheus_text(), "penstock_inflight", &["v1"]),
        "0"
    );
}

#[test]
fn gateway_and_worker_in_one_process_are_told_apart() {
    let metrics = Metrics::local();
    let served = Served::new("demo", "v1");
    GatewayMetrics::new(&metrics).record(&served, &record("ok"));
    WorkerMetrics::new(&metrics, "w1").record(&served, &record("ok"));
    let text = metrics.prometheus_text();
    for component in ["gateway", "worker"] {
        let label = format!("penstock_component=\"{component}\"");
        assert_eq!(value(&text, "penstock_requests_total", &[&label]), "1");
    }
    // One family each, or a scraper refuses the page.
    assert_eq!(text.matches("# TYPE penstock_requests_total counter").count(), 1);
}

#[test]
fn an_engine_is_observed_while_it_is_registered() {
    let metrics = Metrics::local();
    let worker = WorkerMetrics::new(&metrics, "w1");
    let running = Arc::new(AtomicU64::new(3));
    let source = running.clone();
    let registration = worker.register_engine("demo", "v1", move || EngineObservation {
        running: source.load(Ordering::Relaxed),
        pages_total: 100,
        prefix_hit_tokens: 64,
        ..EngineObservation::default()
    });
    let _other = worker.register_engine("demo", "v2", EngineObservation::default);
    let text = metrics.prometheus_text();
    assert_eq!(value(&text, "penstock_engine_running", &["revision=\"v1\""]), "3");
    assert_eq!(
        value(&text, "penstock_kv_pages_total", &["revision=\"v1\""]),
        "100"
    );
    assert_eq!(
        value(&text, "penstock_prefix_hit_tokens_total", &["revision=\"v1\""]),
        "64"
    );
    running.store(1, Ordering::Relaxed);
    assert_eq!(
        value(
            &metrics.prometheus_text(),
            "penstock_engine_running",
            &["revision=\"v1\""]
        ),
        "1"
    );
    drop(registration);
    let text = metrics.prometheus_text();
    let running = |line: &&str| line.starts_with("penstock_engine_running{");
    assert!(
        text.lines()
            .filter(running)
            .all(|line| !line.contains("revision=\"v1\"")),
        "{text}"
    );
    assert_eq!(value(&text, "penstock_engine_running", &["revision=\"v2\""]), "0");
}

#[test]
fn workers_of_one_process_that_serve_one_revision_are_told_apart() {
    let metrics = Metrics::local();
    let workers = ["w1", "w2"].map(|id| WorkerMetrics::new(&metrics, id));
    let _registrations = [(5, &workers[0]), (9, &workers[1])].map(|(steps, worker)| {
        worker.register_engine("demo", "v1", move || EngineObservation {
            steps,
            ..Default::default()
        })
    });
    workers[0].record(&Served::new("demo", "v1"), &record("ok"));
    let text = metrics.prometheus_text();
    assert_eq!(
        value(
            &text,
            "penstock_engine_steps_total",
            &["penstock_endpoint=\"w1\""]
        ),
        "5"
    );
    assert_eq!(
        value(
            &text,
            "penstock_engine_steps_total",
            &["penstock_endpoint=\"w2\""]
        ),
        "9"
    );
    assert_eq!(
        value(&text, "penstock_requests_total", &["penstock_endpoint=\"w1\""]),
        "1"
    );
    assert!(
        !text
            .lines()
            .any(|line| line.starts_with("penstock_requests") && line.contains("\"w2\""))
    );
}

#[test]
fn a_control_plane_tells_epoch_gateways_and_convergence() {
    let metrics = Metrics::local();
    let control_plane = ControlPlaneMetrics::new(&metrics);
    control_plane.published(8123);
    control_plane.gateways(12, 11);
    control_plane.canary_share("demo", 50_000);
    control_plane.converged(Duration::from_millis(34));
    control_plane.called("SetRollout", "ok");
    let text = metrics.prometheus_text();
    assert_eq!(value(&text, "penstock_rollout_epoch", &[]), "8123");
    assert_eq!(value(&text, "penstock_gateways_live", &[]), "12");
    assert_eq!(value(&text, "penstock_gateways_acknowledged", &[]), "11");
    assert_eq!(value(&text, "penstock_rollout_canary_share", &["demo"]), "0.05");
    assert_eq!(
        value(&text, "penstock_convergence_duration_seconds_count", &[]),
        "1"
    );
    assert_eq!(value(&text, "penstock_admin_calls_total", &["SetRollout"]), "1");
}
