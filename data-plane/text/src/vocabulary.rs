//! A byte-level BPE tokenizer from its bare parts, as GGUF files hold them.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{TextError, Tokenizer};

/// How text is cut before it is encoded; the names are those of GGUF's `tokenizer.ggml.pre`.
const CUTS: [(&[&str], &str); 2] = [
    (
        &["qwen2", "deepseek-r1-qwen", "megrez"],
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        &["llama-bpe", "llama3", "llama-v3", "smaug-bpe"],
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];
/// Those that are cut as GPT-2 cuts.
const AS_GPT2: [&str; 2] = ["", "gpt-2"];

/// A byte-level BPE vocabulary.
#[derive(Debug, Clone, Default)]
pub struct BpeVocabulary {
    /// How text is cut, e.g. `qwen2`; empty for GPT-2's way.
    pub pre: String,
    /// Every token, by id, in GPT-2's alphabet of bytes.
    pub tokens: Vec<String>,
    /// Ids that mark structure.
    pub control: Vec<u32>,
    /// Ids of texts that are never cut.
    pub user_defined: Vec<u32>,
    /// Pairs that are merged, the first first, with a space between their parts.
    pub merges: Vec<String>,
    /// Begins every text that is encoded with special tokens.
    pub bos: Option<u32>,
}

impl BpeVocabulary {
    /// The tokenizer. Errors name `path`.
    ///
    /// # Errors
    /// The cut is none that is known, or the parts contradict each other.
    pub fn tokenizer(&self, path: &Path) -> Result<Tokenizer, TextError> {
        let token = |id: u32| {
            self.tokens.get(id as usize).ok_or_else(|| {
                let problem = format!("has {id}, the vocabulary {} tokens", self.tokens.len());
                TextError::invalid(path, "tokenizer.ggml.bos_token_id", problem)
            })
        };
        let kinds = [(&self.control, true), (&self.user_defined, false)];
        let kinds = kinds
            .into_iter()
            .flat_map(|(ids, special)| ids.iter().map(move |&id| (id, special)));
        let mut added = Vec::new();
        for (id, special) in kinds {
            added.push(json!({
                "id": id, "content": token(id)?, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
        added.sort_by_key(|token| token["id"].as_u64());
        let vocabulary: Map<String, Value> = self
            .tokens
            .iter()
            .enumerate()
            .map(|(id, token)| (token.clone(), json!(id)))
            .collect();
        let post_processor = match self.bos {
            None => Value::Null,
            Some(bos) => {
                let text = token(bos)?;
                json!({
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
                })
            }
        };
        let byte_level = |cuts: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": cuts});
        let is_llama = self.pre.starts_with("llama");
        let document = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": if self.pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": self.cut(path, byte_level)?,
            "post_processor": post_processor,
            "decoder": byte_level(true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": is_llama, "vocab": vocabulary, "merges": self.merges,
            },
        });
        Tokenizer::from_json(&document.to_string(), path)
    }

    fn cut(&self, path: &Path, byte_level: impl Fn(bool) -> Value) -> Result<Value, TextError> {
        if AS_GPT2.contains(&self.pre.as_str()) {
            return Ok(byte_level(true));
        }
        let known = CUTS.iter().find(|(names, _)| names.contains(&self.pre.as_str()));
        let Some((_, regex)) = known else {
            let names: Vec<&str> = CUTS.iter().flat_map(|(names, _)| *names).copied().collect();
            let problem = format!(
                "is {:?}; known are gpt-2, {}: put the model's tokenizer.json beside the file",
                self.pre,
                names.join(", ")
            );
            return Err(TextError::invalid(path, "tokenizer.ggml.pre", problem));
        };
        Ok(json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The demo model's tokens, which stand for themselves and all bytes.
    fn demo() -> BpeVocabulary {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo/v1/tokenizer.json");
        let document: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut tokens = vec![String::new(); document["model"]["vocab"].as_object().unwrap().len()];
        for (token, id) in document["model"]["vocab"].as_object().unwrap() {
            tokens[id.as_u64().unwrap() as usize] = token.clone();
        }
        let merge = |merge: &Value| match merge {
            Value::Array(parts) => format!("{} {}", parts[0].as_str().unwrap(), parts[1].as_str().unwrap()),
            merge => merge.as_str().unwrap().to_owned(),
        };
        BpeVocabulary {
            pre: "qwen2".into(),
            control: vec![0, 1, 2],
            merges: document["model"]["merges"]
                .as_array()
                .unwrap()
                .iter()
                .map(merge)
                .collect(),
            tokens,
            ..BpeVocabulary::default()
        }
    }

    #[test]
    fn text_comes_back_and_is_encoded_as_the_checkpoints_own_tokenizer_does() {
        let own = Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo/v1"))
            .unwrap();
        for pre in ["qwen2", "llama-bpe", "gpt-2"] {
            let made = BpeVocabulary {
                pre: pre.into(),
                ..demo()
            }
            .tokenizer(Path::new("x.gguf"))
            .unwrap();
            for text in [
                "The capital of France is Paris.",
                "<|im_start|>user\nWhat's 12 + 345?<|im_end|>",
                "naïve 巴黎 é",
            ] {
                let ids = made.encode(text, true).unwrap();
                let bytes: Vec<u8> = ids
                    .iter()
                    .flat_map(|&id| made.token_bytes_with_special(id))
                    .copied()
                    .collect();
                assert_eq!(String::from_utf8(bytes).unwrap(), text, "{pre}");
            }
            let text = "The capital of France is Paris.";
            assert_eq!(
                made.encode(text, false).unwrap(),
                own.encode(text, false).unwrap(),
                "{pre}"
            );
            assert!(made.is_special(2) && !made.is_special(3));
        }
    }

    #[test]
    fn a_text_begins_with_the_token_that_begins_texts() {
        let made = BpeVocabulary {
            bos: Some(1),
            ..demo()
        }
        .tokenizer(Path::new("x.gguf"))
        .unwrap();
        let ids = made.encode("Hello", true).unwrap();
        assert_eq!(
            (ids[0], &ids[1..]),
            (1, made.encode("Hello", false).unwrap().as_slice())
        );
    }

    #[test]
    fn an_unknown_cut_is_named_with_the_remedy() {
        let unknown = BpeVocabulary {
            pre: "tekken".into(),
            ..demo()
        };
        let error = unknown.tokenizer(Path::new("x.gguf")).unwrap_err().to_string();
        assert!(
            error.contains("x.gguf: tokenizer.ggml.pre: is \"tekken\"") && error.contains("tokenizer.json"),
            "{error}"
        );
        let beyond = BpeVocabulary {
            bos: Some(9999),
            ..demo()
        };
        assert!(beyond.tokenizer(Path::new("x.gguf")).is_err());
    }
}
