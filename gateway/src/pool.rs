//! HTTP/2 connections to workers, and the load of each.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant as StdInstant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use penstock_plan::Endpoint;
use penstock_proto::v1::RequestStats;
use penstock_telemetry::Batched;
use tokio::{net::TcpStream, time::Instant};

use crate::balance::{self, Balancer, Breaker, Candidate, Ended, Expected, Life, Limit, Load, Policy, Want};

/// Connections to each worker: more than one, so that one lost packet does not hold up every stream.
const CONNECTIONS: usize = 2;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Streams on one connection before the worker has said how many it takes.
const FIRST_STREAMS: usize = 1024;
/// A worker that answers no ping is gone, and its streams fail instead of hanging.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Revisions of one worker whose limits are remembered at most.
const SHARES: usize = 64;
/// Chunks of prompts that the index remembers at most: about 12 MB.
const NODES: usize = 1 << 17;

type Sender = SendRequest<Full<Bytes>>;

/// Every worker that requests were sent to.
#[derive(Debug)]
pub(crate) struct Pool {
    balancer: Arc<Balancer>,
    /// Tokens in flight at one worker at most.
    most_tokens: u64,
    /// By address.
    peers: Mutex<HashMap<String, Arc<Peer>>>,
}

/// One worker.
#[derive(Debug)]
pub(crate) struct Peer {
    address: String,
    load: Mutex<Load>,
    /// By revision: each has an engine and a queue of its own.
    shares: Mutex<HashMap<u64, Share>>,
    breaker: Mutex<Breaker>,
    /// When it could not be reached last.
    unreached: Mutex<Option<Instant>>,
    most_tokens: u64,
    next: AtomicUsize,
    connections: [tokio::sync::Mutex<Option<Sender>>; CONNECTIONS],
}

/// What one revision of a worker takes, and has from here, in tokens.
#[derive(Debug, Clone, Copy)]
struct Share {
    limit: Limit,
    in_flight: u64,
}

/// Why a worker cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("no connection within {CONNECT_TIMEOUT:?}")]
    Timeout,
    #[error("{0}")]
    Tcp(#[from] std::io::Error),
    #[error("{0}")]
    Http2(#[from] hyper::Error),
    #[error("it could not be reached a moment ago")]
    JustFailed,
}

/// A worker that was picked for a request.
#[derive(Debug, Clone)]
pub(crate) struct Picked {
    /// Name of the worker.
    pub(crate) endpoint: String,
    pub(crate) peer: Arc<Peer>,
    /// Hash of its name.
    id: u64,
}

/// Counts a request on its worker until it is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    peer: Arc<Peer>,
    balancer: Arc<Balancer>,
    worker: u64,
    /// Tokens in flight there for the same revision when this began, its own included.
    in_flight: u64,
    want: Arc<Want>,
    expected: Expected,
}

// === impl Pool ===

impl Pool {
    pub(crate) fn new(policy: Policy, most_tokens: u64) -> Self {
        Self {
            balancer: Arc::new(Balancer::new(policy, NODES)),
            most_tokens,
            peers: Mutex::default(),
        }
    }

