//! Exporters that tell once, not once a batch, that their collector is down.

use opentelemetry_sdk::{
    error::OTelSdkResult,
    metrics::{Temporality, data::ResourceMetrics, exporter::PushMetricExporter},
    trace::{SpanData, SpanExporter},
};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

/// An exporter whose failures are logged when they begin and when they end.
#[derive(Debug)]
pub(crate) struct LoggedOnce<E> {
    inner: E,
    signal: &'static str,
    endpoint: String,
    failing: AtomicBool,
}

impl<E> LoggedOnce<E> {
    pub(crate) fn new(inner: E, signal: &'static str, endpoint: &str) -> Self {
        Self {
            inner,
            signal,
            endpoint: endpoint.to_owned(),
            failing: AtomicBool::new(false),
        }
    }

    fn note(&self, result: &OTelSdkResult) {
        let failed = result.is_err();
        if self.failing.swap(failed, Ordering::Relaxed) == failed {
            return;
        }
        let (signal, endpoint) = (self.signal, self.endpoint.as_str());
        match result {
            Err(error) => tracing::warn!(
                signal,
                endpoint,
                %error,
                "the OTLP collector does not take telemetry; it is dropped until it does (told once)"
            ),
            Ok(()) => tracing::info!(signal, endpoint, "the OTLP collector takes telemetry again"),
        }
    }
}

impl<E: SpanExporter> SpanExporter for LoggedOnce<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        self.note(&result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &opentelemetry_sdk::Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for LoggedOnce<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let result = self.inner.export(metrics).await;
        self.note(&result);
        result
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_sdk::error::OTelSdkError;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::{Layer, layer::SubscriberExt as _};

    #[derive(Default, Clone)]
    struct Levels(Arc<Mutex<Vec<tracing::Level>>>);

    impl<S: tracing::Subscriber> Layer<S> for Levels {
        fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            self.0.lock().unwrap().push(*event.metadata().level());
        }
    }

    #[test]
    fn a_failure_is_told_when_it_begins_and_when_it_ends() {
        let levels = Levels::default();
        let exporter = LoggedOnce::new((), "traces", "http://nowhere");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(levels.clone()), || {
            let down = || Err(OTelSdkError::InternalFailure("down".into()));
            for result in [Ok(()), down(), down(), down(), Ok(()), Ok(()), down()] {
                exporter.note(&result);
            }
        });
        use tracing::Level;
        assert_eq!(*levels.0.lock().unwrap(), [Level::WARN, Level::INFO, Level::WARN]);
    }
}
