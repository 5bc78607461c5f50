//! Starting and ending telemetry.

use crate::{
    Metrics, TelemetryConfig, config::Environment, export::LoggedOnce, logging, metrics::NoExporter,
};
use opentelemetry::{KeyValue, global, trace::TracerProvider as _};
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkError,
    trace::{SdkTracer, SdkTracerProvider},
};
use std::time::Duration;
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::{SubscriberInitExt as _, TryInitError},
};

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A log filter that cannot be read.
    #[error(
        "{source_name} has the value `{value}`, which is no log filter; write e.g. `info` or `warn,gateway=debug`"
    )]
    LogFilter {
        /// Where it was given.
        source_name: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        #[source]
        cause: tracing_subscriber::filter::ParseError,
    },
    /// An OTLP transport other than gRPC.
    #[error(
        "{variable}={value} is not supported: telemetry is exported over gRPC; unset it or say `grpc` (collectors take gRPC on port 4317)"
    )]
    Protocol {
        /// The variable.
        variable: String,
        /// Its value.
        value: String,
    },
    /// An endpoint or another OTEL_* variable that cannot be used.
    #[error("cannot export {signal} to `{endpoint}`; check the OTEL_EXPORTER_OTLP_* variables")]
    Exporter {
        /// traces or metrics.
        signal: &'static str,
        /// The endpoint.
        endpoint: String,
        /// What is wrong with it.
        #[source]
        cause: ExporterBuildError,
    },
    /// OTLP over gRPC runs on Tokio.
    #[error("telemetry that is exported must be started inside a Tokio runtime")]
    NoRuntime,
    /// The Prometheus reader could not be made.
    #[error("cannot set up metrics")]
    Metrics(#[source] OTelSdkError),
    /// A process has one subscriber.
    #[error("telemetry was started already in this process")]
    AlreadyStarted(#[source] TryInitError),
}

/// Running telemetry. Keep it until the process ends, then [`shutdown`](Telemetry::shutdown).
#[derive(Debug)]
#[must_use = "telemetry that is not shut down loses its last spans"]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Metrics,
}

/// Starts telemetry and logging for this process, once. Exports only where the OTEL_* variables name a
/// collector; then it must be called inside a Tokio runtime, which carries the export.
///
/// # Errors
/// A log filter, endpoint or protocol that cannot be used, or a second call.
pub fn init(config: TelemetryConfig) -> Result<Telemetry, TelemetryError> {
    let environment = Environment::read();
    let logs = logging::layer(&config, &environment)?;
    let telemetry = Telemetry::build(&config, &environment)?;
    let spans = telemetry
        .traces
        .as_ref()
        .map(|provider| span_layer(provider.tracer("penstock")));
    tracing_subscriber::registry()
        .with(spans)
        .with(logs)
        .try_init()
        .map_err(TelemetryError::AlreadyStarted)?;
    if let Some(provider) = &telemetry.traces {
        global::set_tracer_provider(provider.clone());
    }
    Ok(telemetry)
}

/// Turns the spans of our own crates into OTel spans, whatever the log filter says.
fn span_layer<S>(tracer: SdkTracer) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + Send + Sync + for<'a> LookupSpan<'a>,
{
    let ours = ["penstock", "control_plane", "gateway", "worker", "ctl"];
    // Where in the source, and how long idle, would triple a span's size and tell an operator nothing.
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(ours.iter().fold(Targets::new(), |all, name| {
            all.with_target(*name, LevelFilter::INFO)
        }))
}

impl Telemetry {
    /// How long [`shutdown`](Self::shutdown) waits for a collector.
    pub const SHUTDOWN_LIMIT: Duration = Duration::from_secs(3);

    fn build(config: &TelemetryConfig, environment: &Environment) -> Result<Self, TelemetryError> {
        if let Some((variable, value)) = environment.foreign_protocol.clone() {
            return Err(TelemetryError::Protocol { variable, value });
        }
        let exports = environment.traces_endpoint.is_some() || environment.metrics_endpoint.is_some();
        if exports && tokio::runtime::Handle::try_current().is_err() {
            return Err(TelemetryError::NoRuntime);
        }
        let resource = resource(config, environment);
        let traces = environment
            .traces_endpoint
            .as_deref()
            .map(|at| traces(at, resource.clone()))
            .transpose()?;
        let metrics = match environment.metrics_endpoint.as_deref() {
            Some(endpoint) => Metrics::build(resource, Some(metric_exporter(endpoint)?)),
            None => Metrics::build::<NoExporter>(resource, None),
        };
        Ok(Self {
            traces,
            metrics: metrics.map_err(TelemetryError::Metrics)?,
        })
    }

    /// The process's metrics.
    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// All metrics in Prometheus' text format.
    pub fn prometheus_text(&self) -> String {
        self.metrics.prometheus_text()
    }

    /// True when spans are exported.
    pub fn exports_traces(&self) -> bool {
        self.traces.is_some()
    }

    /// Sends what is left, waiting at most [`SHUTDOWN_LIMIT`](Self::SHUTDOWN_LIMIT) for a collector that does
    /// not answer.
    pub async fn shutdown(self) {
        let (done, finished) = tokio::sync::oneshot::channel();
        // A thread of its own: the flush blocks, and Tokio's runtime would wait for a blocking task of its own
        // without limit.
        let flush = std::thread::Builder::new()
            .name("telemetry-flush".to_owned())
            .spawn(move || {
                if let Some(traces) = &self.traces {
                    let _ = traces.shutdown_with_timeout(Self::SHUTDOWN_LIMIT);
                }
                self.metrics.shutdown(Self::SHUTDOWN_LIMIT);
                let _ = done.send(());
            });
        match flush {
            Ok(_) if tokio::time::timeout(Self::SHUTDOWN_LIMIT, finished).await.is_ok() => {}
            Ok(_) => tracing::warn!("the OTLP collector did not take the last telemetry in time; it is lost"),
            Err(error) => tracing::warn!(%error, "cannot flush telemetry"),
        }
    }
}

fn resource(config: &TelemetryConfig, environment: &Environment) -> Resource {
    let mut builder = Resource::builder();
    if !environment.names_service {
        builder = builder.with_service_name(config.service_name.clone());
    }
    if let Some(id) = &config.service_instance_id {
        builder = builder.with_attribute(KeyValue::new("service.instance.id", id.clone()));
    }
    builder
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build()
}

fn traces(endpoint: &str, resource: Resource) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|cause| TelemetryError::Exporter {
            signal: "traces",
            endpoint: endpoint.to_owned(),
            cause,
        })?;
    Ok(SdkTracerProvider::builder()
        .with_resource(resource)
        .with_batch_exporter(LoggedOnce::new(exporter, "traces", endpoint))
        .build())
}

fn metric_exporter(endpoint: &str) -> Result<LoggedOnce<MetricExporter>, TelemetryError> {
    let exporter = MetricExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|cause| TelemetryError::Exporter {
            signal: "metrics",
            endpoint: endpoint.to_owned(),
            cause,
        })?;
    Ok(LoggedOnce::new(exporter, "metrics", endpoint))
}

#[cfg(test)]
mod tests;
