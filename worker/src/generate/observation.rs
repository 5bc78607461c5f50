//! What is told of each request: its span with queue, prefill and decode below it, and its metrics.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{
    Array, Context, KeyValue, StringValue, Value, global,
    trace::{SpanKind, Status, TraceContextExt as _, Tracer as _},
};
use penstock_proto::v1;
use penstock_telemetry::{
    RequestIdentity,
    instruments::{InFlight, RequestRecord, Served as Labels, TokenCounts, WorkerMetrics},
    propagation, record_interval,
    semconv::{attribute, span, value},
};
use tonic::metadata::MetadataMap;

use super::{CallError, metadata::CallMetadata, request::Generation};
use crate::catalogue::Served;

/// One request from arrival to end. A request that is dropped before it ended was cancelled by its client.
pub(crate) struct Observation {
    metrics: WorkerMetrics,
    /// The same moment on both clocks: the engine's instants become times of spans.
    arrived: (Instant, SystemTime),
    /// Holds the request's span.
    context: Context,
    identity: RequestIdentity,
    served: Option<Arc<Served>>,
    in_flight: Option<InFlight>,
    phases: Phases,
    tokens: TokenCounts,
    ended: bool,
}

/// When a request entered each phase.
#[derive(Debug, Default)]
struct Phases {
    submitted: Option<Instant>,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// Durations for the trailer, in microseconds; 0 for a phase that was not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) queue_us: u64,
    pub(crate) ttft_us: u64,
    pub(crate) tpot_us: u64,
}

impl Observation {
    /// Opens the span, as a child of the caller's.
    pub(crate) fn start(
        metrics: WorkerMetrics,
        endpoint: &str,
        metadata: &MetadataMap,
        request: &v1::GenerateRequest,
    ) -> Self {
        let arrived = (Instant::now(), SystemTime::now());
        let tracer = global::tracer("penstock");
        let builder = tracer
            .span_builder(span::generate(&request.model))
            .with_kind(SpanKind::Server)
            .with_start_time(arrived.1)
            .with_attributes([
                KeyValue::new(attribute::OPERATION_NAME, value::GENERATE),
                KeyValue::new(attribute::PROVIDER_NAME, value::PENSTOCK),
                KeyValue::new(attribute::COMPONENT, value::WORKER),
                KeyValue::new(attribute::REQUEST_MODEL, request.model.clone()),
            ]);
        let parent = propagation::extract_metadata(metadata);
        let context = parent.with_span(tracer.build_with_context(builder, &parent));
        Self {
            metrics,
            arrived,
            context,
            identity: RequestIdentity {
                endpoint: endpoint.into(),
                ..RequestIdentity::default()
            },
            served: None,
            in_flight: None,
            phases: Phases::default(),
            tokens: TokenCounts::default(),
            ended: false,
        }
    }

    /// When the request arrived.
    pub(crate) fn arrived(&self) -> Instant {
        self.arrived.0
    }

    /// It is known which revision serves.
    pub(crate) fn resolved(&mut self, served: &Arc<Served>, call: &CallMetadata) {
        self.identity.model = served.model.clone();
        self.identity.revision = served.revision.clone();
        self.identity.epoch = call.epoch().parse().unwrap_or(0);
        self.identity.reason = call.reason().into();
        let span = self.context.span();
        // The request may have left the model's name out.
        span.update_name(span::generate(&served.model));
        span.set_attributes(self.identity.attributes());
        span.set_attribute(KeyValue::new(attribute::RESPONSE_MODEL, served.name()));
        self.in_flight = Some(self.metrics.in_flight(&served.labels));
        self.served = Some(served.clone());
    }

    /// It is known what is asked for.
    pub(crate) fn requested(&mut self, generation: &Generation, prompt_tokens: u32) {
        self.tokens.input = prompt_tokens.into();
        let sampling = &generation.sampling;
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let span = self.context.span();
        span.set_attribute(KeyValue::new(
            attribute::REQUEST_TEMPERATURE,
            f64::from(sampling.temperature),
        ));
        span.set_attribute(KeyValue::new(attribute::REQUEST_TOP_P, f64::from(sampling.top_p)));
        if sampling.top_k > 0 {
            span.set_attribute(KeyValue::new(attribute::REQUEST_TOP_K, number(sampling.top_k)));
        }
        if let Some(max_tokens) = generation.max_tokens {
            span.set_attribute(KeyValue::new(attribute::REQUEST_MAX_TOKENS, number(max_tokens)));
        }
    }

    /// The engine took the sequence.
    pub(crate) fn submitted(&mut self, at: Instant) {
        self.phases.submitted = Some(at);
    }

