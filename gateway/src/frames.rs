//! gRPC's framing: five bytes of flag and length before each message. Reads requests whole, looks at the one
//! field that routing needs, and splits replies into messages where HTTP has to understand them.

use std::{error::Error, time::Duration};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tonic::{Status, metadata::MetadataValue};

use crate::error;

/// The largest request message: a prompt of a million tokens as ids takes a quarter of this.
pub(crate) const MAX_REQUEST_BYTES: usize = 16 << 20;
/// A caller gets so long to send its request.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest message that a reply may hold; an echo of the largest prompt fits.
pub(crate) const MAX_REPLY_BYTES: usize = 64 << 20;
/// Flag and length.
pub(crate) const PREFIX: usize = 5;
/// Number of the field `model` in every request of `Inference`.
const MODEL: u32 = 1;
const ENCODING: &str = "grpc-encoding";
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";
const IDENTITY: &str = "identity";

/// One message in its frame.
#[derive(Debug, Clone)]
pub(crate) struct Message(Bytes);

impl Message {
    /// Encodes and frames.
    pub(crate) fn encode(message: &impl prost::Message) -> Self {
        Self::frame(&[&message.encode_to_vec()])
    }

    /// Reads the one message of a unary request that has these headers.
    pub(crate) async fn read<B>(headers: &HeaderMap, body: B) -> Result<Self, Status>
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let framed = read_whole(body, MAX_REQUEST_BYTES + PREFIX).await?;
        let Some((prefix, payload)) = framed.split_at_checked(PREFIX) else {
            return Err(Status::invalid_argument("the request holds no message"));
        };
        match prefix[0] {
            0 => {}
            1 => return Err(compressed(headers)),
            other => {
                let message = format!("the request's first frame has flag {other}, which is neither 0 nor 1");
                return Err(Status::invalid_argument(message));
            }
        }
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if payload.len() != length {
            let message = format!(
                "the request announces one message of {length} bytes and holds {}",
                payload.len()
            );
            return Err(Status::invalid_argument(message));
        }
        Ok(Self(framed))
    }

    /// The message without its frame.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.0[PREFIX..]
    }

    /// Frame and message, as they go over the wire.
    pub(crate) fn framed(&self) -> Bytes {
        self.0.clone()
    }

    /// Looks up `model` without decoding the rest; empty where it is left out.
    pub(crate) fn model(&self) -> Result<&str, Status> {
        let invalid = |error: &dyn std::fmt::Display| {
            Status::invalid_argument(format!("the request cannot be read: {error}"))
        };
        let mut model: &[u8] = &[];
        let mut rest = self.payload();
        while rest.has_remaining() {
            let (tag, wire) = decode_key(&mut rest).map_err(|error| invalid(&error))?;
            if (tag, wire) != (MODEL, WireType::LengthDelimited) {
                skip_field(wire, tag, &mut rest, DecodeContext::default())
                    .map_err(|error| invalid(&error))?;
                continue;
            }
            let length = decode_varint(&mut rest).map_err(|error| invalid(&error))?;
            let split = usize::try_from(length)
                .ok()
                .and_then(|length| rest.split_at_checked(length));
            // The last occurrence of a field counts.
            (model, rest) = split.ok_or_else(|| invalid(&"`model` is cut off"))?;
        }
        std::str::from_utf8(model)
            .map_err(|error| error::bad_request("model", format!("is not UTF-8: {error}")))
    }

    /// The same message for another model: the last occurrence of a field counts, so one is appended.
    pub(crate) fn with_model(&self, model: &str) -> Self {
        let mut field = Vec::with_capacity(model.len() + 8);
        prost::encoding::string::encode(MODEL, &model.to_owned(), &mut field);
        Self::frame(&[self.payload(), &field])
    }

    /// This message with the fields of another: the last occurrence of a field counts, messages in it are merged and
    /// lists are joined, as protobuf has it.
    pub(crate) fn with(&self, other: &Self) -> Self {
        Self::frame(&[self.payload(), other.payload()])
    }

    fn frame(parts: &[&[u8]]) -> Self {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let mut framed = BytesMut::with_capacity(PREFIX + length);
        framed.put_u8(0);
        // Callers frame requests that were read under a limit far below 4 GiB.
        framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        parts.iter().for_each(|part| framed.put_slice(part));
        Self(framed.freeze())
    }
}

/// Why a message whose flag says that it is compressed is not read, as gRPC's compression specification has it: the
/// caller learns which encodings there are, and that without one the flag makes no sense.
fn compressed(headers: &HeaderMap) -> Status {
    let encoding = headers.get(ENCODING).map_or(&b""[..], HeaderValue::as_bytes);
    if encoding.is_empty() || encoding == IDENTITY.as_bytes() {
        return Status::internal(
            "the request's first frame has the compressed flag, and grpc-encoding names no compression",
        );
    }
    let mut status = Status::unimplemented(format!(
        "grpc-encoding {} is not supported: send requests uncompressed",
        encoding.escape_ascii()
    ));
    status
        .metadata_mut()
        .insert(ACCEPT_ENCODING, MetadataValue::from_static(IDENTITY));
    status
}

