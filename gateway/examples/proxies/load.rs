//! The client: keeps so many requests in flight and times each.

use std::{
    cell::RefCell,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures_util::future::try_join_all;
use h2::client::SendRequest;
use http::{HeaderValue, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use penstock_proto::{
    metadata,
    v1::{self, generate_request::Input},
};
use prost::Message as _;
use tokio::{net::TcpStream, task::spawn_local};

use crate::{upstream::Asked, wire};

/// HTTP/2 connections of the client.
const CONNECTIONS: usize = 4;
/// Users among whom requests are spread.
const USERS: usize = 4096;

/// How a request is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Grpc,
    Http,
}

/// A kind of load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) protocol: Protocol,
    pub(crate) at_once: usize,
    pub(crate) asked: Asked,
}

/// What was seen of it within the window that was measured.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) requests: u64,
    /// Arrival of the first part of a reply, in µs.
    pub(crate) first: Vec<u32>,
    /// Arrival of its end, in µs.
    pub(crate) whole: Vec<u32>,
    counting: bool,
}

type Tally = Rc<RefCell<Seen>>;

impl Load {
    /// How long one request takes at least.
    pub(crate) fn length(&self) -> Duration {
        self.asked.pace * self.asked.tokens
    }

    /// Loads `address`: after `warm` the window begins, and `at_edge` is called at its begin and its end.
    pub(crate) async fn run<T>(
        &self,
        address: SocketAddr,
        warm: Duration,
        window: Duration,
        mut at_edge: impl FnMut() -> Result<T>,
    ) -> Result<(Seen, T, T)> {
        let tally = Tally::default();
        let callers: Vec<_> = match self.protocol {
            Protocol::Grpc => {
                let connections = (0..CONNECTIONS).map(|_| connect(address));
                let connections = try_join_all(connections).await?;
                (0..self.at_once)
                    .map(|index| {
                        spawn_local(self.grpc(connections[index % CONNECTIONS].clone(), index, tally.clone()))
                    })
                    .collect()
            }
            Protocol::Http => (0..self.at_once)
                .map(|index| spawn_local(self.http(address, index, tally.clone())))
                .collect(),
        };
        tokio::time::sleep(warm).await;
        let before = at_edge()?;
        tally.borrow_mut().counting = true;
        tokio::time::sleep(window).await;
        tally.borrow_mut().counting = false;
        let after = at_edge()?;
        for caller in callers {
            // One that has ended has failed.
            if caller.is_finished() {
                caller.await??;
            } else {
                caller.abort();
            }
        }
        Ok((tally.take(), before, after))
    }

    /// Callers begin one after the other, spread over the length of a request.
    async fn stagger(&self, index: usize) {
        let share = index as f64 / self.at_once as f64;
        tokio::time::sleep(self.length().mul_f64(share)).await;
    }

    fn grpc(
        &self,
        sender: SendRequest<Bytes>,
        index: usize,
        tally: Tally,
    ) -> impl Future<Output = Result<()>> + use<> {
        let load = *self;
        let message = v1::GenerateRequest {
            model: "demo".into(),
            input: Some(Input::Prompt(load.asked.prompt())),
            ..Default::default()
        };
        let message = wire::frame(&message.encode_to_vec());
        async move {
            load.stagger(index).await;
            let mut user = index;
            loop {
                user = (user + load.at_once) % USERS;
                let began = Instant::now();
                let first = call(sender.clone(), message.clone(), user, load.asked.tokens).await?;
                tally.borrow_mut().count(began, first);
            }
        }
    }

    fn http(
        &self,
        address: SocketAddr,
        index: usize,
        tally: Tally,
    ) -> impl Future<Output = Result<()>> + use<> {
        let load = *self;
        async move {
            load.stagger(index).await;
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            spawn_local(connection);
            let mut user = index;
            loop {
                user = (user + load.at_once) % USERS;
                let body = serde_json::json!({
                    "model": "demo",
                    "messages": [{ "role": "user", "content": load.asked.prompt() }],
                    "stream": true,
                    "user": format!("u{user}"),
                });
                let began = Instant::now();
                let first = post(&mut sender, address, body.to_string(), user, load.asked.tokens).await?;
                tally.borrow_mut().count(began, first);
            }
        }
    }
}

