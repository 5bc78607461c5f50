//! What a GGUF file says of its tokenizer.

use std::path::Path;

use candle_core::quantized::gguf_file::Value;

use super::{Gguf, find};
use crate::LoadError;

/// A GGUF file's tokenizer and chat template, as they stand in it.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufText {
    /// `tokenizer.ggml.model`: `gpt2` is byte-level BPE, `llama` is SentencePiece.
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut before it is encoded, e.g. `qwen2`; empty where the file does not say.
    pub pre: String,
    /// Every token, by id.
    pub tokens: Vec<String>,
    /// What each is; as long as `tokens`.
    pub kinds: Vec<TokenKind>,
    /// Pairs that are merged, the first first, with a space between their parts.
    pub merges: Vec<String>,
    /// Begins a text, where `add_bos` says so.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Whether texts begin with `bos`.
    pub add_bos: bool,
    /// Jinja source.
    pub chat_template: Option<String>,
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// Marks structure, and is no text.
    Control,
    /// A text that is never cut.
    UserDefined,
}

impl GgufText {
    /// That of the GGUF file that `path` is or holds; `None` where there is none.
    ///
    /// # Errors
    /// The file is broken, or a field is of the wrong kind.
    pub fn load(path: &Path) -> Result<Option<Self>, LoadError> {
        find(path)?.map(|path| Gguf::open(path)?.tokenizer()).transpose()
    }
}

impl Gguf {
    fn tokenizer(&self) -> Result<GgufText, LoadError> {
        let tokens = self
            .texts("tokenizer.ggml.tokens")?
            .ok_or_else(|| self.missing("tokenizer.ggml.tokens"))?;
        let kinds = self.kinds(tokens.len())?;
        let optional = |key: &str| match self.content.metadata.contains_key(key) {
            true => self.text(key).map(|text| Some(text.to_owned())),
            false => Ok(None),
        };
        let id = |key: &str| -> Result<Option<u32>, LoadError> {
            let Some(value) = self.value(key)? else {
                return Ok(None);
            };
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.filter(|&id| (id as usize) < tokens.len());
            let problem = || format!("is {value}, which is no token of {}", tokens.len());
            id.map(Some).ok_or_else(|| self.wrong(key, &problem()))
        };
        let add_bos = match self.content.metadata.get("tokenizer.ggml.add_bos_token") {
            None => false,
            Some(Value::Bool(add)) => *add,
            Some(_) => return Err(self.wrong("tokenizer.ggml.add_bos_token", "must be true or false")),
        };
        Ok(GgufText {
            model: self.text("tokenizer.ggml.model")?.to_owned(),
            pre: optional("tokenizer.ggml.pre")?.unwrap_or_default(),
            merges: self.texts("tokenizer.ggml.merges")?.unwrap_or_default(),
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: id("tokenizer.ggml.eos_token_id")?,
            add_bos,
            chat_template: optional("tokenizer.chat_template")?,
            kinds,
            tokens,
        })
    }

    fn texts(&self, key: &str) -> Result<Option<Vec<String>>, LoadError> {
        let wrong = || self.wrong(key, "must be a list of texts");
        let Some(value) = self.content.metadata.get(key) else {
            return Ok(None);
        };
        let Value::Array(values) = value else {
            return Err(wrong());
        };
        let text = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            _ => Err(wrong()),
        };
        values.iter().map(text).collect::<Result<_, _>>().map(Some)
    }

    fn kinds(&self, count: usize) -> Result<Vec<TokenKind>, LoadError> {
        let key = "tokenizer.ggml.token_type";
        let Some(value) = self.content.metadata.get(key) else {
            return Ok(vec![TokenKind::Normal; count]);
        };
        let kind = |value: &Value| match value {
            Value::I32(3) | Value::U32(3) => TokenKind::Control,
            Value::I32(4) | Value::U32(4) => TokenKind::UserDefined,
            _ => TokenKind::Normal,
        };
        match value {
            Value::Array(values) if values.len() == count => Ok(values.iter().map(kind).collect()),
            _ => Err(self.wrong(
                key,
                &format!("must be a list of {count} numbers, one for each token"),
            )),
        }
    }
}
