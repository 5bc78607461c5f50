//! One meter provider with a Prometheus reader, and an OTLP reader where a collector is configured.

use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkError,
    metrics::{PeriodicReader, SdkMeterProvider, exporter::PushMetricExporter},
};
use prometheus::{Registry, TextEncoder};
use std::time::Duration;

/// The process's metrics: gives meters to [`instruments`](crate::instruments) and text to `/metrics`.
/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    provider: SdkMeterProvider,
    registry: Registry,
}

impl Metrics {
    /// Metrics that are read through `/metrics` only; for tests and embedders.
    ///
    /// # Panics
    /// Never in practice: a fresh registry accepts the one collector that is put into it.
    pub fn local() -> Self {
        Self::build::<NoExporter>(Resource::builder().build(), None)
            .expect("a fresh Prometheus registry accepts its first collector")
    }

    pub(crate) fn build<E: PushMetricExporter>(
        resource: Resource,
        exporter: Option<E>,
    ) -> Result<Self, OTelSdkError> {
        let registry = Registry::new();
        let prometheus = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            // Every series carries penstock.component, which says what the scope would.
            .scope_info_enabled(false)
            .build()?;
        let mut builder = SdkMeterProvider::builder()
            .with_resource(resource)
            .with_reader(prometheus);
        if let Some(exporter) = exporter {
            builder = builder.with_reader(PeriodicReader::builder(exporter).build());
        }
        Ok(Self {
            provider: builder.build(),
            registry,
        })
    }

    /// The meter of one component, e.g. `penstock.gateway`.
    pub fn meter(&self, component: &'static str) -> Meter {
        self.provider.meter(component)
    }

    /// All metrics in Prometheus' text format 0.0.4.
    pub fn prometheus_text(&self) -> String {
        let families = self.registry.gather();
        TextEncoder::new()
            .encode_to_string(&families)
            .unwrap_or_else(|error| {
                // A half-written page would look like metrics that vanished.
                tracing::error!(%error, "cannot encode metrics");
                format!("# cannot encode metrics: {error}\n")
            })
    }

    pub(crate) fn shutdown(&self, timeout: Duration) {
        // The exporter has told of its failure already.
        let _ = self.provider.shutdown_with_timeout(timeout);
    }
}

/// Stands for "no exporter" in [`Metrics::build`]; is never made.
pub(crate) enum NoExporter {}

impl PushMetricExporter for NoExporter {
    async fn export(
        &self,
        _: &opentelemetry_sdk::metrics::data::ResourceMetrics,
    ) -> opentelemetry_sdk::error::OTelSdkResult {
        match *self {}
    }

    fn force_flush(&self) -> opentelemetry_sdk::error::OTelSdkResult {
        match *self {}
    }

    fn shutdown_with_timeout(&self, _: Duration) -> opentelemetry_sdk::error::OTelSdkResult {
        match *self {}
    }

    fn temporality(&self) -> opentelemetry_sdk::metrics::Temporality {
        match *self {}
    }
}
