//! What routing looks at in a `GenerateRequest`, found without decoding it.

use std::ops::Range;

use bytes::Buf;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Numbers of the fields of `GenerateRequest`, and of those below them.
const PROMPT: u32 = 2;
const INPUT_IDS: u32 = 3;
const IDS: u32 = 1;
const CHAT: u32 = 4;
const MESSAGE: u32 = 1;
const ROLE: u32 = 1;
const SAMPLING: u32 = 5;
const MAX_TOKENS: u32 = 9;
/// Bytes of a prompt without messages that tell conversations apart.
const PROMPT_HEAD: usize = 256;

/// The prompt's bytes, as they stand in the message, and the limit of the reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Glance<'m> {
    input: &'m [u8],
    head: usize,
    max_tokens: Option<u32>,
}

// === impl Glance ===

impl<'m> Glance<'m> {
    /// Looks at an encoded message; nothing where it is no message.
    pub fn of(payload: &'m [u8]) -> Option<Self> {
        let mut glance = Self::default();
        for_each(payload, |field, range| {
            let value = &payload[range];
            match field {
                PROMPT => glance = glance.with_input(value, value.len().min(PROMPT_HEAD)),
                INPUT_IDS => {
                    let ids = last(value, IDS)?;
                    glance = glance.with_input(ids, ids.len().min(PROMPT_HEAD));
                }
                CHAT => glance = glance.with_input(value, head(value)?),
                SAMPLING => glance.max_tokens = max_tokens(value)?,
                _ => {}
            }
            Some(())
        })?;
        Some(glance)
    }

    /// Bytes of the prompt: text, ids or encoded messages.
    pub fn input(&self) -> &'m [u8] {
        self.input
    }

    /// Length in bytes of the part that a conversation keeps: its messages up to the user's first.
    pub fn head(&self) -> usize {
        self.head
    }

    /// Tokens that the reply may have, where the request says so.
    pub fn max_tokens(&self) -> Option<u32> {
        self.max_tokens
    }

    fn with_input(self, input: &'m [u8], head: usize) -> Self {
        Self { input, head, ..self }
    }
}

/// Calls `visit` with each length-delimited field and where its value lies. `None` where the bytes are no message or
/// `visit` says so.
fn for_each(message: &[u8], mut visit: impl FnMut(u32, Range<usize>) -> Option<()>) -> Option<()> {
    let mut rest = message;
    while rest.has_remaining() {
        let (tag, wire) = decode_key(&mut rest).ok()?;
        if wire != WireType::LengthDelimited {
            skip_field(wire, tag, &mut rest, DecodeContext::default()).ok()?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
        let start = message.len() - rest.len();
        rest = rest.get(length..)?;
        visit(tag, start..start + length)?;
    }
    Some(())
}

fn last(message: &[u8], field: u32) -> Option<&[u8]> {
    let mut found: &[u8] = &[];
    for_each(message, |tag, range| {
        if tag == field {
            found = &message[range];
        }
        Some(())
    })?;
    Some(found)
}

/// Where the user's first message ends; the whole chat where the user says nothing.
fn head(chat: &[u8]) -> Option<usize> {
    let mut head = None;
    for_each(chat, |tag, range| {
        if tag == MESSAGE && head.is_none() && last(&chat[range.clone()], ROLE)? == b"user" {
            head = Some(range.end);
        }
        Some(())
    })?;
    Some(head.unwrap_or(chat.len()))
}

fn max_tokens(sampling: &[u8]) -> Option<Option<u32>> {
    let mut found = None;
    let mut rest = sampling;
    while rest.has_remaining() {
        let (tag, wire) = decode_key(&mut rest).ok()?;
        if (tag, wire) == (MAX_TOKENS, WireType::Varint) {
            // Prost reads a uint32 by its low bits as well.
            found = Some(decode_varint(&mut rest).ok()? as u32);
        } else {
            skip_field(wire, tag, &mut rest, DecodeContext::default()).ok()?;
        }
    }
    Some(found)
}
