//! What is told of each request: its span, its metrics and its part in the counts of its trial.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue, global,
    trace::{SpanKind, Status as SpanStatus, TraceContextExt as _, Tracer as _},
};
use penstock_plan::{Outcome, RequestFacts};
use penstock_proto::v1::RequestStats;
use penstock_telemetry::{
    RequestIdentity,
    instruments::{GatewayMetrics, InFlight, RequestRecord, Served, TokenCounts},
    propagation,
    semconv::{attribute, span, value},
};
use tonic::{Code, Status};

use crate::{
    counts::{Ended, Entry, Running},
    error,
    routing::Assigned,
};

/// Operation that generates nothing: it has a span, and no part in the metrics of requests.
pub(crate) const TOKENIZE: &str = "tokenize";
/// Outcome of a request that the gateway refuses for want of room; a worker's own refusal is `resource_exhausted`.
const SHED: &str = "shed";
/// Operation name of requests that only score.
pub(crate) const SCORE: &str = "score";

/// One request from arrival to end. One that is dropped before its end was left by its client.
#[derive(Debug)]
pub(crate) struct Observation {
    metrics: GatewayMetrics,
    measured: bool,
    arrived: Instant,
    context: Context,
    served: Served,
    /// The worker asked last.
    endpoint: String,
    in_flight: Option<InFlight>,
    /// Its part in the counts of its trial.
    running: Option<Running>,
    /// A rule, a pin or an override chose the revision, and not the split.
    chosen: bool,
    first_data: Option<Instant>,
    /// It found no room, and no worker has seen it.
    shed: bool,
    ended: bool,
}

impl Observation {
    /// A request arrived: `operation`, e.g. `generate`, for `model`.
    pub(crate) fn start(
        metrics: GatewayMetrics,
        operation: &'static str,
        model: &str,
        headers: &HeaderMap,
    ) -> Self {
        let tracer = global::tracer("penstock");
        let name = format!("{operation} {model}");
        let builder = tracer
            .span_builder(name)
            .with_kind(SpanKind::Server)
            .with_attributes([
                KeyValue::new(attribute::OPERATION_NAME, operation),
                KeyValue::new(attribute::PROVIDER_NAME, value::PENSTOCK),
                KeyValue::new(attribute::COMPONENT, value::GATEWAY),
                KeyValue::new(attribute::REQUEST_MODEL, model.to_owned()),
            ]);
        let parent = propagation::extract(headers);
        let context = parent.with_span(tracer.build_with_context(builder, &parent));
        Self {
            metrics,
            measured: operation != TOKENIZE && operation != SCORE,
            arrived: Instant::now(),
            context,
            served: Served::unassigned(),
            endpoint: String::new(),
            in_flight: None,
            running: None,
            chosen: false,
            first_data: None,
            shed: false,
            ended: false,
        }
    }

    /// It is known which revision serves, and where it counts.
    pub(crate) fn assigned(&mut self, assigned: &Assigned, counts: Option<Arc<Entry>>) {
        self.served = Served::new(&assigned.model, &assigned.revision.name);
        if self.measured {
            self.in_flight = Some(self.metrics.in_flight(&self.served));
            self.running = counts.map(|counts| Running::new(counts, assigned.key));
            self.chosen = !assigned.reason.is_split();
        }
        let identity = RequestIdentity {
            model: assigned.model.clone(),
            revision: assigned.revision.name.clone(),
            epoch: assigned.epoch,
            reason: assigned.reason.as_str().into(),
            endpoint: String::new(),
        };
        let span = self.context.span();
        // The worker is told at the end: a retry changes it, and a span keeps each value that it is given.
        let known = |attribute: &KeyValue| attribute.key.as_str() != attribute::ENDPOINT;
        span.set_attributes(identity.attributes().into_iter().filter(known));
        if let Some(priority) = assigned.rule {
            span.set_attribute(KeyValue::new(attribute::ASSIGNMENT_RULE, i64::from(priority)));
        }
        let served = format!("{}@{}", assigned.model, assigned.revision.name);
        span.set_attribute(KeyValue::new(attribute::RESPONSE_MODEL, served));
    }

    /// There is no room for the request: that is how much is asked, and nothing that its revision did.
    pub(crate) fn shed(&mut self) {
        self.shed = true;
    }

    /// The request goes to this worker now.
    pub(crate) fn sent_to(&mut self, endpoint: &str) {
        endpoint.clone_into(&mut self.endpoint);
    }

