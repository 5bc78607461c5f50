//! Requests and replies of the HTTP APIs: they take the same way as gRPC ones, and are understood here.

use std::net::IpAddr;

use axum::response::Response;
use http::{HeaderMap, HeaderValue, request::Parts};
use http_body_util::BodyExt as _;
use penstock_proto::{metadata, v1};
use tonic::{Code, Status};

use crate::{
    forward::{self, Call, Forwarder, GENERATE, Reply},
    frames::{Decoder, Message},
    observe::Observation,
    relay::Relay,
    reply_id::ReplyId,
    routing::Assigned,
    timeout,
};

/// Who asks over HTTP: the head of the request.
#[derive(Clone)]
pub(crate) struct Asker {
    pub(crate) headers: HeaderMap,
    peer: Option<IpAddr>,
}

impl From<Parts> for Asker {
    fn from(parts: Parts) -> Self {
        Self {
            peer: forward::peer(&parts.extensions),
            headers: parts.headers,
        }
    }
}

/// Sends a request of an HTTP API; `operation` names its span, and `prefix` is what the id of its reply begins with.
pub(crate) async fn ask(
    forwarder: &Forwarder,
    operation: &'static str,
    prefix: &str,
    asker: Asker,
    request: &v1::GenerateRequest,
) -> Result<(Origin, Chunks), Status> {
    let Asker { headers, peer } = asker;
    let mut observation = Observation::start(forwarder.metrics.clone(), operation, &request.model, &headers);
    let deadline = timeout::deadline(&headers, forwarder.default_timeout)
        .inspect_err(|status| observation.failed(status))?;
    let call = Call {
        method: GENERATE,
        headers,
        peer,
        message: Message::encode(request),
        deadline,
        observation,
    };
    let Reply {
        assigned,
        body,
        mut headers,
    } = forwarder.call(call).await?;
    let chunks = Chunks {
        body,
        decoder: Decoder::default(),
        ended: false,
    };
    let seed = headers.remove(metadata::SEED);
    let id = ReplyId::draw(&assigned).text(prefix);
    Ok((Origin { assigned, id, seed }, chunks))
}

/// The chunks of a reply. Dropping it ends the sequence on its worker.
pub(crate) struct Chunks {
    body: Relay,
    decoder: Decoder,
    /// The last chunk was seen: the one with the usage.
    ended: bool,
}

/// What a response says of how it came about.
pub(crate) struct Origin {
    pub(crate) assigned: Assigned,
    /// The id of the reply.
    pub(crate) id: String,
    /// The seed that the worker used.
    seed: Option<HeaderValue>,
}

// === impl Origin ===

impl Origin {
    /// Writes the assignment, the id and the seed into the headers of a response.
    pub(crate) fn tell(self, response: &mut Response) {
        self.assigned.tell(response.headers_mut());
        if let Ok(id) = HeaderValue::try_from(self.id) {
            response.headers_mut().insert(metadata::REPLY_ID, id);
        }
        if let Some(seed) = self.seed {
            response.headers_mut().insert(metadata::SEED, seed);
        }
    }

    /// The seed that the worker used.
    pub(crate) fn seed(&self) -> Option<u64> {
        self.seed.as_ref()?.to_str().ok()?.parse().ok()
    }

    /// Writes the assignment into an error.
    pub(crate) fn told(&self, status: Status) -> Status {
        self.assigned.told(status)
    }
}

// === impl Chunks ===

impl Chunks {
    /// Chunks that came together, at least one; none at the end of a reply that is complete.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<v1::GenerateResponse>>, Status> {
        loop {
            let Some(Ok(frame)) = self.body.frame().await else {
                return Ok(None);
            };
            match frame.into_data() {
                Ok(data) => {
                    let chunks = self
                        .decode(&data)
                        .inspect_err(|status| self.body.refuse(status))?;
                    if !chunks.is_empty() {
                        return Ok(Some(chunks));
                    }
                }
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return match Status::from_header_map(&trailers) {
                        Some(status) if status.code() != Code::Ok => Err(status),
                        _ if self.ended => Ok(None),
                        _ => Err(Status::internal("the worker's reply has no last chunk")),
                    };
                }
            }
        }
    }

    fn decode(&mut self, data: &[u8]) -> Result<Vec<v1::GenerateResponse>, Status> {
        self.decoder.push(data);
        let mut chunks = Vec::new();
        while let Some(chunk) = self.decoder.next::<v1::GenerateResponse>()? {
            self.ended |= chunk.usage.is_some();
            chunks.push(chunk);
        }
        Ok(chunks)
    }
}

/// Adds a chunk to the reply so far.
pub(crate) fn append(sofar: &mut v1::GenerateResponse, chunk: v1::GenerateResponse) {
    sofar.text.push_str(&chunk.text);
    sofar.token_ids.extend(chunk.token_ids);
    sofar.logprobs.extend(chunk.logprobs);
    if chunk.usage.is_some() {
        sofar.usage = chunk.usage;
        sofar.finish_reason = chunk.finish_reason;
        sofar.stopped_by = chunk.stopped_by;
    }
}
