//! Where telemetry goes: what the process says of itself, and the standard `OTEL_*` variables.

use std::str::FromStr;

/// What a process says of itself when it starts telemetry.
#[derive(Debug, Clone)]
pub struct TelemetryConfig {
    /// `service.name` of the resource, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` name another.
    pub service_name: String,
    /// `service.instance.id` of the resource; a process passes its boot id.
    pub service_instance_id: Option<String>,
    /// Log filter given on the command line; wins over `RUST_LOG`.
    pub log: Option<String>,
    /// Log filter where neither the command line nor `RUST_LOG` gives one.
    pub default_log: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

impl TelemetryConfig {
    /// Log filter of a server: our own crates tell what they do, others only what is wrong.
    pub const DEFAULT_LOG: &str = "warn,penstock=info,control_plane=info,gateway=info,worker=info";

    /// Telemetry of the service `service_name`, with a server's log filter.
    pub fn new(service_name: impl Into<String>) -> Self {
        Self {
            service_name: service_name.into(),
            service_instance_id: None,
            log: None,
            default_log: Self::DEFAULT_LOG.to_owned(),
            log_format: LogFormat::default(),
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line for a reader.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("`{other}` is no log format: say `text` or `json`")),
        }
    }
}

/// What the environment says about telemetry. The SDK itself reads the rest: OTEL_SERVICE_NAME,
/// OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER[_ARG], OTEL_BSP_*, OTEL_METRIC_EXPORT_INTERVAL,
/// OTEL_EXPORTER_OTLP_{HEADERS,TIMEOUT,COMPRESSION} and the span limits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    pub(crate) traces_endpoint: Option<String>,
    pub(crate) metrics_endpoint: Option<String>,
    /// A protocol that was asked for and is not gRPC.
    pub(crate) foreign_protocol: Option<(String, String)>,
    /// True when the operator, not our caller, chose `service.name`.
    pub(crate) names_service: bool,
    pub(crate) rust_log: Option<String>,
}

impl Environment {
    /// Reads the process's environment.
    pub(crate) fn read() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// Reads an environment given as a function; an empty variable counts as unset, as the OTel
    /// specification has it.
    pub(crate) fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let disabled = get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let endpoint = |signal: &str| {
            let exports = get(&format!("OTEL_{signal}_EXPORTER")).is_none_or(|exporter| exporter == "otlp");
            let endpoint = get(&format!("OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"))
                .or_else(|| get("OTEL_EXPORTER_OTLP_ENDPOINT"));
            endpoint.filter(|_| exports && !disabled)
        };
        let (traces_endpoint, metrics_endpoint) = (endpoint("TRACES"), endpoint("METRICS"));
        let exports = traces_endpoint.is_some() || metrics_endpoint.is_some();
        let protocol = |name: &str| {
            get(name)
                .filter(|value| exports && value != "grpc")
                .map(|value| (name.to_owned(), value))
        };
        Self {
            traces_endpoint,
            metrics_endpoint,
            foreign_protocol: protocol("OTEL_EXPORTER_OTLP_PROTOCOL")
                .or_else(|| protocol("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"))
                .or_else(|| protocol("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL")),
            names_service: get("OTEL_SERVICE_NAME").is_some()
                || get("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|list| {
                    list.split(',').any(|pair| {
                        pair.split('=')
                            .next()
                            .is_some_and(|key| key.trim() == "service.name")
                    })
                }),
            rust_log: get("RUST_LOG"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        let map: HashMap<String, String> = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Environment::from_lookup(|name| map.get(name).cloned())
    }

    #[test]
    fn an_empty_environment_exports_nothing() {
        assert_eq!(environment(&[]), Environment::default());
        assert_eq!(
            environment(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]),
            Environment::default()
        );
    }

    #[test]
    fn one_endpoint_serves_both_signals_and_a_signals_own_wins() {
        let env = environment(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://both:4317"),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://metrics:4317"),
        ]);
        assert_eq!(env.traces_endpoint.as_deref(), Some("http://both:4317"));
        assert_eq!(env.metrics_endpoint.as_deref(), Some("http://metrics:4317"));
        let env = environment(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:4317")]);
        assert_eq!(env.traces_endpoint.as_deref(), Some("http://traces:4317"));
        assert_eq!(env.metrics_endpoint, None);
    }

    #[test]
    fn a_disabled_sdk_or_exporter_exports_nothing() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://both:4317");
        let env = environment(&[endpoint, ("OTEL_SDK_DISABLED", "TRUE")]);
        assert_eq!((env.traces_endpoint, env.metrics_endpoint), (None, None));
        let env = environment(&[endpoint, ("OTEL_METRICS_EXPORTER", "none")]);
        assert!(env.traces_endpoint.is_some() && env.metrics_endpoint.is_none());
    }

    #[test]
    fn a_protocol_other_than_grpc_is_told() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://both:4318");
        let env = environment(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]);
        assert_eq!(
            env.foreign_protocol,
            Some(("OTEL_EXPORTER_OTLP_PROTOCOL".into(), "http/protobuf".into()))
        );
        assert_eq!(
            environment(&[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).foreign_protocol,
            None
        );
        assert_eq!(
            environment(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")]).foreign_protocol,
            None
        );
    }

    #[test]
    fn the_operators_service_name_is_noticed_in_both_variables() {
        assert!(environment(&[("OTEL_SERVICE_NAME", "x")]).names_service);
        assert!(environment(&[("OTEL_RESOURCE_ATTRIBUTES", "a=b, service.name=x")]).names_service);
        assert!(!environment(&[("OTEL_RESOURCE_ATTRIBUTES", "a=service.name")]).names_service);
    }

    #[test]
    fn log_formats_parse_and_others_are_named() {
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        assert!("xml".parse::<LogFormat>().unwrap_err().contains("`xml`"));
    }
}
