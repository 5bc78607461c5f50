//! What gateways and workers both measure of a request.

use crate::semconv::{attribute, bucket, metric, value};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram, Meter, UpDownCounter},
};
use std::time::Duration;

/// Which revision a series is about. Make it once a route and keep it: the labels are built here.
#[derive(Debug, Clone)]
pub struct Served {
    model: KeyValue,
    revision: KeyValue,
}

impl Served {
    /// Labels for `revision` of `model`. Use only names that the snapshot knows: a label that a client can
    /// choose is a series that a client can make.
    pub fn new(model: &str, revision: &str) -> Self {
        Self {
            model: KeyValue::new(attribute::MODEL, model.to_owned()),
            revision: KeyValue::new(attribute::REVISION, revision.to_owned()),
        }
    }

    /// Labels of a request that was refused before it was assigned, e.g. for an unknown model.
    pub fn unassigned() -> Self {
        Self::new("", "")
    }
}

/// Tokens of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenCounts {
    /// Tokens of the prompt, cached ones included.
    pub input: u64,
    /// Tokens of the prompt found in the prefix cache.
    pub cached: u64,
    /// Tokens of the reply.
    pub output: u64,
}

/// What is known of a request when it has ended.
#[derive(Debug, Clone, Copy)]
pub struct RequestRecord<'a> {
    /// `ok`, or the gRPC status in lower case with underscores.
    pub outcome: &'a str,
    /// Arrival to end.
    pub duration: Duration,
    /// Arrival to first token, if one came.
    pub ttft: Option<Duration>,
    /// Mean time per token after the first, if there were two.
    pub tpot: Option<Duration>,
    /// Tokens, where known.
    pub tokens: TokenCounts,
}

/// The instruments that gateways and workers share.
#[derive(Debug, Clone)]
pub(super) struct RequestInstruments {
    /// Who measures: the component, and a worker's endpoint.
    origin: Vec<KeyValue>,
    duration: Histogram<f64>,
    ttft: Histogram<f64>,
    tpot: Histogram<f64>,
    requests: Counter<u64>,
    tokens: Counter<u64>,
    inflight: UpDownCounter<i64>,
}

impl RequestInstruments {
    pub(super) fn new(meter: &Meter, origin: Vec<KeyValue>) -> Self {
        Self {
            origin,
            duration: seconds(
                meter,
                metric::REQUEST_DURATION,
                "Time from a request's arrival to its end",
                &bucket::REQUEST_DURATION,
            ),
            ttft: seconds(
                meter,
                metric::TIME_TO_FIRST_TOKEN,
                "Time from a request's arrival to its first token",
                &bucket::TIME_TO_FIRST_TOKEN,
            ),
            tpot: seconds(
                meter,
                metric::TIME_PER_OUTPUT_TOKEN,
                "Mean time per output token after the first",
                &bucket::TIME_PER_OUTPUT_TOKEN,
            ),
            requests: counter(meter, metric::REQUESTS, "{request}", "Requests that ended"),
            tokens: counter(meter, metric::TOKENS, "{token}", "Tokens of requests that ended"),
            inflight: meter
                .i64_up_down_counter(metric::INFLIGHT)
                .with_unit("{request}")
                .with_description("Requests under way")
                .build(),
        }
    }

    pub(super) fn in_flight(&self, served: &Served) -> InFlight {
        let labels = self.identity(served);
        self.inflight.add(1, &labels);
        InFlight {
            inflight: self.inflight.clone(),
            labels,
        }
    }

    pub(super) fn record(&self, served: &Served, record: &RequestRecord<'_>) {
        let mut labels = self.identity(served);
        let identity = labels.len();
        let outcome = KeyValue::new(attribute::OUTCOME, record.outcome.to_owned());
        labels.push(outcome.clone());
        self.requests.add(1, &labels);
        labels.truncate(identity);
        self.count_tokens(&mut labels, record.tokens);

        labels.push(KeyValue::new(attribute::OPERATION_NAME, value::GENERATE));
        labels.push(KeyValue::new(attribute::PROVIDER_NAME, value::PENSTOCK));
        if let Some(ttft) = record.ttft {
            self.ttft.record(ttft.as_secs_f64(), &labels);
        }
        if let Some(tpot) = record.tpot {
            self.tpot.record(tpot.as_secs_f64(), &labels);
        }
        labels.push(outcome);
        self.duration.record(record.duration.as_secs_f64(), &labels);
    }

    fn count_tokens(&self, labels: &mut Vec<KeyValue>, tokens: TokenCounts) {
        let TokenCounts {
            input,
            cached,
            output,
        } = tokens;
        for (kind, count) in [
            (value::INPUT, input),
            (value::CACHED, cached),
            (value::OUTPUT, output),
        ] {
            if count > 0 {
                labels.push(KeyValue::new(attribute::TOKEN_TYPE, kind));
                self.tokens.add(count, labels);
                labels.pop();
            }
        }
    }

    fn identity(&self, served: &Served) -> Vec<KeyValue> {
        // Five more are pushed at most while a record is written.
        let mut labels = Vec::with_capacity(self.origin.len() + 5);
        labels.extend_from_slice(&self.origin);
        labels.extend([served.model.clone(), served.revision.clone()]);
        labels
    }
}

/// Counts a request as under way until it is dropped.
#[derive(Debug)]
#[must_use = "the request counts as under way until this is dropped"]
pub struct InFlight {
    inflight: UpDownCounter<i64>,
    labels: Vec<KeyValue>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.inflight.add(-1, &self.labels);
    }
}

pub(super) fn seconds(
    meter: &Meter,
    name: &'static str,
    description: &'static str,
    boundaries: &[f64],
) -> Histogram<f64> {
    meter
        .f64_histogram(name)
        .with_unit("s")
        .with_description(description)
        .with_boundaries(boundaries.to_vec())
        .build()
}

pub(super) fn counter(
    meter: &Meter,
    name: &'static str,
    unit: &'static str,
    description: &'static str,
) -> Counter<u64> {
    meter
        .u64_counter(name)
        .with_unit(unit)
        .with_description(description)
        .build()
}
