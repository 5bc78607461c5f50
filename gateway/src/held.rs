//! What a client has of a reply: its frames as they came, so that another worker can go on. They are read only when
//! that happens, or when there are so many that ids alone take less room.

use bytes::{Bytes, BytesMut};
use penstock_proto::v1;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::frames::{MAX_REPLY_BYTES, Message, PREFIX};

/// Bytes of frames that are kept as they came.
const RAW: usize = 8 << 10;
/// Tokens of a reply that are remembered; one that is longer cannot go on elsewhere.
const IDS: usize = 1 << 18;
/// Numbers of fields in `GenerateResponse`.
const TOKEN_IDS: u32 = 1;
const TEXT: u32 = 2;
const TEXT_OFFSET: u32 = 3;
const USAGE: u32 = 8;

/// A reply so far. Only whole messages leave it, so that what follows them may come from another worker.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// The beginning of a message whose end has not come.
    tail: BytesMut,
    raw: Vec<u8>,
    read: Read,
    /// It is too long to be remembered, or cannot be read.
    lost: bool,
}

/// What was read of it.
#[derive(Debug, Default)]
struct Read {
    ids: Vec<u32>,
    text_end: u64,
    /// The last chunk was among it.
    over: bool,
}

/// How a reply can go on.
#[derive(Debug, PartialEq)]
pub(crate) enum Rest {
    /// The client has all of it.
    Nothing,
    /// With this, in addition to the request.
    Resume(v1::Resume),
    /// Not at all.
    Lost,
}

// === impl Held ===

impl Held {
    /// Takes what a worker sent and gives the messages that are whole with it.
    pub(crate) fn admit(&mut self, data: Bytes) -> Bytes {
        let data = match self.tail.is_empty() {
            true => data,
            false => {
                self.tail.extend_from_slice(&data);
                self.tail.split().freeze()
            }
        };
        let whole = self.whole(&data);
        self.tail.extend_from_slice(&data[whole..]);
        let whole = data.slice(..whole);
        self.keep(&whole);
        whole
    }

    /// What another worker has to know. What the client does not have of the last message is forgotten.
    pub(crate) fn rest(&mut self) -> Rest {
        self.tail.clear();
        self.compact();
        match (self.lost, self.read.over) {
            (true, _) => Rest::Lost,
            (_, true) => Rest::Nothing,
            _ => Rest::Resume(v1::Resume {
                token_ids: self.read.ids.clone(),
                text_offset: self.read.text_end,
            }),
        }
    }

    /// Bytes that belong to whole messages.
    fn whole(&mut self, data: &[u8]) -> usize {
        let mut whole = 0;
        while let Some(prefix) = data[whole..].first_chunk::<PREFIX>() {
            let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
            if prefix[0] != 0 || length > MAX_REPLY_BYTES {
                // Not for us to understand: it passes as it is.
                self.lost = true;
            }
            if self.lost {
                return data.len();
            }
            if data.len() - whole < PREFIX + length {
                break;
            }
            whole += PREFIX + length;
        }
        match self.lost {
            true => data.len(),
            false => whole,
        }
    }

    fn keep(&mut self, frames: &[u8]) {
        if self.lost {
            return;
        }
        self.raw.extend_from_slice(frames);
        if self.raw.len() > RAW {
            self.compact();
        }
    }

    fn compact(&mut self) {
        let mut rest = self.raw.as_slice();
        while let Some((frame, after)) = rest.split_at_checked(PREFIX) {
            let length = u32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]) as usize;
            let read = after
                .split_at_checked(length)
                .and_then(|(chunk, after)| self.read.chunk(chunk).map(|()| after));
            let Some(after) = read.filter(|_| self.read.ids.len() <= IDS) else {
                self.lost = true;
                self.read.ids = Vec::new();
                break;
            };
            rest = after;
        }
        self.raw = Vec::new();
    }
}

// === impl Read ===

