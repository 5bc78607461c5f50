//! Text to token ids, and the bytes of each id.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use serde::Deserialize;

use crate::{
    error::{TextError, read},
    token_bytes::{Decoder, Scheme, TokenBytes},
};

/// A checkpoint's tokenizer (`tokenizer.json` of Hugging Face's tokenizers).
#[derive(Debug)]
pub struct Tokenizer {
    encoder: Encoder,
    bytes: TokenBytes,
    special: HashSet<u32>,
}

#[derive(Debug)]
enum Encoder {
    HuggingFace(Box<tokenizers::Tokenizer>),
    Bytes,
}

/// The only part of tokenizer.json that its own crate does not tell us.
#[derive(Deserialize)]
struct Description {
    decoder: Option<Decoder>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` from a checkpoint's directory. Truncation and padding that it asks for are
    /// left out: a prompt is never cut silently.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        Self::from_json(&read(&path)?, &path)
    }

    /// The tokenizer that `json` describes, in the format of `tokenizer.json`. Errors name `path`.
    pub(crate) fn from_json(json: &str, path: &Path) -> Result<Self, TextError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json.as_bytes())
            .map_err(|error| TextError::invalid(path, "file", error))?;
        let description: Description =
            serde_json::from_str(json).map_err(|error| TextError::invalid(path, "decoder", error))?;
        let decoder = description.decoder.ok_or_else(|| {
            TextError::invalid(
                path,
                "decoder",
                "is missing, so that the text of a token is unknown",
            )
        })?;
        let scheme = Scheme::new(&decoder).map_err(|message| TextError::invalid(path, "decoder", message))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| TextError::invalid(path, "truncation", error))?;

        let added = inner.get_added_tokens_decoder();
        let mut tokens: HashMap<u32, Vec<u8>> = inner
            .get_vocab(false)
            .into_iter()
            .map(|(token, id)| (id, scheme.bytes(&token)))
            .collect();
        // Added tokens stand for themselves, whatever the decoder does to the others.
        tokens.extend(
            added
                .iter()
                .map(|(&id, token)| (id, token.content.clone().into_bytes())),
        );
        let special = added
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        Ok(Self {
            encoder: Encoder::HuggingFace(Box::new(inner)),
            bytes: TokenBytes::new(tokens),
            special,
        })
    }

    /// The trivial tokenizer: each byte is a token. For models without a checkpoint.
    pub fn bytes() -> Self {
        let tokens = (0..=255u8).map(|byte| (byte.into(), vec![byte])).collect();
        Self {
            encoder: Encoder::Bytes,
            bytes: TokenBytes::new(tokens),
            special: HashSet::new(),
        }
    }

    /// Token ids of `text`. `add_special_tokens` adds what the tokenizer's post-processor says, usually a
    /// beginning-of-sequence token; a rendered chat brings its own and wants `false`.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        match &self.encoder {
            Encoder::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Encoder::HuggingFace(inner) => {
                let encoding = inner
                    .encode_fast(text, add_special_tokens)
                    .map_err(|error| TextError::Encode(error.to_string()))?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// The bytes of a token, possibly a part of a character. Empty for special tokens and for ids outside
    /// the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        if self.is_special(id) {
            &[]
        } else {
            self.bytes.get(id)
        }
    }

    /// The bytes of a token, special or not. Empty for ids outside the vocabulary.
    pub fn token_bytes_with_special(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// One more than the largest id. The model's own vocabulary may be larger (padded).
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The id of a vocabulary entry, e.g. `<|im_end|>`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::Bytes => match token.as_bytes() {
                [byte] => Some((*byte).into()),
                _ => None,
            },
            Encoder::HuggingFace(inner) => inner.token_to_id(token),
        }
    }

    /// Whether the token marks structure (begin, end, roles) and is left out of text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }
}

#[cfg(test)]
mod tests;
