//! W3C trace context (`traceparent`, `tracestate`) over HTTP headers and gRPC metadata.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator as _},
    trace::TraceContextExt as _,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// The W3C header that names trace and parent.
pub const TRACEPARENT: &str = "traceparent";

/// The caller's context; an empty one where the headers name none or a malformed one.
pub fn extract(headers: &HeaderMap) -> Context {
    // Not from the current context: a request must not inherit the span of whoever happens to poll it.
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers))
}

/// The caller's context out of gRPC metadata.
pub fn extract_metadata(metadata: &MetadataMap) -> Context {
    extract(metadata.as_ref())
}

/// Writes `context` into `headers`. Leaves them as they are when `context` has no span, so that a caller's
/// `traceparent` passes through a process that exports nothing.
pub fn inject(context: &Context, headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(context, &mut HeadersMut(headers));
}

/// Writes `context` into gRPC metadata; see [`inject`].
pub fn inject_metadata(context: &Context, metadata: &mut MetadataMap) {
    inject(context, metadata.as_mut());
}

/// Writes the context of the current span into gRPC metadata; see [`inject`].
pub fn inject_current(metadata: &mut MetadataMap) {
    inject_metadata(&Span::current().context(), metadata);
}

/// Makes `span` a child of the caller named in `headers`, if there is one. Call it before the span is
/// entered: a span that has started keeps its parent.
pub fn set_parent(span: &Span, headers: &HeaderMap) {
    set_parent_context(span, extract(headers));
}

/// Makes `span` a child of `parent`, if `parent` has a span. Call it before the span is entered.
pub fn set_parent_context(span: &Span, parent: Context) {
    if parent.span().span_context().is_valid() {
        // Without the OTel layer there is nothing to set, which is fine.
        let _ = span.set_parent(parent);
    }
}

/// `traceparent` of the current span; none where nothing is exported.
pub fn current_traceparent() -> Option<String> {
    traceparent(&Span::current().context())
}

/// `traceparent` of `context`; none where it has no span.
pub fn traceparent(context: &Context) -> Option<String> {
    let span = context.span();
    let span = span.span_context();
    span.is_valid().then(|| {
        format!(
            "00-{}-{}-{:02x}",
            span.trace_id(),
            span.span_id(),
            span.trace_flags().to_u8() & 1
        )
    })
}

/// The context that a `traceparent` names; an empty one for an empty or malformed text.
pub fn context_from_traceparent(traceparent: &str) -> Context {
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(traceparent) {
        headers.insert(TRACEPARENT, value);
    }
    extract(&headers)
}

/// A tonic interceptor that writes the current span's context into each call.
#[derive(Debug, Clone, Copy, Default)]
pub struct InjectTraceContext;

impl tonic::service::Interceptor for InjectTraceContext {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        inject_current(request.metadata_mut());
        Ok(request)
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        // The propagator writes an empty tracestate where there is none.
        if let (false, Ok(name), Ok(value)) = (
            value.is_empty(),
            HeaderName::try_from(key),
            HeaderValue::try_from(value),
        ) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_context_survives_headers_and_metadata_with_its_state() {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, PARENT.parse().unwrap());
        headers.insert("tracestate", "vendor=1".parse().unwrap());
        let mut metadata = MetadataMap::new();
        inject_metadata(&extract(&headers), &mut metadata);
        assert_eq!(metadata.get(TRACEPARENT).unwrap(), PARENT);
        assert_eq!(metadata.get("tracestate").unwrap(), "vendor=1");
        assert_eq!(traceparent(&extract_metadata(&metadata)).as_deref(), Some(PARENT));
    }

    #[test]
    fn an_unsampled_parent_stays_unsampled() {
        let parent = PARENT.replace("-01", "-00");
        assert_eq!(traceparent(&context_from_traceparent(&parent)), Some(parent));
    }

    #[test]
    fn no_span_leaves_the_callers_header_alone() {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, PARENT.parse().unwrap());
        inject(&Context::new(), &mut headers);
        assert_eq!(headers[TRACEPARENT], PARENT);
        assert_eq!(headers.len(), 1);
    }

    #[test]
    fn a_malformed_parent_is_no_parent() {
        for text in [
            "",
            "00-zz",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "\n",
        ] {
            assert_eq!(traceparent(&context_from_traceparent(text)), None, "{text:?}");
        }
    }
}
