//! What every process of Penstock tells about itself: traces and metrics over OTLP, `/metrics` for
//! Prometheus, log lines on stderr, and the trace context that travels with each request; and the two ports that
//! every process has.
//!
//! ```text
//!             ┌───────────── init ─────────────┐
//! tracing ──▶ │ fmt layer ──▶ stderr           │
//!  spans      │ OTel layer ─▶ batch ─▶ OTLP    │  only with an endpoint in OTEL_*
//! Metrics ──▶ │ meter ─▶ Prometheus ─▶ /metrics│  always
//!             │       └▶ periodic ──▶ OTLP     │  only with an endpoint in OTEL_*
//!             └────────────────────────────────┘
//! ```
//!
//! Nothing leaves the process unless the standard `OTEL_*` variables name a collector. A collector that is
//! down costs one log line and dropped spans: it neither delays nor fails a request. This crate refuses to
//! know what is measured or why; it holds names, set-up and transport.
//!
//! ```
//! use penstock_telemetry::{Metrics, instruments::{GatewayMetrics, Served}};
//!
//! let metrics = Metrics::local();
//! let gateway = GatewayMetrics::new(&metrics);
//! let served = Served::new("demo", "v1");
//! drop(gateway.in_flight(&served));
//! assert!(metrics.prometheus_text().contains("penstock_inflight"));
//! ```

mod batched;
mod config;
mod export;
pub mod instruments;
pub mod listener;
mod logging;
mod metrics;
pub mod ops;
pub mod propagation;
pub mod semconv;
mod setup;
mod span;

pub use batched::Batched;
pub use config::{LogFormat, TelemetryConfig};
pub use metrics::Metrics;
pub use opentelemetry::{Context, KeyValue};
pub use setup::{Telemetry, TelemetryError, init};
pub use span::{RequestIdentity, record_interval, set_error};
pub use tracing_opentelemetry::OpenTelemetrySpanExt;
