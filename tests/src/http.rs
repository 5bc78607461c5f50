//! A small HTTP/1.1 client: `curl`, the client that users copy from the banner.

use anyhow::{Context as _, Result};
use std::time::Duration;
use tokio::process::Command;

/// An HTTP reply.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Headers, lower case names.
    pub headers: Vec<(String, String)>,
    /// Body as text.
    pub body: String,
}

impl Reply {
    /// The body as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.body))
    }

    /// First value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }
}

/// GET.
pub async fn get(url: &str) -> Result<Reply> {
    curl(&[url]).await
}

/// POST of a JSON body.
pub async fn post_json(url: &str, body: &serde_json::Value) -> Result<Reply> {
    post_json_with(url, body, &[]).await
}

/// POST of a JSON body with further headers.
pub async fn post_json_with(url: &str, body: &serde_json::Value, headers: &[(&str, &str)]) -> Result<Reply> {
    let body = body.to_string();
    let headers: Vec<String> = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    let mut arguments = vec![
        url,
        "-H",
        "content-type: application/json",
        "--data-binary",
        &body,
    ];
    for header in &headers {
        arguments.extend(["-H", header]);
    }
    curl(&arguments).await
}

async fn curl(arguments: &[&str]) -> Result<Reply> {
    let mut command = Command::new("curl");
    command
        .args(["-sS", "-i", "--http1.1", "--noproxy", "*", "--max-time", "60"])
        .args(arguments)
        .kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(70), command.output()).await??;
    anyhow::ensure!(
        output.status.success(),
        "curl: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(text: &str) -> Result<Reply> {
    let mut rest = text;
    loop {
        let (head, body) = rest.split_once("\r\n\r\n").context("reply without a head")?;
        let mut lines = head.split("\r\n");
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .context("reply without a status")?;
        let status: u16 = status.parse()?;
        // `100 Continue` precedes the reply proper.
        if status == 100 {
            rest = body;
            continue;
        }
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        return Ok(Reply {
            status,
            headers,
            body: body.to_owned(),
        });
    }
}
