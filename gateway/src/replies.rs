//! Requests and replies of the HTTP APIs: they take the same way as gRPC ones, and are understood here.

use http::HeaderMap;
use http_body_util::BodyExt as _;
use penstock_proto::v1;
use tonic::{Code, Status};

use crate::{
    forward::{Call, Forwarder, Reply},
    frames::{Decoder, Message},
    observe::Observation,
    relay::Relay,
    routing::Assigned,
    timeout,
};

/// Sends a request of an HTTP API; `operation` names its span.
pub(crate) async fn ask(
    forwarder: &Forwarder,
    operation: &'static str,
    headers: HeaderMap,
    request: &v1::GenerateRequest,
) -> Result<(Assigned, Chunks), Status> {
    let mut observation = Observation::start(forwarder.metrics.clone(), operation, &request.model, &headers);
    let deadline = timeout::deadline(&headers).inspect_err(|status| observation.failed(status))?;
    let call = Call {
        method: "Generate",
        headers,
        message: Message::encode(request),
        deadline,
        observation,
    };
    let Reply { assigned, body, .. } = forwarder.call(call).await?;
    Ok((
        assigned,
        Chunks {
            body,
            decoder: Decoder::default(),
        },
    ))
}

/// The chunks of a reply. Dropping it ends the sequence on its worker.
pub(crate) struct Chunks {
    body: Relay,
    decoder: Decoder,
}

impl Chunks {
    /// Chunks that came together, at least one; none at the end of a reply that is complete.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<v1::GenerateResponse>>, Status> {
        loop {
            let Some(Ok(frame)) = self.body.frame().await else {
                return Ok(None);
            };
            match frame.into_data() {
                Ok(data) => {
                    self.decoder.push(&data);
                    let mut chunks = Vec::new();
                    while let Some(chunk) = self.decoder.next()? {
                        chunks.push(chunk);
                    }
                    if !chunks.is_empty() {
                        return Ok(Some(chunks));
                    }
                }
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return match Status::from_header_map(&trailers) {
                        Some(status) if status.code() != Code::Ok => Err(status),
                        _ => Ok(None),
                    };
                }
            }
        }
    }

    /// The whole reply as one chunk.
    pub(crate) async fn whole(mut self) -> Result<v1::GenerateResponse, Status> {
        let mut whole = v1::GenerateResponse::default();
        while let Some(chunks) = self.next().await? {
            for chunk in chunks {
                whole.text.push_str(&chunk.text);
                whole.token_ids.extend(chunk.token_ids);
                whole.logprobs.extend(chunk.logprobs);
                if chunk.usage.is_some() {
                    whole.finish_reason = chunk.finish_reason;
                    whole.usage = chunk.usage;
                    whole.stopped_by = chunk.stopped_by;
                }
            }
        }
        match whole.usage {
            Some(_) => Ok(whole),
            None => Err(Status::internal("the worker's reply has no end")),
        }
    }
}
