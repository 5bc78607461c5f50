//! A worker's reply on its way to the caller, undecoded. Bytes that are ready together leave together. If the worker is
//! lost, another one goes on with the reply, and the caller notices nothing.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use penstock_proto::{metadata, v1::RequestStats};
use prost::Message as _;
use tokio::time::Sleep;
use tonic::{Code, Status, metadata::MetadataMap};

use crate::{
    dispatch::{Dispatch, Sent},
    error,
    held::{self, Held, Rest},
    observe::Observation,
    pool::Lease,
};

/// Bytes joined into one frame at most.
const COALESCE: usize = 16 << 10;
/// Times that one reply goes on elsewhere at most: one that takes its workers down with it must end.
const MOST_RESUMES: u32 = 3;

/// The body of a reply. It always ends with trailers that hold a status, whatever happens to the worker.
/// Dropping it resets the worker's stream, which ends the sequence there.
pub(crate) struct Relay {
    upstream: Option<Incoming>,
    /// Read already, to learn whether the worker serves at all.
    first: Option<Bytes>,
    trailers: Option<HeaderMap>,
    deadline: Option<Pin<Box<Sleep>>>,
    endpoint: String,
    observation: Observation,
    lease: Option<Lease>,
    /// What it takes to go on elsewhere; only for replies that generate.
    spare: Option<Box<Spare>>,
    resuming: Option<Resuming>,
    done: bool,
}

/// What it takes to go on elsewhere.
struct Spare {
    dispatch: Option<Dispatch>,
    held: Held,
    /// The seed that the first worker used.
    seed: Option<u64>,
    resumes: u32,
}

type Resuming = Pin<Box<dyn Future<Output = (Dispatch, Result<Sent, Status>)> + Send>>;

impl Relay {
    /// `seed` is the one that the worker used.
    pub(crate) fn new(
        sent: Sent,
        seed: Option<u64>,
        dispatch: Dispatch,
        mut observation: Observation,
    ) -> Self {
        let Sent {
            begun,
            endpoint,
            lease,
        } = sent;
        if begun.first.is_some() {
            observation.first_data();
        }
        Self {
            upstream: Some(begun.body),
            first: begun.first,
            trailers: begun.trailers,
            deadline: dispatch
                .deadline()
                .map(|at| Box::pin(tokio::time::sleep_until(at))),
            endpoint,
            observation,
            lease: Some(lease),
            spare: dispatch.generates().then(|| {
                Box::new(Spare {
                    dispatch: Some(dispatch),
                    held: Held::default(),
                    seed,
                    resumes: 0,
                })
            }),
            resuming: None,
            done: false,
        }
    }

    /// The reply cannot be understood: it counts as failed, and its worker's stream ends.
    pub(crate) fn refuse(&mut self, status: &Status) {
        self.observation.failed(status);
        self.spare = None;
        self.lease = None;
        self.upstream = None;
        self.resuming = None;
        self.done = true;
    }

