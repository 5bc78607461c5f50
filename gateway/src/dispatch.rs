//! One request to one worker, or to another if the first fails.

mod race;

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Version, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use penstock_proto::{metadata, v1};
use prost::Message as _;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};

use crate::{
    admission::{self, Ask, Permit},
    balance::{self, Glance, Want},
    error,
    forward::{Call, Forwarder, GENERATE, SCORE},
    frames::Message,
    pool::{Lease, Peer, Picked},
    routing::Assigned,
    timeout as grpc_timeout,
};

/// Workers asked at most for one request.
const ATTEMPTS: usize = 3;
/// A reply whose worker was lost waits so long for another one that can be reached.
const PATIENCE: Duration = Duration::from_secs(5);
/// It waits so long for workers that can be reached and have no room.
const QUEUE_PATIENCE: Duration = Duration::from_secs(60);
/// Pause before the workers are asked anew, unless the endpoints change before.
const PAUSE: Duration = Duration::from_millis(100);

/// Headers of one connection, and those that the gateway writes itself; all others pass through.
const OWN: [HeaderName; 21] = [
    header::HOST,
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::TE,
    // Credentials end here, and what a browser says of itself is of no use behind.
    header::AUTHORIZATION,
    header::COOKIE,
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::ACCEPT_LANGUAGE,
    header::EXPECT,
    header::ORIGIN,
    header::REFERER,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("grpc-timeout"),
    HeaderName::from_static("grpc-encoding"),
    HeaderName::from_static("grpc-accept-encoding"),
];

/// A request with all that it takes to send it, as often as need be.
pub(crate) struct Dispatch {
    forwarder: Forwarder,
    method: &'static str,
    /// The caller's headers, without those of its connection, and the trace context.
    headers: HeaderMap,
    message: Message,
    deadline: Option<Instant>,
    assigned: Assigned,
    want: Arc<Want>,
    tenant: u64,
    /// Its room, until it ends.
    permit: Option<Permit>,
    /// Workers that failed.
    tried: HashSet<String>,
}

/// An attempt that brought no reply.
pub(crate) struct Failed {
    status: Status,
    cure: Cure,
}

/// Who may do better than a worker that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cure {
    Nobody,
    Another,
    /// Another worker: this one cannot be reached.
    Unreached,
    /// The worker itself: its connection was closed before it saw the request.
    Same,
}

/// What a worker began to answer.
pub(crate) struct Begun {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Incoming,
    pub(crate) first: Option<Bytes>,
    pub(crate) trailers: Option<HeaderMap>,
}

/// A reply that has begun, from whom, and that worker's count of it.
pub(crate) struct Sent {
    pub(crate) begun: Begun,
    pub(crate) endpoint: String,
    pub(crate) lease: Lease,
}

// === impl Dispatch ===

