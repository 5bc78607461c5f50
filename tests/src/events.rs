//! Replies that stream over HTTP: server-sent events, read as they come.

use anyhow::{Context as _, Result, bail, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, body::Bytes, body::Incoming};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

/// An HTTP client that keeps its connections. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HttpClient(Client<HttpConnector, Full<Bytes>>);

/// The events of one reply.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    /// Bytes of an event whose end has not come yet.
    read: Vec<u8>,
    /// `[DONE]` was seen.
    done: bool,
}

// === impl HttpClient ===

impl HttpClient {
    /// A client without connections yet.
    pub fn new() -> Self {
        Self(Client::builder(TokioExecutor::new()).build_http())
    }

    /// Posts a JSON body to `path` at `port`; a status other than 200 is an error that holds the reply.
    pub async fn stream(&self, port: u16, path: &str, body: &Value, user: &str) -> Result<Events> {
        let request = Request::post(format!("http://127.0.0.1:{port}{path}"))
            .header("content-type", "application/json")
            .header("x-user-id", user)
            .body(Full::new(body.to_string().into()))?;
        let (parts, body) = self.0.request(request).await?.into_parts();
        if parts.status != 200 {
            let said = body.collect().await?.to_bytes();
            bail!("HTTP status {}: {}", parts.status, String::from_utf8_lossy(&said));
        }
        Ok(Events {
            body,
            read: Vec::new(),
            done: false,
        })
    }
}

impl Default for HttpClient {
    fn default() -> Self {
        Self::new()
    }
}

// === impl Events ===

impl Events {
    /// The next event; none after `[DONE]`, which must be the last one. A reply that breaks off is an error, as is an
    /// event that tells of one.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            if let Some(end) = self.read.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.read.drain(..end + 2).collect();
                let event = std::str::from_utf8(&event[..end])?;
                ensure!(!self.done, "an event after the last one: {event}");
                let data = event
                    .strip_prefix("data: ")
                    .with_context(|| format!("no event: {event:?}"))?;
                if data == "[DONE]" {
                    self.done = true;
                    continue;
                }
                let value: Value = serde_json::from_str(data).with_context(|| data.to_owned())?;
                ensure!(value["error"].is_null(), "the reply broke off: {value}");
                return Ok(Some(value));
            }
            match self.body.frame().await {
                Some(frame) => self.read.extend(frame?.into_data().unwrap_or_default().as_ref()),
                None => {
                    ensure!(
                        self.done && self.read.is_empty(),
                        "the reply ended without [DONE]"
                    );
                    return Ok(None);
                }
            }
        }
    }
}