impl Read {
    /// Reads a chunk's ids and the length of its text; nothing where it cannot be read.
    fn chunk(&mut self, chunk: &[u8]) -> Option<()> {
        let (mut rest, mut text, mut offset) = (chunk, 0, 0);
        while !rest.is_empty() {
            let (tag, wire) = decode_key(&mut rest).ok()?;
            match (tag, wire) {
                (TOKEN_IDS, WireType::LengthDelimited) => {
                    let mut packed = take(&mut rest)?;
                    while !packed.is_empty() {
                        self.id(decode_varint(&mut packed).ok()?)?;
                    }
                }
                (TOKEN_IDS, WireType::Varint) => self.id(decode_varint(&mut rest).ok()?)?,
                (TEXT, WireType::LengthDelimited) => text = take(&mut rest)?.len() as u64,
                (TEXT_OFFSET, WireType::Varint) => offset = decode_varint(&mut rest).ok()?,
                _ => {
                    self.over |= tag == USAGE;
                    skip_field(wire, tag, &mut rest, DecodeContext::default()).ok()?;
                }
            }
        }
        self.text_end = offset.checked_add(text)?;
        Some(())
    }

    fn id(&mut self, id: u64) -> Option<()> {
        self.ids.push(u32::try_from(id).ok()?);
        Some(())
    }
}

fn take<'b>(rest: &mut &'b [u8]) -> Option<&'b [u8]> {
    let length = usize::try_from(decode_varint(rest).ok()?).ok()?;
    let (taken, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(taken)
}

/// What is added to a request that goes on elsewhere: the reply so far, and the seed that its first worker used.
pub(crate) fn addition(resume: v1::Resume, seed: Option<u64>) -> Message {
    Message::encode(&v1::GenerateRequest {
        sampling: seed.map(|seed| v1::SamplingParams {
            seed: Some(seed),
            ..Default::default()
        }),
        resume: Some(resume),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(ids: Vec<u32>, text: String, text_offset: u64) -> v1::GenerateResponse {
        v1::GenerateResponse {
            token_ids: ids,
            text,
            text_offset,
            ..Default::default()
        }
    }

    proptest! {
        #[test]
        fn whole_messages_leave_however_the_bytes_are_cut(
            parts in prop::collection::vec((prop::collection::vec(any::<u32>(), 0..3), ".{0,6}"), 1..20),
            big in 0usize..20_000,
            sizes in prop::collection::vec(1usize..40, 1..10),
            received in 0.0f64..1.0,
        ) {
            let (mut bytes, mut ends) = (Vec::new(), Vec::new());
            let mut sofar = v1::Resume { token_ids: vec![], text_offset: 0 };
            for (index, (ids, text)) in parts.into_iter().enumerate() {
                let text = if index == 2 { "x".repeat(big) } else { text };
                let start = sofar.text_offset;
                sofar.token_ids.extend(&ids);
                sofar.text_offset += text.len() as u64;
                bytes.extend_from_slice(&Message::encode(&chunk(ids, text, start)).framed());
                ends.push((bytes.len(), sofar.clone()));
            }
            let received = (bytes.len() as f64 * received) as usize;
            let (mut held, mut out, mut at) = (Held::default(), Vec::new(), 0);
            for size in sizes.iter().cycle() {
                if at == received { break }
                let to = (at + size).min(received);
                out.extend_from_slice(&held.admit(Bytes::copy_from_slice(&bytes[at..to])));
                at = to;
            }
            let empty = (0, v1::Resume { token_ids: vec![], text_offset: 0 });
            let (end, expected) = ends.iter().rev().find(|(end, _)| *end <= received).unwrap_or(&empty);
            prop_assert_eq!(&out, &bytes[..*end]);
            prop_assert_eq!(held.rest(), Rest::Resume(expected.clone()));
        }

        #[test]
        fn what_is_no_reply_passes_and_is_not_gone_on_with(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut held = Held::default();
            let out = held.admit(Bytes::copy_from_slice(&bytes));
            prop_assert!(bytes.starts_with(&out));
            held.rest();
        }
    }

    #[test]
    fn a_reply_whose_last_chunk_came_is_over() {
        let mut held = Held::default();
        let last = v1::GenerateResponse {
            usage: Some(v1::Usage::default()),
            ..chunk(vec![1], "a".into(), 0)
        };
        held.admit(Message::encode(&last).framed());
        assert_eq!(held.rest(), Rest::Nothing);
    }

    #[test]
    fn a_reply_of_a_million_tokens_is_forgotten_and_passes_on() {
        let mut held = Held::default();
        for _ in 0..1100 {
            let frame = Message::encode(&chunk(vec![7; 1000], String::new(), 0)).framed();
            assert_eq!(held.admit(frame.clone()), frame);
        }
        assert_eq!(held.rest(), Rest::Lost);
        assert!(held.raw.capacity() + held.read.ids.capacity() < 100_000);
    }
}
