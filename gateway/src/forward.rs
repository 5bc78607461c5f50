//! One request to one worker, or to another if the first fails before it has sent anything.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::extract::ConnectInfo;
use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Request, Version, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use penstock_client::View;
use penstock_plan::Endpoint;
use penstock_proto::metadata;
use penstock_telemetry::instruments::GatewayMetrics;
use tokio::{sync::watch, time::Instant};
use tonic::{Code, Status};

use crate::{
    balance::{self, Glance, Want},
    counts::Ledger,
    error,
    feedback::Judged,
    frames::Message,
    observe::Observation,
    overrides::Overrides,
    pool::{Lease, Peer, Pool},
    relay::Relay,
    routing::{self, Assigned, Caller},
    shadow::{self, Shadow, Shadows},
    timeout,
};

/// Name of the method that generates.
pub(crate) const GENERATE: &str = "Generate";
/// Workers asked at most for one request.
const ATTEMPTS: usize = 3;

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

/// Sends requests to workers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Forwarder {
    pub(crate) view: watch::Receiver<Arc<View>>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) metrics: GatewayMetrics,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) overrides: Arc<Overrides>,
    pub(crate) shadows: Arc<Shadows>,
    pub(crate) judged: Arc<Judged>,
    /// For requests whose caller does not say how long it waits.
    pub(crate) default_timeout: Duration,
}

/// A call of a method of `Inference`.
pub(crate) struct Call {
    /// Name of the method, e.g. `Generate`.
    pub(crate) method: &'static str,
    /// The caller's headers, read for assignment and passed on.
    pub(crate) headers: HeaderMap,
    /// Address of the other end of the caller's connection.
    pub(crate) peer: Option<IpAddr>,
    pub(crate) message: Message,
    pub(crate) deadline: Option<Instant>,
    pub(crate) observation: Observation,
}

/// A reply that has begun.
pub(crate) struct Reply {
    /// The worker's response metadata.
    pub(crate) headers: HeaderMap,
    pub(crate) assigned: Assigned,
    pub(crate) body: Relay,
}

/// An attempt that brought no reply.
struct Failed {
    status: Status,
    /// Another worker may do better.
    retry: bool,
    /// The worker itself may do better: its connection was closed before it saw the request.
    unseen: bool,
}

/// What a worker began to answer.
struct Begun {
    headers: HeaderMap,
    body: Incoming,
    first: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

/// A reply that has begun, from whom, and that worker's count of it.
struct Sent {
    begun: Begun,
    endpoint: String,
    lease: Lease,
}

impl Forwarder {
    /// The view in force.
    pub(crate) fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Assigns the request, sends it and waits for the first part of the reply.
    ///
    /// A status before that is an error here; it carries the assignment, if there is one, in its metadata.
    pub(crate) async fn call(&self, mut call: Call) -> Result<Reply, Status> {
        match self.serve(&mut call).await {
            Ok((assigned, sent)) => Ok(Reply {
                headers: sent.begun.headers,
                assigned,
                body: Relay::new(
                    sent.begun.body,
                    sent.begun.first,
                    sent.begun.trailers,
                    call.deadline,
                    sent.endpoint,
                    call.observation,
                    sent.lease,
                ),
            }),
            Err(status) => {
                call.observation.failed(&status);
                Err(status)
            }
        }
    }

    async fn serve(&self, call: &mut Call) -> Result<(Assigned, Sent), Status> {
        let asked = call.message.model()?;
        let assigned = routing::assign(&self.view(), &self.overrides, asked, call.caller())?;
        let counts = assigned.counts(&self.ledger);
        call.observation.assigned(&assigned, counts);
        if asked != assigned.model {
            call.message = call.message.with_model(&assigned.model);
        }
        let deadline = call.deadline;
        let sending = self.send(call, &assigned);
        let sent = match deadline {
            Some(at) => tokio::time::timeout_at(at, sending)
                .await
                .unwrap_or_else(|_| Err(error::deadline())),
            None => sending.await,
        };
        match sent {
            Ok(sent) => {
                self.mirror(call, &assigned);
                Ok((assigned, sent))
            }
            Err(status) => Err(assigned.told(status)),
        }
    }

    /// Sends a copy to the canary, if the route wants one and there is room. The client's own request is served
    /// already, and whatever becomes of the copy is nothing to it.
    fn mirror(&self, call: &Call, assigned: &Assigned) {
        if call.method != GENERATE {
            return;
        }
        let copy = || {
            let (copy, most) = assigned.mirrored(rand::random_range(0..1_000_000))?;
            let permit = self.shadows.room()?;
            let want = Arc::new(self.want(call, &copy));
            let picked = self.pool.pick(copy.endpoints(), &HashSet::new(), &want)?;
            let message = shadow::shortened(&call.message, most)?;
            Some(Shadow {
                request: request(picked.peer.address(), call, &message, &copy).ok()?,
                counts: copy.counts(&self.ledger),
                lease: self.pool.lease(&picked, &want),
                peer: picked.peer,
                permit,
            })
        };
        if let Some(shadow) = copy() {
            self.shadows.cast(shadow);
        }
    }

