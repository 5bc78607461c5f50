//! What the spans of a request have in common.

use crate::semconv::attribute;
use opentelemetry::{
    Context, KeyValue, global,
    trace::{Span as _, SpanKind, Status, TraceContextExt as _, Tracer},
};
use std::{borrow::Cow, time::SystemTime};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// What every span of a request carries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestIdentity {
    /// Model.
    pub model: String,
    /// Revision that serves.
    pub revision: String,
    /// Epoch of the snapshot that assigned the request; 0 where none did.
    pub epoch: u64,
    /// Why it was assigned to that revision.
    pub reason: String,
    /// Worker that serves.
    pub endpoint: String,
}

impl RequestIdentity {
    /// As attributes.
    pub fn attributes(&self) -> Vec<KeyValue> {
        vec![
            KeyValue::new(attribute::MODEL, self.model.clone()),
            KeyValue::new(attribute::REVISION, self.revision.clone()),
            // OTel's integers are signed; an epoch never gets that far.
            KeyValue::new(attribute::EPOCH, i64::try_from(self.epoch).unwrap_or(i64::MAX)),
            KeyValue::new(attribute::ASSIGNMENT_REASON, self.reason.clone()),
            KeyValue::new(attribute::ENDPOINT, self.endpoint.clone()),
        ]
    }

    /// Writes the attributes on `span`, which may have started already.
    pub fn apply(&self, span: &Span) {
        for KeyValue { key, value, .. } in self.attributes() {
            span.set_attribute(key, value);
        }
    }
}

/// Marks `span` as failed.
pub fn set_error(span: &Span, error_type: &str, message: impl Into<Cow<'static, str>>) {
    span.set_attribute(attribute::ERROR_TYPE, error_type.to_owned());
    span.set_status(Status::error(message));
}

/// Emits a finished span from `start` to `end` as a child of `parent`. Does nothing where `parent` has no
/// span, which is so wherever nothing is exported.
///
/// For intervals that are known only when they are over, as the engine's queue, prefill and decode.
pub fn record_interval(
    parent: &Context,
    name: impl Into<Cow<'static, str>>,
    start: SystemTime,
    end: SystemTime,
    attributes: Vec<KeyValue>,
) {
    if parent.span().span_context().is_sampled() {
        record_with(
            &global::tracer("penstock"),
            parent,
            name.into(),
            start,
            end,
            attributes,
        );
    }
}

pub(crate) fn record_with<T: Tracer>(
    tracer: &T,
    parent: &Context,
    name: Cow<'static, str>,
    start: SystemTime,
    end: SystemTime,
    attributes: Vec<KeyValue>,
) where
    T::Span: Send + Sync + 'static,
{
    let builder = tracer
        .span_builder(name)
        .with_kind(SpanKind::Internal)
        .with_start_time(start)
        .with_attributes(attributes);
    // A clock that was set back must not make a negative interval.
    tracer
        .build_with_context(builder, parent)
        .end_with_timestamp(end.max(start));
}
