//! The bytes that each token stands for, taken once from the vocabulary and the decoder's description.

use std::collections::HashMap;

use serde::Deserialize;

/// Bytes of every id, in one arena.
#[derive(Debug)]
pub(crate) struct TokenBytes {
    arena: Vec<u8>,
    /// Where the bytes of id `i` end; they begin where those of `i - 1` end.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// From the bytes of each id; ids that are missing have none.
    pub(crate) fn new(tokens: HashMap<u32, Vec<u8>>) -> Self {
        let count = tokens.keys().max().map_or(0, |&id| id as usize + 1);
        let mut by_id = vec![Vec::new(); count];
        for (id, bytes) in tokens {
            by_id[id as usize] = bytes;
        }
        let (mut arena, mut ends) = (Vec::new(), Vec::with_capacity(count));
        for bytes in by_id {
            arena.extend_from_slice(&bytes);
            ends.push(arena.len());
        }
        Self { arena, ends }
    }

    /// Bytes of `id`; empty for an id outside the vocabulary.
    pub(crate) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.arena[start..end]
    }

    /// One more than the largest id.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }
}

/// The `decoder` of a tokenizer.json, as far as it says what a token's bytes are. What it does to a whole
/// text only (stripping a leading space, fusing) does not concern single tokens.
#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
pub(crate) enum Decoder {
    /// Each character of a token stands for one byte (GPT-2's table).
    ByteLevel {},
    /// `<0x0A>` is the byte 0x0A.
    ByteFallback {},
    /// A character, usually `▁`, stands for a space.
    Metaspace {
        #[serde(default = "lower_one_eighth_block")]
        replacement: char,
    },
    /// A pattern of each token is replaced.
    Replace { pattern: Pattern, content: String },
    /// Several, one after the other.
    Sequence { decoders: Vec<Decoder> },
    /// Concatenates all tokens.
    Fuse {},
    /// Strips characters off the whole text.
    Strip {},
    /// Not handled: names itself in the error.
    #[serde(untagged)]
    Other {
        #[serde(rename = "type")]
        kind: String,
    },
}

#[derive(Debug, Deserialize)]
pub(crate) enum Pattern {
    String(String),
    Regex(String),
}

fn lower_one_eighth_block() -> char {
    '▁'
}

/// How the text of a vocabulary entry becomes bytes.
#[derive(Debug, Default)]
pub(crate) struct Scheme {
    byte_level: Option<HashMap<char, u8>>,
    byte_fallback: bool,
    replacements: Vec<(String, String)>,
}

impl Scheme {
    /// Reads the decoder; the error is a message for the field `decoder`.
    pub(crate) fn new(decoder: &Decoder) -> Result<Self, String> {
        let mut scheme = Self::default();
        scheme.add(decoder)?;
        if scheme.byte_level.is_none() && !scheme.byte_fallback && scheme.replacements.is_empty() {
            return Err("describes neither byte-level nor SentencePiece tokens".into());
        }
        Ok(scheme)
    }

    fn add(&mut self, decoder: &Decoder) -> Result<(), String> {
        match decoder {
            Decoder::ByteLevel {} => self.byte_level = Some(byte_of_char()),
            Decoder::ByteFallback {} => self.byte_fallback = true,
            Decoder::Metaspace { replacement } => {
                self.replacements.push((replacement.to_string(), " ".into()));
            }
            Decoder::Replace {
                pattern: Pattern::String(from),
                content,
            } => {
                self.replacements.push((from.clone(), content.clone()));
            }
            Decoder::Replace {
                pattern: Pattern::Regex(regex),
                ..
            } => {
                return Err(format!(
                    "Replace with the regular expression {regex:?} is not supported"
                ));
            }
            Decoder::Sequence { decoders } => decoders.iter().try_for_each(|decoder| self.add(decoder))?,
            Decoder::Fuse {} | Decoder::Strip {} => {}
            Decoder::Other { kind } => {
                return Err(format!(
                    "type {kind:?} is not supported; byte-level BPE (ByteLevel) and SentencePiece \
                     (Metaspace, Replace, ByteFallback) are"
                ));
            }
        }
        Ok(())
    }

    /// Bytes of a vocabulary entry that is not an added token.
    pub(crate) fn bytes(&self, token: &str) -> Vec<u8> {
        if let Some(table) = &self.byte_level {
            // An entry with a character outside the table stands for itself.
            let mapped: Option<Vec<u8>> = token.chars().map(|c| table.get(&c).copied()).collect();
            return mapped.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(token)
        {
            return vec![byte];
        }
        let replaced = self
            .replacements
            .iter()
            .fold(token.to_string(), |text, (from, to)| text.replace(from, to));
        replaced.into_bytes()
    }
}

/// `<0xE5>` → 0xE5.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on, in
/// order (`bytes_to_unicode` in openai/gpt-2, src/encoder.py).
fn byte_of_char() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut shifted = '\u{100}'..;
    let char_of = |byte: u8| match printable(byte) {
        true => char::from(byte),
        false => shifted
            .next()
            .expect("the range holds far more than 256 characters"),
    };
    (0..=255u8).map(char_of).zip(0..=255u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheme(json: &str) -> Result<Scheme, String> {
        Scheme::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn byte_level_tokens_are_pieces_of_characters() {
        let scheme =
            scheme(r#"{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}"#)
                .unwrap();
        assert_eq!(scheme.bytes("Ġkm"), b" km");
        assert_eq!(scheme.bytes("åľ"), [0xE5, 0x9C]);
        assert_eq!(scheme.bytes("Ċ"), b"\n");
    }

    #[test]
    fn the_byte_table_is_a_bijection() {
        let table = byte_of_char();
        assert_eq!(table.len(), 256);
        assert_eq!(
            (table[&'Ġ'], table[&'!'], table[&'ÿ'], table[&'Ń']),
            (b' ', b'!', 0xFF, 0xAD)
        );
    }

    #[test]
    fn sentencepiece_tokens_have_spaces_and_fallback_bytes() {
        let scheme = scheme(
            r#"{"type":"Sequence","decoders":[
                {"type":"Replace","pattern":{"String":"▁"},"content":" "},
                {"type":"ByteFallback"},{"type":"Fuse"},
                {"type":"Strip","content":" ","start":1,"stop":0}]}"#,
        )
        .unwrap();
        assert_eq!(scheme.bytes("▁the▁"), b" the ");
        assert_eq!(scheme.bytes("<0xE5>"), [0xE5]);
        assert_eq!(scheme.bytes("<0xE>"), b"<0xE>");
    }

    #[test]
    fn a_decoder_that_is_not_handled_is_named() {
        let error = scheme(r#"{"type":"WordPiece","prefix":"","cleanup":true}"#).unwrap_err();
        assert!(error.contains("\"WordPiece\""), "{error}");
        let error = scheme(r#"{"type":"Fuse"}"#).unwrap_err();
        assert!(error.contains("neither"), "{error}");
    }

    #[test]
    fn ids_without_an_entry_have_no_bytes() {
        let table = TokenBytes::new(HashMap::from([(0, b"a".to_vec()), (2, b"bc".to_vec())]));
        assert_eq!(
            [table.get(0), table.get(1), table.get(2), table.get(3)],
            [&b"a"[..], b"", b"bc", b""]
        );
        assert_eq!(table.len(), 3);
    }
}