impl Seen {
    fn count(&mut self, began: Instant, first: Instant) {
        if self.counting {
            let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
            self.requests += 1;
            self.first.push(micros(first - began));
            self.whole.push(micros(began.elapsed()));
        }
    }
}

/// The value below which this share of the values lies.
pub(crate) fn quantile(values: &mut [u32], share: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    values.sort_unstable();
    let at = (values.len() - 1) as f64 * share;
    f64::from(values[at.round() as usize])
}

async fn connect(address: SocketAddr) -> Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = h2::client::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        .initial_max_send_streams(1024)
        .enable_push(false)
        .handshake(stream)
        .await?;
    spawn_local(connection);
    Ok(sender)
}

/// One gRPC call; gives when its first data came.
async fn call(sender: SendRequest<Bytes>, message: Bytes, user: usize, tokens: u32) -> Result<Instant> {
    let request = Request::post("http://penstock/penstock.v1.Inference/Generate")
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(metadata::USER_ID, format!("u{user}"))
        .body(())?;
    let (response, mut body) = sender.ready().await?.send_request(request, false)?;
    body.send_data(message, true)?;
    let (head, mut reply) = response.await?.into_parts();
    let (mut first, mut messages) = (None, wire::Messages::default());
    while let Some(data) = reply.data().await {
        let data = data?;
        reply.flow_control().release_capacity(data.len())?;
        first.get_or_insert_with(Instant::now);
        messages.push(&data);
    }
    let trailers = reply.trailers().await?;
    let status = trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
    ensure!(
        status.is_some_and(|status| status == "0"),
        "a call ended with {:?} {trailers:?}",
        head.headers
    );
    ensure!(
        messages.count == tokens,
        "a reply has {} messages of {tokens}",
        messages.count
    );
    first.context("a reply without data")
}

/// One chat over HTTP; gives when its first event came.
async fn post(
    sender: &mut http1::SendRequest<Full<Bytes>>,
    address: SocketAddr,
    body: String,
    user: usize,
    tokens: u32,
) -> Result<Instant> {
    let request = Request::post("/v1/chat/completions")
        .header(header::HOST, HeaderValue::try_from(address.to_string())?)
        .header(header::CONTENT_TYPE, "application/json")
        .header(metadata::USER_ID, format!("u{user}"))
        .body(Full::new(Bytes::from(body)))?;
    sender.ready().await?;
    let mut response = sender.send_request(request).await?;
    let (mut first, mut events, mut end) = (None, 0, Vec::new());
    while let Some(frame) = response.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        first.get_or_insert_with(Instant::now);
        events += newlines(&end, &data);
        end.extend_from_slice(&data[data.len().saturating_sub(16)..]);
        end.drain(..end.len().saturating_sub(16));
    }
    if response.status() != 200 || !end.ends_with(b"data: [DONE]\n\n") {
        bail!(
            "HTTP {}: ends with {:?}",
            response.status(),
            String::from_utf8_lossy(&end)
        );
    }
    // The tokens, the chunk before them, the one with the reason of the end, and the last line.
    ensure!(
        events == tokens + 3,
        "a reply has {events} events for {tokens} tokens"
    );
    first.context("a reply without events")
}

/// Events that end in `data`, which follows upon `before`.
fn newlines(before: &[u8], data: &[u8]) -> u32 {
    let split = u32::from(before.ends_with(b"\n") && data.starts_with(b"\n"));
    let inside = data.windows(2).filter(|pair| pair == b"\n\n").count();
    split + u32::try_from(inside).unwrap_or(u32::MAX)
}
