//! A worker's reply on its way to the caller, undecoded. Bytes that are ready together leave together.

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
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status, metadata::MetadataMap};

use crate::{error, observe::Observation, pool::Lease};

/// Bytes joined into one frame at most.
const COALESCE: usize = 16 << 10;

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
    lease: Lease,
    done: bool,
}

impl Relay {
    pub(crate) fn new(
        upstream: Incoming,
        first: Option<Bytes>,
        trailers: Option<HeaderMap>,
        deadline: Option<Instant>,
        endpoint: String,
        mut observation: Observation,
        lease: Lease,
    ) -> Self {
        if first.is_some() {
            observation.first_data();
        }
        Self {
            upstream: Some(upstream),
            first,
            trailers,
            deadline: deadline.map(|at| Box::pin(tokio::time::sleep_until(at))),
            endpoint,
            observation,
            lease,
            done: false,
        }
    }

    /// The reply cannot be understood: it counts as failed, and its worker's stream ends.
    pub(crate) fn refuse(&mut self, status: &Status) {
        self.observation.failed(status);
        self.upstream = None;
        self.done = true;
    }

    /// Ends the reply with a status of the gateway's own.
    fn fail(&mut self, status: &Status) {
        self.upstream = None;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            trailers.insert(Status::GRPC_STATUS, i32::from(status.code()).into());
        }
        self.trailers = Some(trailers);
    }

    fn gone(&mut self, why: &str) {
        let message = format!("worker {} ended in the middle of the reply: {why}", self.endpoint);
        self.fail(&error::unavailable(message));
    }

    /// Takes what the worker has sent, up to the size of a joined frame.
    fn gather(&mut self, context: &mut Context<'_>) -> Option<Bytes> {
        let mut gathered = self.first.take();
        let mut joined: Option<BytesMut> = None;
        while self.trailers.is_none() && joined.as_ref().map_or(0, BytesMut::len) < COALESCE {
            let Some(upstream) = &mut self.upstream else { break };
            match Pin::new(upstream).poll_frame(context) {
                Poll::Pending => break,
                Poll::Ready(None) => self.gone("it sent no status"),
                Poll::Ready(Some(Err(error))) => self.gone(&error.to_string()),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => match (&mut joined, &gathered) {
                        (Some(joined), _) => joined.extend_from_slice(&data),
                        (None, None) => gathered = Some(data),
                        (None, Some(first)) => {
                            let mut both =
                                BytesMut::with_capacity((first.len() + data.len()).max(COALESCE / 4));
                            both.extend_from_slice(first);
                            both.extend_from_slice(&data);
                            joined = Some(both);
                        }
                    },
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        self.upstream = None;
                    }
                },
            }
        }
        joined.map(BytesMut::freeze).or(gathered)
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
        if let Some(stats) = &stats {
            self.lease.learn(stats);
        }
        match status.code() {
            Code::Ok => self.observation.end(Code::Ok, "", stats.as_ref()),
            code => self.observation.end(code, status.message(), stats.as_ref()),
        }
        metadata.into_headers()
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
        if let Some(data) = relay.gather(context) {
            relay.observation.first_data();
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match relay.trailers.take() {
            Some(trailers) => Poll::Ready(Some(Ok(Frame::trailers(relay.finish(trailers))))),
            None => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }
}