    /// What the request wants of a worker. Only prompts of Generate are read: a worker that tokenizes remembers
    /// nothing.
    fn want(&self, call: &Call, assigned: &Assigned) -> Want {
        let glance = (call.method == GENERATE).then(|| Glance::of(call.message.payload()));
        let session = call.headers.get(metadata::SESSION_ID).map(HeaderValue::as_bytes);
        let namespace = balance::hash(0, assigned.revision.digest.as_bytes());
        self.pool
            .balancer()
            .want(&glance.flatten().unwrap_or_default(), namespace, session)
    }

    async fn send(&self, call: &mut Call, assigned: &Assigned) -> Result<Sent, Status> {
        let want = Arc::new(self.want(call, assigned));
        let mut tried = HashSet::new();
        let mut last = None;
        for attempt in 0..ATTEMPTS {
            let Some(picked) = self.pool.pick(assigned.endpoints(), &tried, &want) else {
                break;
            };
            let (endpoint, peer) = (picked.endpoint, &picked.peer);
            if attempt > 0 {
                call.observation.retried(&assigned.model);
            }
            call.observation.sent_to(&endpoint.id);
            let lease = self.pool.lease(&picked, &want);
            match attempt_on(peer, endpoint, call, assigned).await {
                Ok(begun) => {
                    return Ok(Sent {
                        begun,
                        endpoint: endpoint.id.clone(),
                        lease,
                    });
                }
                Err(failed) if !failed.retry => return Err(failed.status),
                Err(failed) => {
                    tracing::debug!(
                        endpoint = endpoint.id,
                        error = failed.status.message(),
                        "a worker did not take a request"
                    );
                    if !failed.unseen {
                        peer.cool();
                        tried.insert(endpoint.id.clone());
                    }
                    last = Some(failed.status);
                }
            }
        }
        Err(last.unwrap_or_else(|| {
            error::unavailable(format!(
                "no worker serves {}@{} now",
                assigned.model, assigned.revision.name
            ))
        }))
    }
}

impl Call {
    fn caller(&self) -> Caller<'_> {
        Caller {
            headers: &self.headers,
            peer: self.peer,
        }
    }
}

/// The other end of a request's connection.
pub(crate) fn peer(extensions: &Extensions) -> Option<IpAddr> {
    let ConnectInfo(peer) = extensions.get::<ConnectInfo<SocketAddr>>()?;
    Some(peer.ip())
}

async fn attempt_on(
    peer: &Peer,
    endpoint: &Endpoint,
    call: &Call,
    assigned: &Assigned,
) -> Result<Begun, Failed> {
    let mut sender = peer.sender().await.map_err(|error| Failed {
        status: error::unavailable(format!("worker {} cannot be reached: {error}", endpoint.id)),
        retry: true,
        unseen: false,
    })?;
    let request = request(peer.address(), call, &call.message, assigned)?;
    let response = sender.send_request(request).await.map_err(|error| Failed {
        status: error::unavailable(format!("worker {} did not answer: {error}", endpoint.id)),
        retry: true,
        unseen: error.is_canceled() || error.is_closed(),
    })?;
    let (parts, body) = response.into_parts();
    if parts.status != http::StatusCode::OK {
        let message = format!(
            "worker {} answered with HTTP status {}",
            endpoint.id, parts.status
        );
        return Err(Failed {
            status: error::unavailable(message),
            retry: true,
            unseen: false,
        });
    }
    begin(endpoint, parts.headers, body).await
}

/// Waits for the first data: until then another worker can take over without anybody noticing.
async fn begin(endpoint: &Endpoint, headers: HeaderMap, mut body: Incoming) -> Result<Begun, Failed> {
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
        status: error::unavailable(format!(
            "worker {} ended before its first token: {why}",
            endpoint.id
        )),
        retry: true,
        unseen: false,
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
            retry: code == Code::Unavailable,
            unseen: false,
        }),
    }
}

fn request(
    address: &str,
    call: &Call,
    message: &Message,
    assigned: &Assigned,
) -> Result<Request<Full<Bytes>>, Failed> {
    let uri = format!("http://{address}/penstock.v1.Inference/{}", call.method);
    let built = Request::post(uri)
        .version(Version::HTTP_2)
        .body(Full::new(message.framed()));
    let mut request = built.map_err(|error| Failed {
        status: Status::internal(format!("{address:?} cannot be asked: {error}")),
        retry: true,
        unseen: false,
    })?;
    let headers = request.headers_mut();
    for (name, value) in call.headers.iter().filter(|(name, _)| !OWN.contains(name)) {
        headers.append(name, value.clone());
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    // The gateway alone says what is a copy.
    headers.remove(metadata::MIRROR);
    assigned.tell(headers);
    call.observation.inject(headers);
    if let Some(at) = call.deadline {
        headers.insert(
            "grpc-timeout",
            timeout::format(at.saturating_duration_since(Instant::now())),
        );
    }
    Ok(request)
}
