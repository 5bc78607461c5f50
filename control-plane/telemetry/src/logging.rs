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

#[cfg(test)]
mod tests {
    use super::*;

    fn text(log: Option<&str>, rust_log: Option<&str>) -> String {
        let config = TelemetryConfig {
            log: log.map(str::to_owned),
            ..TelemetryConfig::new("t")
        };
        let environment = Environment {
            rust_log: rust_log.map(str::to_owned),
            ..Environment::default()
        };
        match filter(&config, &environment) {
            Ok(filter) => filter.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_command_line_wins_over_the_environment_and_that_over_the_default() {
        assert!(text(Some("error"), Some("debug")).contains("error"));
        assert!(!text(Some("error"), Some("debug")).contains("debug"));
        assert!(text(None, Some("debug")).contains("debug"));
        assert!(text(None, None).contains("penstock=info"));
    }

    #[test]
    fn the_sdks_own_log_is_off_unless_it_is_asked_for() {
        assert!(text(None, None).contains("opentelemetry=off"));
        assert!(!text(Some("opentelemetry=debug"), None).contains("opentelemetry=off"));
    }

    #[test]
    fn a_bad_filter_is_named_with_its_source() {
        let error = text(None, Some("gateway=loud"));
        assert!(
            error.contains("RUST_LOG") && error.contains("`gateway=loud`"),
            "{error}"
        );
    }
}
