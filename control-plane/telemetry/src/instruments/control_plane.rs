//! What a control plane measures.

use super::requests::{counter, seconds};
use crate::{
    Metrics,
    semconv::{attribute, bucket, metric, value},
};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Gauge, Histogram},
};
use std::time::Duration;

/// A control plane's instruments. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ControlPlaneMetrics {
    epoch: Gauge<u64>,
    share: Gauge<f64>,
    live: Gauge<u64>,
    acknowledged: Gauge<u64>,
    workers: Gauge<u64>,
    leader: Gauge<u64>,
    push: Histogram<f64>,
    convergence: Histogram<f64>,
    nacks: Counter<u64>,
    calls: Counter<u64>,
}

impl ControlPlaneMetrics {
    /// Makes the instruments.
    pub fn new(metrics: &Metrics) -> Self {
        let meter = metrics.meter(value::CONTROL_PLANE);
        let gauge = |name, description| meter.u64_gauge(name).with_description(description).build();
        Self {
            epoch: gauge(metric::PUBLISHED_EPOCH, "Epoch published"),
            share: meter
                .f64_gauge(metric::CANARY_SHARE)
                .with_description("The canary's share of a model's keys, 0 to 1")
                .build(),
            live: gauge(metric::GATEWAYS_LIVE, "Gateways that said something within 15 s"),
            acknowledged: gauge(
                metric::GATEWAYS_ACKNOWLEDGED,
                "Live gateways that acknowledged the published epoch",
            ),
            workers: gauge(metric::WORKERS, "Workers registered"),
            leader: gauge(metric::LEADER, "1 on the leader"),
            push: seconds(
                &meter,
                metric::PUSH_DURATION,
                "Time from a push to one gateway's acknowledgement",
                &bucket::PUSH_DURATION,
            ),
            convergence: seconds(
                &meter,
                metric::CONVERGENCE_DURATION,
                "Time from a commit to the acknowledgement of the last live gateway",
                &bucket::PUSH_DURATION,
            ),
            nacks: counter(
                &meter,
                metric::PUSH_NACKS,
                "{snapshot}",
                "Snapshots refused by gateways",
            ),
            calls: counter(
                &meter,
                metric::ADMIN_CALLS,
                "{call}",
                "Admin calls by operation and outcome",
            ),
        }
    }

    /// Records the epoch published.
    pub fn published(&self, epoch: u64) {
        self.epoch.record(epoch, &[]);
    }

    /// Records the canary's share of `model`, in parts per million.
    pub fn canary_share(&self, model: &str, ppm: u32) {
        self.share.record(
            f64::from(ppm) / 1e6,
            &[KeyValue::new(attribute::MODEL, model.to_owned())],
        );
    }

    /// Records how many gateways live, and how many of those acknowledged the published epoch.
    pub fn gateways(&self, live: usize, acknowledged: usize) {
        self.live.record(live as u64, &[]);
        self.acknowledged.record(acknowledged as u64, &[]);
    }

    /// Records how many workers are registered.
    pub fn workers(&self, count: usize) {
        self.workers.record(count as u64, &[]);
    }

    /// Records whether this process leads.
    pub fn leader(&self, leads: bool) {
        self.leader.record(u64::from(leads), &[]);
    }

    /// Records that one gateway acknowledged a push after `time`.
    pub fn acknowledged(&self, time: Duration) {
        self.push.record(time.as_secs_f64(), &[]);
    }

    /// Records that the last live gateway acknowledged `time` after the commit.
    pub fn converged(&self, time: Duration) {
        self.convergence.record(time.as_secs_f64(), &[]);
    }

    /// Records that a gateway refused a snapshot.
    pub fn refused(&self, code: &str) {
        self.nacks
            .add(1, &[KeyValue::new(attribute::CODE, code.to_owned())]);
    }

    /// Records an admin call, e.g. `SetRollout`, `ok`.
    pub fn called(&self, operation: &'static str, outcome: &str) {
        self.calls.add(
            1,
            &[
                KeyValue::new(attribute::OPERATION, operation),
                KeyValue::new(attribute::OUTCOME, outcome.to_owned()),
            ],
        );
    }
}