/// Reads a body of up to `limit` bytes.
pub(crate) async fn read_whole<B>(body: B, limit: usize) -> Result<Bytes, Status>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let read = tokio::time::timeout(READ_TIMEOUT, Limited::new(body, limit).collect());
    match read.await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Status::out_of_range(format!(
            "the request is larger than {} MiB",
            MAX_REQUEST_BYTES >> 20
        ))),

        Ok(Err(error)) => Err(Status::cancelled(format!("the request broke off: {error}"))),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "the request was not complete after {READ_TIMEOUT:?}"
        ))),
    }
}

/// Splits a reply into messages, wherever its bytes were cut.
#[derive(Debug, Default)]
pub(crate) struct Decoder(BytesMut);

impl Decoder {
    /// Takes the next bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one.
    pub(crate) fn next<M: prost::Message + Default>(&mut self) -> Result<Option<M>, Status> {
        let Some(prefix) = self.0.first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if prefix[0] != 0 || length > MAX_REPLY_BYTES {
            return Err(Status::internal(
                "the worker's reply cannot be read: it is compressed or too large",
            ));
        }
        if self.0.len() < PREFIX + length {
            return Ok(None);
        }
        self.0.advance(PREFIX);
        let message = self.0.split_to(length).freeze();
        let decoded = M::decode(message)
            .map_err(|error| Status::internal(format!("the worker's reply cannot be read: {error}")))?;
        Ok(Some(decoded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;
    use penstock_proto::v1;

    fn request(model: &str) -> v1::GenerateRequest {
        let input = Some(v1::generate_request::Input::Prompt("Hello".into()));
        v1::GenerateRequest {
            model: model.into(),
            input,
            top_logprobs: Some(3),
            ..Default::default()
        }
    }

    #[test]
    fn the_model_is_found_wherever_it_stands() {
        let message = Message::encode(&request("demo@v2"));
        assert_eq!(message.model().unwrap(), "demo@v2");
        let moved = message.with_model("demo");
        assert_eq!(moved.model().unwrap(), "demo");
        let decoded = <v1::GenerateRequest as prost::Message>::decode(moved.payload()).unwrap();
        assert_eq!(decoded, request("demo"));
        assert_eq!(Message::encode(&request("")).model().unwrap(), "");
    }

    #[test]
    fn garbage_is_refused_and_never_panics() {
        for payload in [
            &[0x0a, 0x7f, 1][..],
            &[0xff; 12],
            &[0x0a, 2, 0xff, 0xfe],
            &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        ] {
            let error = Message::frame(&[payload]).model().unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{payload:?}");
        }
    }

    #[tokio::test]
    async fn a_request_is_exactly_one_uncompressed_message() {
        let gzip = HeaderMap::from_iter([(ENCODING.parse().unwrap(), HeaderValue::from_static("gzip"))]);
        let plain = HeaderMap::from_iter([(ENCODING.parse().unwrap(), HeaderValue::from_static(IDENTITY))]);
        for (headers, bytes, code) in [
            (&plain, &b""[..], tonic::Code::InvalidArgument),
            (&plain, &[0, 0, 0, 0, 2, 1], tonic::Code::InvalidArgument),
            (&plain, &[0, 0, 0, 0, 0, 1], tonic::Code::InvalidArgument),
            (&plain, &[2, 0, 0, 0, 0], tonic::Code::InvalidArgument),
            (&plain, &[1, 0, 0, 0, 0], tonic::Code::Internal),
            (&HeaderMap::new(), &[1, 0, 0, 0, 0], tonic::Code::Internal),
            (&gzip, &[1, 0, 0, 0, 0], tonic::Code::Unimplemented),
        ] {
            let body = Full::new(Bytes::from_static(bytes));
            let error = Message::read(headers, body).await.unwrap_err();
            assert_eq!(error.code(), code, "{bytes:?}");
        }
        // Each message may be sent uncompressed whatever the encoding of the others.
        for headers in [&plain, &gzip] {
            let empty = Message::read(headers, Full::new(Bytes::from_static(&[0; 5])));
            assert!(empty.await.unwrap().payload().is_empty());
        }
    }

    #[test]
    fn a_reply_decodes_the_same_however_it_is_cut() {
        let chunks: Vec<_> = ["a", "", "地球"]
            .map(|text| v1::GenerateResponse {
                text: text.into(),
                token_ids: vec![7],
                ..Default::default()
            })
            .into();
        let bytes: Vec<u8> = chunks
            .iter()
            .flat_map(|chunk| Message::encode(chunk).framed())
            .collect();
        for size in 1..=bytes.len() {
            let mut decoder = Decoder::default();
            let mut decoded = Vec::<v1::GenerateResponse>::new();
            for part in bytes.chunks(size) {
                decoder.push(part);
                while let Some(chunk) = decoder.next().unwrap() {
                    decoded.push(chunk);
                }
            }
            assert_eq!(decoded, chunks, "cut every {size} bytes");
        }
    }
}