    /// The sequence left the queue. One that was put back into it starts again; the first time counts.
    pub(crate) fn started(&mut self, at: Instant, cached_tokens: u32) {
        self.phases.started.get_or_insert(at);
        self.tokens.cached = cached_tokens.into();
    }

    /// A token of the reply came.
    pub(crate) fn token(&mut self, at: Instant) {
        self.phases.first_token.get_or_insert(at);
        self.phases.last_token = Some(at);
        self.tokens.output += 1;
    }

    /// Durations so far.
    pub(crate) fn times(&self) -> Times {
        let micros = |duration: Option<Duration>| {
            duration.map_or(0, |duration| {
                u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
            })
        };
        Times {
            queue_us: micros(self.queue()),
            ttft_us: micros(self.ttft()),
            tpot_us: micros(self.tpot()),
        }
    }

    /// The reply is complete.
    pub(crate) fn completed(&mut self, reason: v1::FinishReason) {
        let reason = match reason {
            v1::FinishReason::Length => "length",
            _ => "stop",
        };
        let list = Value::Array(Array::String(vec![StringValue::from(reason)]));
        self.context
            .span()
            .set_attribute(KeyValue::new(attribute::RESPONSE_FINISH_REASONS, list));
        self.end(value::OK, reason);
    }

    /// The request was refused, or its reply cannot be completed.
    pub(crate) fn failed(&mut self, error: &CallError) {
        let span = self.context.span();
        span.set_attribute(KeyValue::new(attribute::ERROR_TYPE, error.kind()));
        span.set_status(Status::error(error.to_string()));
        if error.is_ours() {
            tracing::error!(model = self.identity.model, revision = self.identity.revision, %error, "request failed");
        } else {
            tracing::debug!(model = self.identity.model, revision = self.identity.revision, %error, "request refused");
        }
        self.end(error.kind(), "error");
    }

    fn queue(&self) -> Option<Duration> {
        Some(
            self.phases
                .started?
                .saturating_duration_since(self.phases.submitted?),
        )
    }

    fn ttft(&self) -> Option<Duration> {
        Some(self.phases.first_token?.saturating_duration_since(self.arrived.0))
    }

    fn tpot(&self) -> Option<Duration> {
        let between = u32::try_from(self.tokens.output.checked_sub(1)?)
            .ok()
            .filter(|&between| between > 0)?;
        Some(
            self.phases
                .last_token?
                .saturating_duration_since(self.phases.first_token?)
                / between,
        )
    }

    fn end(&mut self, outcome: &str, finish_reason: &'static str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let now = Instant::now();
        self.spans(now);
        let unassigned = Labels::unassigned();
        let labels = self.served.as_ref().map_or(&unassigned, |served| &served.labels);
        self.metrics.record(
            labels,
            &RequestRecord {
                outcome,
                duration: now.saturating_duration_since(self.arrived.0),
                ttft: self.ttft(),
                tpot: self.tpot(),
                tokens: self.tokens,
            },
        );
        if self.phases.submitted.is_some() {
            let RequestIdentity { model, revision, .. } = &self.identity;
            self.metrics.finished(model, revision, finish_reason);
            if let Some(queue) = self.queue() {
                self.metrics.queued(model, revision, queue);
            }
        }
        self.in_flight = None;
    }

    /// Ends the request's span, with its phases below it.
    fn spans(&self, now: Instant) {
        let Phases {
            submitted,
            started,
            first_token,
            last_token,
        } = self.phases;
        for (name, from, to) in [
            (span::QUEUE, submitted, started),
            (span::PREFILL, started, first_token),
            (span::DECODE, first_token, last_token),
        ] {
            let Some(from) = from else { break };
            // A phase that was never left ends with the request.
            let to = self.wall(to.unwrap_or(now));
            record_interval(
                &self.context,
                name,
                self.wall(from),
                to,
                self.identity.attributes(),
            );
        }
        let span = self.context.span();
        let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        span.set_attribute(KeyValue::new(attribute::INPUT_TOKENS, count(self.tokens.input)));
        span.set_attribute(KeyValue::new(attribute::OUTPUT_TOKENS, count(self.tokens.output)));
        span.set_attribute(KeyValue::new(
            attribute::CACHE_READ_TOKENS,
            count(self.tokens.cached),
        ));
        span.end_with_timestamp(self.wall(now));
    }

    fn wall(&self, at: Instant) -> SystemTime {
        self.arrived.1 + at.saturating_duration_since(self.arrived.0)
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        if !self.ended {
            self.context
                .span()
                .set_attribute(KeyValue::new(attribute::ERROR_TYPE, "cancelled"));
            self.end("cancelled", "abort");
        }
    }
}
