//! Token ids to text, incrementally and byte-exactly.

use std::sync::Arc;

use crate::Tokenizer;

/// Turns ids into text as they come. A token may be part of a character: its bytes are held back until
/// the character is complete or proves invalid (then U+FFFD, exactly where
/// [`String::from_utf8_lossy`] over all bytes would put it).
///
/// The reply continues the prompt, so that a leading space which a tokenizer's decoder would strip from a
/// whole text is kept.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// Bytes of an incomplete character: at most three after each push.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A detokenizer at the start of a reply. `skip_special` leaves special tokens out of the text.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            pending: Vec::new(),
        }
    }

    /// The text that token `id` completes; empty while a character is incomplete. An id outside the
    /// vocabulary has no bytes.
    pub fn push(&mut self, id: u32) -> String {
        let bytes = match self.skip_special {
            true => self.tokenizer.token_bytes(id),
            false => self.tokenizer.token_bytes_with_special(id),
        };
        self.pending.extend_from_slice(bytes);
        drain_complete(&mut self.pending)
    }

    /// What is left at the end of the reply: U+FFFD for an incomplete character, else nothing.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

/// Takes the text out of `pending` and leaves the bytes of a last character that is not complete yet.
fn drain_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(pending.len());
    let mut taken = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let last = taken + invalid.len() == pending.len();
        if invalid.is_empty() || (last && is_incomplete(invalid)) {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        taken += invalid.len();
    }
    pending.drain(..taken);
    text
}

/// Whether more bytes could make `bytes` a valid character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(bytes: &[u8]) -> (Vec<String>, String) {
        let mut detokenizer = Detokenizer::new(Arc::new(Tokenizer::bytes()), true);
        let pushed = bytes.iter().map(|&byte| detokenizer.push(byte.into())).collect();
        (pushed, detokenizer.finish())
    }

    /// Bytes that are often, but not always, pieces of characters.
    fn byte_strings() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            "\\PC{0,3}".prop_map(String::into_bytes),
            Just("👩‍👩‍👧‍👦地é".as_bytes().to_vec()),
            prop::collection::vec(any::<u8>(), 0..4),
            // First bytes and continuation bytes on their own.
            Just(vec![0xF0, 0x9F]),
            Just(vec![0xE5]),
            Just(vec![0x80]),
            Just(vec![0xED, 0xA0, 0x80]),
        ];
        prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn byte_by_byte_equals_the_whole(bytes in byte_strings()) {
            let (pushed, rest) = run(&bytes);
            prop_assert_eq!(pushed.concat() + &rest, String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn every_split_equals_the_whole(bytes in byte_strings(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4)) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.sort_unstable();
            cuts.push(bytes.len());
            let (mut pending, mut text, mut start) = (Vec::new(), String::new(), 0);
            for cut in cuts {
                pending.extend_from_slice(&bytes[start..cut]);
                text += &drain_complete(&mut pending);
                prop_assert!(pending.len() < 4);
                start = cut;
            }
            text += &String::from_utf8_lossy(&pending);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn a_character_leaves_with_its_last_byte() {
        let (pushed, rest) = run("a地".as_bytes());
        assert_eq!(pushed, ["a", "", "", "地"]);
        assert_eq!(rest, "");
    }

    #[test]
    fn a_truncated_character_at_the_end_becomes_one_replacement() {
        let (pushed, rest) = run(&"😀".as_bytes()[..3]);
        assert_eq!(pushed.concat(), "");
        assert_eq!(rest, "\u{FFFD}");
    }
}
