//! What a gateway measures.

use super::requests::{InFlight, RequestInstruments, RequestRecord, Served, counter};
use crate::{
    Metrics,
    semconv::{attribute, metric, value},
};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Gauge},
};

/// A gateway's instruments. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GatewayMetrics {
    requests: RequestInstruments,
    retries: Counter<u64>,
    resumes: Counter<u64>,
    hedges: Counter<u64>,
    nacks: Counter<u64>,
    epoch: Gauge<u64>,
    endpoints: Gauge<u64>,
    connected: Gauge<u64>,
}

impl GatewayMetrics {
    /// Makes the instruments.
    pub fn new(metrics: &Metrics) -> Self {
        let meter = metrics.meter(value::GATEWAY);
        let gauge = |name, description| meter.u64_gauge(name).with_description(description).build();
        Self {
            requests: RequestInstruments::new(
                &meter,
                vec![KeyValue::new(attribute::COMPONENT, value::GATEWAY)],
            ),
            retries: counter(
                &meter,
                metric::RETRIES,
                "{request}",
                "Requests sent to another endpoint after a failure before the first token",
            ),
            resumes: counter(
                &meter,
                metric::RESUMES,
                "{request}",
                "Replies that went on at another endpoint when one was lost in the middle",
            ),
            hedges: counter(
                &meter,
                metric::HEDGES,
                "{request}",
                "Requests sent to a second endpoint because the first took long to begin",
            ),
            nacks: counter(&meter, metric::SNAPSHOT_NACKS, "{snapshot}", "Snapshots refused"),
            epoch: gauge(metric::APPLIED_EPOCH, "Epoch of the snapshot applied"),
            endpoints: gauge(metric::ENDPOINTS, "Endpoints known"),
            connected: gauge(metric::CONNECTED, "1 while the stream to the control plane is up"),
        }
    }

    /// Counts a request as under way until the guard is dropped.
    pub fn in_flight(&self, served: &Served) -> InFlight {
        self.requests.in_flight(served)
    }

    /// Records a request that ended.
    pub fn record(&self, served: &Served, record: &RequestRecord<'_>) {
        self.requests.record(served, record);
    }

    /// Records that a request went to another endpoint because one failed before its first token.
    pub fn retried(&self, model: &str) {
        self.retries
            .add(1, &[KeyValue::new(attribute::MODEL, model.to_owned())]);
    }

    /// Records that a reply went on at another endpoint.
    pub fn resumed(&self, model: &str) {
        self.resumes
            .add(1, &[KeyValue::new(attribute::MODEL, model.to_owned())]);
    }

    /// Records that a second endpoint was asked because the first took long to begin.
    pub fn hedged(&self, model: &str) {
        self.hedges
            .add(1, &[KeyValue::new(attribute::MODEL, model.to_owned())]);
    }

    /// Records that the snapshot of `epoch` was applied.
    pub fn applied(&self, epoch: u64) {
        self.epoch.record(epoch, &[]);
    }

    /// Records that a snapshot was refused.
    pub fn refused(&self, code: &str) {
        self.nacks
            .add(1, &[KeyValue::new(attribute::CODE, code.to_owned())]);
    }

    /// Records how many endpoints are known.
    pub fn endpoints(&self, count: usize) {
        self.endpoints.record(count as u64, &[]);
    }

    /// Records whether the stream to the control plane is up.
    pub fn connected(&self, connected: bool) {
        self.connected.record(u64::from(connected), &[]);
    }
}