    /// Ends the reply with a status of the gateway's own.
    fn fail(&mut self, status: &Status) {
        self.upstream = None;
        self.lease = None;
        self.resuming = None;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            trailers.insert(Status::GRPC_STATUS, i32::from(status.code()).into());
        }
        self.trailers = Some(trailers);
    }

    fn gone(&mut self, why: &str) {
        let message = format!("worker {} ended in the middle of the reply: {why}", self.endpoint);
        self.lost(error::unavailable(message));
    }

    /// The worker cannot go on. Another one does, or the reply ends with `status`.
    fn lost(&mut self, status: Status) {
        self.upstream = None;
        match self.rest() {
            Rest::Lost => self.fail(&status),
            Rest::Nothing => self.fail(&Status::ok("")),
            Rest::Resume(resume) => {
                let Some(spare) = &mut self.spare else { return };
                let Some(mut dispatch) = spare.dispatch.take() else {
                    return self.fail(&status);
                };
                spare.resumes += 1;
                if let Some(lease) = self.lease.take() {
                    dispatch.lost(&self.endpoint, &lease);
                }
                tracing::debug!(
                    endpoint = self.endpoint,
                    error = status.message(),
                    tokens = resume.token_ids.len(),
                    "a reply goes on elsewhere"
                );
                let addition = held::addition(resume, spare.seed);
                self.resuming = Some(Box::pin(dispatch.resume(addition, status)));
            }
        }
    }

    fn rest(&mut self) -> Rest {
        match &mut self.spare {
            Some(spare) if spare.resumes < MOST_RESUMES => spare.held.rest(),
            _ => Rest::Lost,
        }
    }

    /// Waits for the worker that goes on; true if there is one to be heard.
    fn poll_resumed(&mut self, context: &mut Context<'_>) -> bool {
        let Some(resuming) = &mut self.resuming else {
            return true;
        };
        let Poll::Ready((dispatch, result)) = resuming.as_mut().poll(context) else {
            return false;
        };
        self.resuming = None;
        match result {
            Ok(Sent {
                begun,
                endpoint,
                lease,
            }) => {
                self.observation.resumed(&dispatch.assigned().model, &endpoint);
                self.upstream = Some(begun.body);
                self.first = begun.first;
                self.trailers = begun.trailers;
                self.endpoint = endpoint;
                self.lease = Some(lease);
            }
            Err(status) => self.fail(&status),
        }
        if let Some(spare) = &mut self.spare {
            spare.dispatch = Some(dispatch);
        }
        true
    }

    /// Takes what the worker has sent, up to the size of a joined frame.
    fn gather(&mut self, context: &mut Context<'_>) -> Option<Bytes> {
        let mut gathered = self.first.take();
        let mut joined: Option<BytesMut> = None;
        let mut end = None;
        while self.trailers.is_none() && joined.as_ref().map_or(0, BytesMut::len) < COALESCE {
            let Some(upstream) = &mut self.upstream else { break };
            match Pin::new(upstream).poll_frame(context) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => join(&mut gathered, &mut joined, data),
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        self.upstream = None;
                    }
                },
                Poll::Ready(None) => {
                    end = Some("it sent no status".to_owned());
                    break;
                }
                Poll::Ready(Some(Err(error))) => {
                    end = Some(error.to_string());
                    break;
                }
            }
        }
        let data = joined.map(BytesMut::freeze).or(gathered);
        // What came before the end counts, so that it is not asked for again.
        let whole = match (data, &mut self.spare) {
            (Some(data), Some(spare)) => Some(spare.held.admit(data)),
            (data, _) => data,
        };
        match end {
            Some(why) => self.gone(&why),
            None => self.heed_trailers(),
        }
        whole.filter(|whole| !whole.is_empty())
    }

    /// A worker that says that it cannot go on is lost like one that says nothing.
    fn heed_trailers(&mut self) {
        let Some(trailers) = self.trailers.as_ref().filter(|_| self.lease.is_some()) else {
            return;
        };
        let unavailable =
            Status::from_header_map(trailers).filter(|status| status.code() == Code::Unavailable);
        if let Some(status) = unavailable
            && self.spare.is_some()
        {
            self.trailers = None;
            self.lost(status);
        }
    }

    fn finish(&mut self, trailers: HeaderMap) -> HeaderMap {
        self.done = true;
        let status = Status::from_header_map(&trailers)
            .unwrap_or_else(|| Status::unknown("the worker sent no status"));
        let metadata = MetadataMap::from_headers(trailers);
        let stats = metadata
            .get_bin(metadata_key())
            .and_then(|value| value.to_bytes().ok())
            .and_then(|bytes| RequestStats::decode(bytes).ok());
        if let Some(lease) = self.lease.take() {
            if let Some(stats) = &stats {
                lease.learn(stats);
            }
            if error::is_workers(status.code()) {
                lease.failed();
            }
        }
        // With it, the room that the request took is free.
        let spare = self.spare.take();
        if let (Some(stats), Some(dispatch)) = (&stats, spare.and_then(|spare| spare.dispatch)) {
            dispatch.settle(u64::from(stats.prompt_tokens) + u64::from(stats.completion_tokens));
        }
        match status.code() {
            Code::Ok => self.observation.end(Code::Ok, "", stats.as_ref()),
            code => self.observation.end(code, status.message(), stats.as_ref()),
        }
        metadata.into_headers()
    }
}

/// Adds data to what was gathered; one piece alone is not copied.
fn join(gathered: &mut Option<Bytes>, joined: &mut Option<BytesMut>, data: Bytes) {
    match (joined, gathered) {
        (Some(joined), _) => joined.extend_from_slice(&data),
        (_, gathered @ None) => *gathered = Some(data),
        (joined, Some(first)) => {
            let mut both = BytesMut::with_capacity((first.len() + data.len()).max(COALESCE / 4));
            both.extend_from_slice(first);
            both.extend_from_slice(&data);
            *joined = Some(both);
        }
    }
}

fn metadata_key() -> &'static str {
    metadata::STATS_TRAILER
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let relay = self.get_mut();
        if relay.done {
            return Poll::Ready(None);
        }
        if let Some(deadline) = &mut relay.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            relay.deadline = None;
            if relay.trailers.is_none() {
                relay.fail(&error::deadline());
            }
        }
        while relay.poll_resumed(context) {
            if let Some(data) = relay.gather(context) {
                relay.observation.first_data();
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            if let Some(trailers) = relay.trailers.take() {
                return Poll::Ready(Some(Ok(Frame::trailers(relay.finish(trailers)))));
            }
            if relay.resuming.is_none() {
                break;
            }
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }
}
