//! A real OTLP receiver: rotel's agent, whose debug log tells every span it was sent.

use crate::{Process, eventually, free_ports, python};
use anyhow::{Context as _, Result};
use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

/// The receiver and what it has received.
#[derive(Debug)]
pub struct OtlpReceiver {
    process: Process,
    port: u16,
}

/// One span as received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReceivedSpan {
    /// Trace id, hex.
    pub trace: String,
    /// Span id, hex.
    pub id: String,
    /// Parent span id, hex; empty for a root.
    pub parent: String,
    /// Name.
    pub name: String,
    /// `service.name` of its resource.
    pub service: String,
    /// Attributes, values as text.
    pub attributes: BTreeMap<String, String>,
}

impl OtlpReceiver {
    /// Starts the receiver.
    pub async fn start(directory: &Path) -> Result<Self> {
        let [port, http] = free_ports()?;
        let agent = agent().await?;
        let mut command = Command::new(agent);
        command
            .args(["start", "--exporter", "blackhole", "--debug-log", "traces"])
            .args(["--debug-log-verbosity", "detailed"])
            .args(["--otlp-grpc-endpoint", &format!("127.0.0.1:{port}")])
            .args(["--otlp-http-endpoint", &format!("127.0.0.1:{http}")]);
        let process = Process::start("otlp-receiver", command, directory)?;
        let receiver = Self { process, port };
        eventually("the OTLP receiver's port", Duration::from_secs(20), || async {
            Ok(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok())
        })
        .await?;
        Ok(receiver)
    }

    /// Environment that makes a process of ours export to this receiver at once.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            (
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                format!("http://127.0.0.1:{}", self.port),
            ),
            ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        ]
    }

    /// Every span received so far.
    pub fn spans(&self) -> Vec<ReceivedSpan> {
        parse(&self.process.output())
    }

    /// Waits until `pick` finds what it looks for among the spans received.
    pub async fn wait_for<T>(&self, what: &str, pick: impl Fn(&[ReceivedSpan]) -> Option<T>) -> Result<T> {
        let found = eventually(what, Duration::from_secs(20), || async {
            Ok(pick(&self.spans()))
        })
        .await;
        found.with_context(|| {
            let spans = self.spans();
            let list: Vec<String> = spans
                .iter()
                .map(|s| format!("{} {} parent {} trace {}", s.service, s.name, s.parent, s.trace))
                .collect();
            format!("received:\n{}", list.join("\n"))
        })
    }
}

async fn agent() -> Result<std::path::PathBuf> {
    let script = "import rotel, os; print(os.path.join(os.path.dirname(rotel.__file__), 'rotel-agent'))";
    let output = tokio::process::Command::new(python()?.join("bin/python"))
        .args(["-c", script])
        .output()
        .await?;
    anyhow::ensure!(
        output.status.success(),
        "rotel is not installed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

fn parse(log: &str) -> Vec<ReceivedSpan> {
    let mut spans: Vec<ReceivedSpan> = Vec::new();
    let mut service = String::new();
    let mut in_span = false;
    for line in log.lines() {
        let trimmed = line.trim();
        if line.starts_with("ResourceSpans #") {
            in_span = false;
            service.clear();
        } else if line.starts_with("Span #") {
            in_span = true;
            spans.push(ReceivedSpan {
                service: service.clone(),
                ..ReceivedSpan::default()
            });
        } else if let Some(attribute) = trimmed.strip_prefix("-> ")
            && let Some((key, value)) = attribute.split_once(": ")
        {
            let value = plain(value);
            match spans.last_mut() {
                Some(span) if in_span => drop(span.attributes.insert(key.to_owned(), value)),
                _ if key == "service.name" => service = value,
                _ => {}
            }
        } else if in_span
            && let Some(span) = spans.last_mut()
            && let Some((key, value)) = trimmed.split_once(':')
        {
            let value = value.trim().to_owned();
            match key.trim() {
                "Trace ID" => span.trace = value,
                "Parent ID" => span.parent = value,
                "ID" => span.id = value,
                "Name" => span.name = value,
                _ => {}
            }
        }
    }
    // The last span may be half written.
    spans.retain(|span| !span.name.is_empty());
    spans
}

/// `Str(v2)` → `v2`.
fn plain(value: &str) -> String {
    match value.split_once('(') {
        Some((_, inner)) => inner.strip_suffix(')').unwrap_or(inner).to_owned(),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_from_the_debug_log() {
        let log = "ResourceSpans #0\nResource attributes:\n     -> service.name: Str(gateway)\nSpan #0\n    Trace ID       : aa\n    Parent ID      : bb\n    ID             : cc\n    Name           : generate demo\nStart time: 1\nAttributes:\n     -> penstock.revision: Str(v2)\n     -> n: Int(3)\nResourceSpans #0\nResource attributes:\n     -> service.name: Str(worker)\nSpan #0\n    Trace ID       : aa\n    Parent ID      : \n    ID             : dd\n    Name           : queue\n";
        let spans = parse(log);
        assert_eq!(spans.len(), 2);
        assert_eq!(
            (spans[0].service.as_str(), spans[0].name.as_str()),
            ("gateway", "generate demo")
        );
        assert_eq!((spans[0].parent.as_str(), spans[0].id.as_str()), ("bb", "cc"));
        assert_eq!(spans[0].attributes["penstock.revision"], "v2");
        assert_eq!(spans[0].attributes["n"], "3");
        assert_eq!(
            (spans[1].service.as_str(), spans[1].parent.as_str()),
            ("worker", "")
        );
    }
}