    /// Who chooses.
    pub(crate) fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    /// One of `endpoints`; those in `tried` are out, those that failed a moment ago come last.
    pub(crate) fn pick<'e>(
        &self,
        endpoints: impl Iterator<Item = &'e Endpoint>,
        tried: &HashSet<String>,
        want: &Want,
    ) -> Option<Picked> {
        let mut among: Vec<(&Endpoint, Arc<Peer>)> = endpoints
            .filter(|endpoint| !tried.contains(&endpoint.id))
            .map(|endpoint| (endpoint, self.peer(&endpoint.address)))
            .collect();
        let now = StdInstant::now();
        prefer(&mut among, |peer| !peer.breaker().is_open(now));
        prefer(&mut among, |peer| peer.has_room(want));
        let candidates: Vec<Candidate> = among
            .iter()
            .map(|(endpoint, peer)| Candidate {
                id: balance::hash(0, endpoint.id.as_bytes()),
                load: peer.load().total(want.tokens, now),
            })
            .collect();
        let chosen = self.balancer.choose(want, &candidates, rand::random())?;
        let (endpoint, peer) = among.swap_remove(chosen);
        Some(Picked {
            endpoint: endpoint.id.clone(),
            peer,
            id: candidates[chosen].id,
        })
    }

    /// Counts a request where it was picked for.
    pub(crate) fn lease(&self, picked: &Picked, want: &Arc<Want>) -> Lease {
        let expected = self.balancer.expects(want, picked.id);
        self.balancer.sent(want, picked.id);
        Lease {
            in_flight: picked.peer.begin(want),
            peer: picked.peer.clone(),
            balancer: self.balancer.clone(),
            worker: picked.id,
            want: want.clone(),
            expected,
        }
    }

    /// Tokens in flight that `endpoints` take together; those that fail do not count, if there are others.
    pub(crate) fn limit<'e>(&self, endpoints: impl Iterator<Item = &'e Endpoint>, want: &Want) -> u64 {
        let mut among: Vec<_> = endpoints
            .map(|endpoint| (endpoint, self.peer(&endpoint.address)))
            .collect();
        let now = StdInstant::now();
        prefer(&mut among, |peer| !peer.breaker().is_open(now));
        among.iter().map(|(_, peer)| peer.limit(want.namespace)).sum()
    }

    /// Forgets workers that are gone, with their connections.
    pub(crate) fn retain(&self, endpoints: &[Endpoint]) {
        let known: HashSet<&str> = endpoints
            .iter()
            .map(|endpoint| endpoint.address.as_str())
            .collect();
        // A stream in flight holds its own peer and goes on.
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|address, _| known.contains(address.as_str()));
        let ids: HashSet<u64> = endpoints
            .iter()
            .map(|endpoint| balance::hash(0, endpoint.id.as_bytes()))
            .collect();
        self.balancer.retain(|id| ids.contains(&id));
    }

    /// The worker at `address`.
    pub(crate) fn peer(&self, address: &str) -> Arc<Peer> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get(address) {
            return peer.clone();
        }
        let peer = Arc::new(Peer {
            address: address.to_owned(),
            load: Mutex::new(Load::new(StdInstant::now())),
            shares: Mutex::default(),
            breaker: Mutex::default(),
            unreached: Mutex::default(),
            most_tokens: self.most_tokens,
            next: AtomicUsize::new(0),
            connections: Default::default(),
        });
        peers.insert(address.to_owned(), peer.clone());
        peer
    }
}

// === impl Peer ===

impl Peer {
    /// Its load.
    pub(crate) fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It cannot be reached, or takes no requests: others are asked first for a while.
    pub(crate) fn eject(&self) {
        self.breaker().eject(StdInstant::now());
    }

    /// A request failed by its fault.
    pub(crate) fn failed(&self) {
        self.breaker().failed(StdInstant::now());
    }

    /// It answered as it should.
    pub(crate) fn succeeded(&self) {
        self.breaker().succeeded(StdInstant::now());
    }

    /// It sent the first part of a reply.
    pub(crate) fn began(&self, want: &Want) {
        self.succeeded();
        if let Some(share) = self.shares().get_mut(&want.namespace) {
            share.limit.began(share.in_flight, want.tokens);
        }
    }

    /// Its queue was full.
    pub(crate) fn refused(&self, want: &Want) {
        if let Some(share) = self.shares().get_mut(&want.namespace) {
            share.limit.refused(share.in_flight);
        }
    }

    /// `host:port`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// A connection that is up, opened if need be.
    pub(crate) async fn sender(&self) -> Result<Sender, ConnectError> {
        let began = Instant::now();
        let slot = self.next.fetch_add(1, Ordering::Relaxed) % CONNECTIONS;
        let mut connection = self.connections[slot].lock().await;
        if let Some(sender) = connection.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        // Whoever waited here while somebody else failed has its answer: attempts must not queue up.
        if self.unreached().is_some_and(|since| since >= began) {
            return Err(ConnectError::JustFailed);
        }
        match tokio::time::timeout(CONNECT_TIMEOUT, connect(&self.address))
            .await
            .unwrap_or(Err(ConnectError::Timeout))
        {
            Ok(sender) => {
                *connection = Some(sender.clone());
                Ok(sender)
            }
            Err(error) => {
                *self.unreached() = Some(Instant::now());
                Err(error)
            }
        }
    }