impl Dispatch {
    pub(crate) fn new(forwarder: Forwarder, call: &Call, assigned: Assigned) -> Self {
        let mut headers = HeaderMap::with_capacity(call.headers.len() + 2);
        for (name, value) in call.headers.iter().filter(|(name, _)| !OWN.contains(name)) {
            headers.append(name, value.clone());
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        // The gateway alone says what is a copy.
        headers.remove(metadata::MIRROR);
        let tenant = admission::tenant(&call.headers, call.peer);
        headers.insert(metadata::TENANT, HeaderValue::from(tenant));
        call.observation.inject(&mut headers);
        let mut dispatch = Self {
            want: Arc::default(),
            method: call.method,
            headers,
            message: call.message.clone(),
            deadline: call.deadline,
            assigned,
            tenant,
            permit: None,
            tried: HashSet::new(),
            forwarder,
        };
        dispatch.want = Arc::new(dispatch.wanted());
        dispatch
    }

    /// The same request with another message for another revision.
    pub(crate) fn copied(&self, assigned: Assigned, message: Message) -> Self {
        let mut copy = Self {
            forwarder: self.forwarder.clone(),
            headers: self.headers.clone(),
            want: Arc::default(),
            tried: HashSet::new(),
            permit: None,
            assigned,
            message,
            ..*self
        };
        copy.want = Arc::new(copy.wanted());
        copy
    }

    pub(crate) fn assigned(&self) -> &Assigned {
        &self.assigned
    }

    pub(crate) fn message(&self) -> &Message {
        &self.message
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether tokens come back.
    pub(crate) fn generates(&self) -> bool {
        self.method == GENERATE
    }

    /// Whether a model computes the reply, so that load and cached prefixes matter.
    fn computes(&self) -> bool {
        self.generates() || self.method == SCORE
    }

    /// Counts the request against its tenant's rates.
    pub(crate) fn charge(&self) -> Result<(), Status> {
        match self.computes() {
            true => self.forwarder.admission.charge(self.tenant, self.want.tokens),
            false => Ok(()),
        }
    }

    /// Waits for room at the workers.
    pub(crate) async fn admit(&mut self) -> Result<(), Status> {
        if self.computes() {
            let ask = Ask {
                tenant: self.tenant,
                tokens: self.want.tokens,
                deadline: self.deadline,
                limit: self.forwarder.pool.limit(self.assigned.endpoints(), &self.want),
            };
            let admission = self.forwarder.admission.clone();
            self.permit = Some(admission.admit(self.want.namespace, ask).await?);
        }
        Ok(())
    }

    /// The request has ended, and was so many tokens.
    pub(crate) fn settle(&self, tokens: u64) {
        self.refresh();
        self.forwarder
            .admission
            .correct(self.tenant, self.want.tokens, tokens);
    }

    /// Tells those who wait what was learnt from this request.
    fn refresh(&self) {
        if let Some(permit) = &self.permit {
            permit.refresh(self.forwarder.pool.limit(self.assigned.endpoints(), &self.want));
        }
    }

    /// The worker that is to be asked next.
    pub(crate) fn pick(&self) -> Option<Picked> {
        let endpoints = self.assigned.endpoints();
        self.forwarder.pool.pick(endpoints, &self.tried, &self.want)
    }

    /// Counts the request where it was picked for.
    pub(crate) fn lease(&self, picked: &Picked) -> Lease {
        self.forwarder.pool.lease(picked, &self.want)
    }

    /// Sends the request and waits for the first part of the reply; `note` hears of each worker that is asked, and
    /// how many were before.
    pub(crate) async fn send(&mut self, mut note: impl FnMut(&str, usize)) -> Result<Sent, Status> {
        let (mut last, mut asked, mut tries) = (None, 0, 0);
        while asked < ATTEMPTS {
            let Some(picked) = self.pick() else { break };
            note(&picked.endpoint, tries);
            tries += 1;
            let (sent, failures) = self.race(&picked).await;
            let mut again = true;
            for (picked, failed) in failures {
                self.failed(&picked, &failed);
                again &= match failed.cure {
                    Cure::Nobody => false,
                    Cure::Another => self.forwarder.budget.spend(),
                    // Nobody has worked for it.
                    Cure::Unreached | Cure::Same => true,
                };
                // Of workers that are gone there is one less each time.
                asked += usize::from(failed.cure != Cure::Unreached);
                last = Some(failed.status);
            }
            if let Some(sent) = sent {
                self.refresh();
                return Ok(sent);
            }
            if !again {
                break;
            }
        }
        Err(last.unwrap_or_else(|| {
            error::unavailable(format!(
                "no worker serves {}@{} now",
                self.assigned.model, self.assigned.revision.name
            ))
        }))
    }

    /// Goes on with a reply whose worker was lost, at whoever serves the same revision. `addition` says what the client
    /// has of it, `why` what happened. Waits for a worker for a while: one may be about to come back. A worker that has
    /// taken the request may let it queue until the request's own deadline, as any other.
    pub(crate) async fn resume(mut self, addition: Message, why: Status) -> (Self, Result<Sent, Status>) {
        let original = self.message.clone();
        self.message = original.with(&addition);
        let result = self.ask_until_taken(why).await;
        self.message = original;
        (self, result)
    }

    /// The worker was lost in the middle of a reply.
    pub(crate) fn lost(&mut self, endpoint: &str, lease: &Lease) {
        lease.lost();
        self.tried.insert(endpoint.to_owned());
    }

    async fn ask_until_taken(&mut self, why: Status) -> Result<Sent, Status> {
        let mut view = self.forwarder.view.clone();
        let since = Instant::now();
        let mut patience = PATIENCE;
        while since.elapsed() < patience {
            self.assigned.refresh(view.borrow_and_update().clone());
            if let Some(picked) = self.pick() {
                match self.attempt(&picked).await {
                    Ok(sent) => return Ok(sent),
                    // A queue that is full now will have room: nobody gains if the reply is thrown away.
                    Err(failed) if failed.cure != Cure::Nobody || is_transient(failed.status.code()) => {
                        if failed.status.code() == Code::ResourceExhausted {
                            patience = QUEUE_PATIENCE;
                        }
                        self.failed(&picked, &failed);
                    }
                    Err(failed) => return Err(failed.status),
                }
            } else {
                // Everybody failed: perhaps somebody is back.
                self.tried.clear();
                // Without a control plane the view never changes.
                let changed = async {
                    if view.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    _ = changed => {}
                    () = sleep(PAUSE) => {}
                }
            }
        }
        Err(why)
    }

    async fn attempt(&self, picked: &Picked) -> Result<Sent, Failed> {
        let lease = self.lease(picked);
        let endpoint = &picked.endpoint;
        let mut sender = picked.peer.sender().await.map_err(|error| Failed {
            status: error::unavailable(format!("worker {endpoint} cannot be reached: {error}")),
            cure: Cure::Unreached,
        })?;
        let request = self.request(&picked.peer)?;
        let response = sender.send_request(request).await.map_err(|error| Failed {
            status: error::unavailable(format!("worker {endpoint} did not answer: {error}")),
            cure: match error.is_canceled() || error.is_closed() {
                true => Cure::Same,
                false => Cure::Another,
            },
        })?;
        let (parts, body) = response.into_parts();
        if parts.status != http::StatusCode::OK {
            let message = format!("worker {endpoint} answered with HTTP status {}", parts.status);
            return Err(Failed {
                status: error::unavailable(message),
                cure: Cure::Another,
            });
        }
        let begun = begin(endpoint, parts.headers, body)
            .await
            .map_err(|failed| self.blamed(failed))?;
        picked.peer.began(&self.want);
        Ok(Sent {
            begun,
            endpoint: endpoint.clone(),
            lease,
        })
    }

    /// A worker says that it failed also where it cannot read the request; requests are not read before, since nearly
    /// all can be.
    fn blamed(&self, failed: Failed) -> Failed {
        if !error::is_workers(failed.status.code()) {
            return failed;
        }
        let payload = self.message.payload();
        let read = match self.method {
            GENERATE => v1::GenerateRequest::decode(payload).map(drop),
            SCORE => v1::ScoreRequest::decode(payload).map(drop),
            _ => v1::TokenizeRequest::decode(payload).map(drop),
        };
        match read {
            Ok(()) => failed,
            Err(error) => Failed {
                status: Status::invalid_argument(format!("the request cannot be read: {error}")),
                cure: Cure::Nobody,
            },
        }
    }

    fn failed(&mut self, picked: &Picked, failed: &Failed) {
        tracing::debug!(
            endpoint = picked.endpoint,
            error = failed.status.message(),
            "a worker did not take a request"
        );
        match failed.status.code() {
            _ if failed.cure == Cure::Same => {}
            _ if failed.cure != Cure::Nobody => picked.peer.eject(),
            code if error::is_workers(code) => picked.peer.failed(),
            Code::ResourceExhausted => picked.peer.refused(&self.want),
            _ => picked.peer.succeeded(),
        }
        if failed.cure != Cure::Same {
            self.tried.insert(picked.endpoint.clone());
        }
    }

    /// What the request wants of a worker. Only prompts that are computed are read: a worker that tokenizes
    /// remembers nothing.
    fn wanted(&self) -> Want {
        let glance = self.computes().then(|| Glance::of(self.message.payload()));
        let session = self.headers.get(metadata::SESSION_ID).map(HeaderValue::as_bytes);
        let namespace = balance::hash(0, self.assigned.revision.digest.as_bytes());
        self.forwarder
            .pool
            .balancer()
            .want(&glance.flatten().unwrap_or_default(), namespace, session)
    }

    /// The request as it goes to a worker.
    pub(crate) fn request(&self, peer: &Peer) -> Result<Request<Full<Bytes>>, Failed> {
        let address = peer.address();
        let uri = format!("http://{address}/penstock.v1.Inference/{}", self.method);
        let built = Request::post(uri)
            .version(Version::HTTP_2)
            .body(Full::new(self.message.framed()));
        let mut request = built.map_err(|error| Failed {
            status: Status::internal(format!("{address:?} cannot be asked: {error}")),
            cure: Cure::Another,
        })?;
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        self.assigned.tell(headers);
        if let Some(at) = self.deadline {
            let left = at.saturating_duration_since(Instant::now());
            headers.insert("grpc-timeout", grpc_timeout::format(left));
        }
        Ok(request)
    }
}

/// Whether another worker, or the same one later, may do better.
fn is_transient(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::ResourceExhausted | Code::FailedPrecondition
    )
}

/// Waits for the first data: until then another worker can take over without anybody noticing.
async fn begin(endpoint: &str, headers: HeaderMap, mut body: Incoming) -> Result<Begun, Failed> {
    if let Some(status) = Status::from_header_map(&headers) {
        ended(status)?;
        let trailers = Some(HeaderMap::from_iter([(
            Status::GRPC_STATUS,
            HeaderValue::from_static("0"),
        )]));
        return Ok(Begun {
            headers,
            body,
            first: None,
            trailers,
        });
    }
    let gone = |why: String| Failed {
        status: error::unavailable(format!("worker {endpoint} ended before its first token: {why}")),
        cure: Cure::Another,
    };
    loop {
        let frame = match body.frame().await {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Err(gone(error.to_string())),
            None => return Err(gone("it sent no status".into())),
        };
        match frame.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) => {
                return Ok(Begun {
                    headers,
                    body,
                    first: Some(data),
                    trailers: None,
                });
            }
            Err(frame) => {
                let trailers = frame.into_trailers().unwrap_or_default();
                ended(
                    Status::from_header_map(&trailers)
                        .unwrap_or_else(|| Status::unknown("the worker sent no status")),
                )?;
                return Ok(Begun {
                    headers,
                    body,
                    first: None,
                    trailers: Some(trailers),
                });
            }
        }
    }
}

/// A status before the first data.
fn ended(status: Status) -> Result<(), Failed> {
    match status.code() {
        Code::Ok => Ok(()),
        code => Err(Failed {
            status,
            cure: match code {
                Code::Unavailable => Cure::Another,
                _ => Cure::Nobody,
            },
        }),
    }
}