    /// The worker failed before it had sent anything; another one is asked.
    pub(crate) fn retried(&self, model: &str) {
        self.metrics.retried(model);
    }

    /// The worker was lost in the middle of the reply; this one goes on.
    pub(crate) fn resumed(&mut self, model: &str, endpoint: &str) {
        self.metrics.resumed(model);
        self.context.span().add_event(
            span::RESUMED,
            vec![
                KeyValue::new(attribute::LOST_ENDPOINT, std::mem::take(&mut self.endpoint)),
                KeyValue::new(attribute::ENDPOINT, endpoint.to_owned()),
            ],
        );
        self.sent_to(endpoint);
    }

    /// Writes the span's context into the headers of the hop to the worker.
    pub(crate) fn inject(&self, headers: &mut HeaderMap) {
        propagation::inject(&self.context, headers);
    }

    /// The first part of the reply is here.
    pub(crate) fn first_data(&mut self) {
        self.first_data.get_or_insert_with(Instant::now);
    }

    /// The request failed.
    pub(crate) fn failed(&mut self, status: &Status) {
        self.end(status.code(), status.message(), None);
    }

    /// The request ended; a worker that got that far says what it measured.
    pub(crate) fn end(&mut self, code: Code, message: &str, stats: Option<&RequestStats>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let (outcome, judged) = match self.shed {
            true => (SHED, Outcome::Excluded),
            false => (error::outcome(code), error::judged(code)),
        };
        let span = self.context.span();
        span.set_attribute(KeyValue::new(attribute::GRPC_STATUS, i64::from(i32::from(code))));
        if !self.endpoint.is_empty() {
            span.set_attribute(KeyValue::new(
                attribute::ENDPOINT,
                std::mem::take(&mut self.endpoint),
            ));
        }
        if code != Code::Ok {
            span.set_attribute(KeyValue::new(attribute::ERROR_TYPE, outcome));
            span.set_status(SpanStatus::error(message.to_owned()));
            tracing::debug!(outcome, message, "request failed");
        }
        let tokens = stats.map_or_else(TokenCounts::default, tokens);
        for (name, count) in [
            (attribute::INPUT_TOKENS, tokens.input),
            (attribute::OUTPUT_TOKENS, tokens.output),
            (attribute::CACHE_READ_TOKENS, tokens.cached),
        ] {
            if stats.is_some() {
                span.set_attribute(KeyValue::new(name, i64::try_from(count).unwrap_or(i64::MAX)));
            }
        }
        if self.measured {
            let record = RequestRecord {
                outcome,
                duration: self.arrived.elapsed(),
                ttft: self.first_data.map(|at| at - self.arrived),
                tpot: stats
                    .filter(|stats| stats.completion_tokens > 1)
                    .map(|stats| Duration::from_micros(stats.tpot_us)),
                tokens,
            };
            self.metrics.record(&self.served, &record);
            if let Some(running) = self.running.take() {
                running.ended(&Ended {
                    facts: facts(judged, &record, stats, self.chosen),
                    cancelled: code == Code::Cancelled,
                });
            }
        }
        self.in_flight = None;
        span.end();
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        self.end(Code::Cancelled, "the client has gone", None);
    }
}

fn facts(
    outcome: Outcome,
    record: &RequestRecord<'_>,
    stats: Option<&RequestStats>,
    chosen: bool,
) -> RequestFacts {
    RequestFacts {
        outcome,
        ttft_s: record.ttft.map(|ttft| ttft.as_secs_f64()),
        tpot_s: record.tpot.map(|tpot| tpot.as_secs_f64()),
        total_s: record.duration.as_secs_f64(),
        prompt_tokens: stats.map(|stats| stats.prompt_tokens),
        cached_tokens: stats.map_or(0, |stats| stats.cached_tokens),
        output_tokens: stats.map(|stats| stats.completion_tokens),
        repetition: stats.map(|stats| f64::from(stats.repetition)),
        watch_word_hits: stats.map_or(0, |stats| stats.watch_word_hits),
        grammar_failed: stats.is_some_and(|stats| stats.grammar_failed),
        chosen,
    }
}

fn tokens(stats: &RequestStats) -> TokenCounts {
    TokenCounts {
        input: stats.prompt_tokens.into(),
        cached: stats.cached_tokens.into(),
        output: stats.completion_tokens.into(),
    }
}