    /// Whether it says that it takes requests.
    pub(crate) async fn serves(&self) -> bool {
        let probe = async {
            let mut sender = self.sender().await.ok()?;
            let uri = format!("http://{}/readyz", self.address);
            let request = http::Request::get(uri).body(Full::default()).ok()?;
            Some(sender.send_request(request).await.ok()?.status() == http::StatusCode::OK)
        };
        tokio::time::timeout(CONNECT_TIMEOUT, probe)
            .await
            .ok()
            .flatten()
            .unwrap_or(false)
    }

    /// Tokens in flight with those of this request.
    fn begin(&self, want: &Want) -> u64 {
        self.load().begin(want.tokens);
        self.breaker().sent(StdInstant::now());
        let mut shares = self.shares();
        if shares.len() >= SHARES && !shares.contains_key(&want.namespace) {
            shares.retain(|_, share| share.in_flight > 0);
        }
        let new = || Share {
            limit: Limit::new(self.most_tokens),
            in_flight: 0,
        };
        let share = shares.entry(want.namespace).or_insert_with(new);
        share.in_flight += want.tokens;
        share.in_flight
    }

    fn end(&self, want: &Want) {
        self.load().end(want.tokens, StdInstant::now());
        if let Some(share) = self.shares().get_mut(&want.namespace) {
            share.in_flight = share.in_flight.saturating_sub(want.tokens);
        }
    }

    fn limit(&self, namespace: u64) -> u64 {
        let shares = self.shares();
        let limit = shares.get(&namespace).map(|share| share.limit);
        limit.unwrap_or(Limit::new(self.most_tokens)).tokens()
    }

    /// Whether it answers and has room, so that it may be asked for what is not needed.
    pub(crate) fn is_spare(&self, want: &Want) -> bool {
        !self.breaker().is_open(StdInstant::now()) && self.has_room(want)
    }

    fn has_room(&self, want: &Want) -> bool {
        let shares = self.shares();
        let room = |share: &Share| share.in_flight + want.tokens <= share.limit.tokens();
        shares.get(&want.namespace).is_none_or(room)
    }

    fn shares(&self) -> MutexGuard<'_, HashMap<u64, Share>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unreached(&self) -> MutexGuard<'_, Option<Instant>> {
        self.unreached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps those that are `good`, unless none is.
fn prefer(among: &mut Vec<(&Endpoint, Arc<Peer>)>, good: impl Fn(&Peer) -> bool) {
    if among.iter().any(|(_, peer)| good(peer)) {
        among.retain(|(_, peer)| good(peer));
    }
}

// === impl Lease ===

impl Lease {
    /// The worker was lost: others are asked first for a while.
    pub(crate) fn lost(&self) {
        self.peer.eject();
    }

    /// The reply ended with an error of the worker's.
    pub(crate) fn failed(&self) {
        self.peer.failed();
    }

    /// What the worker says of the request, which has ended.
    pub(crate) fn learn(&self, stats: &RequestStats) {
        let sequences = u64::from(stats.running) + u64::from(stats.waiting);
        self.peer.load().reported(sequences, StdInstant::now());
        if let Some(share) = self.peer.shares().get_mut(&self.want.namespace) {
            share
                .limit
                .reported(life(stats), self.in_flight, self.want.tokens);
        }
        let ended = Ended {
            prompt_tokens: stats.prompt_tokens,
            cached_tokens: stats.cached_tokens,
            completion_tokens: stats.completion_tokens,
        };
        self.balancer.ended(&self.want, self.worker, self.expected, ended);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.peer.end(&self.want);
    }
}

/// The time that a request had at its worker.
fn life(stats: &RequestStats) -> Life {
    let seconds = |micros: u64| Duration::from_micros(micros).as_secs_f64();
    let decoded = seconds(stats.tpot_us) * f64::from(stats.completion_tokens.saturating_sub(1));
    Life {
        queue_s: seconds(stats.queue_us),
        step_s: seconds(stats.tpot_us),
        total_s: seconds(stats.ttft_us) + decoded,
    }
}

async fn connect(address: &str) -> Result<Sender, ConnectError> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_max_send_streams(FIRST_STREAMS)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .handshake(TokioIo::new(Batched::new(stream)))
        .await?;
    let address = address.to_owned();
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%address, %error, "a connection to a worker ended");
        }
    });
    Ok(sender)
}
