//! Log lines on stderr.

use crate::{LogFormat, TelemetryConfig, TelemetryError, config::Environment};
use std::io::IsTerminal as _;
use tracing::Subscriber;
use tracing_subscriber::{EnvFilter, Layer, registry::LookupSpan};

/// The layer that writes log lines. `--log` wins over `RUST_LOG`, and that over the default.
pub(crate) fn layer<S>(
    config: &TelemetryConfig,
    environment: &Environment,
) -> Result<Box<dyn Layer<S> + Send + Sync>, TelemetryError>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let filter = filter(config, environment)?;
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    Ok(match config.log_format {
        LogFormat::Text => layer
            .with_ansi(std::io::stderr().is_terminal())
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => layer.json().with_filter(filter).boxed(),
    })
}

fn filter(config: &TelemetryConfig, environment: &Environment) -> Result<EnvFilter, TelemetryError> {
    let (source, text) = match (&config.log, &environment.rust_log) {
        (Some(log), _) => ("--log", log),
        (None, Some(log)) => ("RUST_LOG", log),
        (None, None) => ("the default log filter", &config.default_log),
    };
    // The SDK logs each batch that it cannot export; our exporters tell it once instead.
    let quiet = if text.contains("opentelemetry") {
        ""
    } else {
        ",opentelemetry=off"
    };
    EnvFilter::try_new(format!("{text}{quiet}")).map_err(|cause| TelemetryError::LogFilter {
        source_name: source,
        value: text.clone(),
        cause,
    })
}
