//! What both ends of the bench do with gRPC's frames.

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::RecvStream;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Flag and length before each message.
const PREFIX: usize = 5;

/// A message in its frame.
pub(crate) fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(PREFIX + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// The one message of a unary request.
pub(crate) async fn read(mut body: RecvStream) -> Result<Bytes, h2::Error> {
    let mut read = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        read.extend_from_slice(&data);
    }
    let start = PREFIX.min(read.len());
    Ok(read.freeze().slice(start..))
}

/// Counts messages, wherever the bytes are cut.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    pub(crate) count: u32,
    prefix: Vec<u8>,
    left: usize,
}

impl Messages {
    pub(crate) fn push(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.left > 0 {
                let taken = self.left.min(data.len());
                self.left -= taken;
                data = &data[taken..];
                continue;
            }
            let taken = (PREFIX - self.prefix.len()).min(data.len());
            self.prefix.extend_from_slice(&data[..taken]);
            data = &data[taken..];
            if let [_, a, b, c, d] = self.prefix[..] {
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                self.count += 1;
                self.prefix.clear();
            }
        }
    }
}

/// Spans in an `ExportTraceServiceRequest` (OTLP: resource_spans = 1, scope_spans = 2, spans = 2).
pub(crate) fn spans(message: &[u8]) -> u64 {
    count(message, &[1, 2, 2])
}

fn count(mut message: &[u8], path: &[u32]) -> u64 {
    let Some((field, deeper)) = path.split_first() else {
        return 1;
    };
    let mut found = 0;
    while !message.is_empty() {
        let Ok((tag, wire)) = decode_key(&mut message) else {
            return found;
        };
        if (tag, wire) == (*field, WireType::LengthDelimited) {
            let length = decode_varint(&mut message)
                .ok()
                .and_then(|length| usize::try_from(length).ok());
            let Some((inner, rest)) = length.and_then(|length| message.split_at_checked(length)) else {
                return found;
            };
            found += count(inner, deeper);
            message = rest;
        } else if skip_field(wire, tag, &mut message, DecodeContext::default()).is_err() {
            return found;
        }
    }
    found
}
