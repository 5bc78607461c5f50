use super::*;
use crate::Detokenizer;
use proptest::prelude::*;
use serde_json::json;
use std::sync::Arc;

fn write(value: &serde_json::Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), value.to_string()).unwrap();
    dir
}

/// Byte-level BPE over all bytes, with one merge, one special and one plain added token.
fn byte_level() -> serde_json::Value {
    let chars = (b'!'..=b'~')
        .chain(0xA1..=0xAC)
        .chain(0xAE..=0xFF)
        .map(char::from)
        .chain('\u{100}'..='\u{143}');
    let mut vocab: serde_json::Map<String, serde_json::Value> = chars
        .enumerate()
        .map(|(id, c)| (c.to_string(), id.into()))
        .collect();
    vocab.insert("Ġk".into(), 256.into());
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let added = |id, content: &str, special| {
        json!({"id": id, "content": content, "special": special,
               "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [added(257, "<|end|>", true), added(258, "<tool call>", false)],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": [["Ġ", "k"]]}
    })
}

/// SentencePiece-style BPE: spaces as `▁`, all other unknown characters as bytes.
fn sentencepiece() -> serde_json::Value {
    let mut vocab: serde_json::Map<String, serde_json::Value> = (0..256)
        .map(|byte| (format!("<0x{byte:02X}>"), byte.into()))
        .collect();
    for (id, token) in ["▁", "k", "m", "▁k", "<unk>"].into_iter().enumerate() {
        vocab.insert(token.into(), (256 + id).into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                  "vocab": vocab, "merges": [["▁", "k"]]}
    })
}

fn load(value: &serde_json::Value) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::load(write(value).path()).unwrap())
}

fn decode(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> String {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special);
    let text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    text + &detokenizer.finish()
}

#[test]
fn special_tokens_are_text_only_when_asked_for() {
    let tokenizer = load(&byte_level());
    let ids = tokenizer.encode("5 km<|end|>", false).unwrap();
    assert_eq!(ids.len(), 4);
    assert_eq!((ids[1], ids[3]), (256, 257));
    assert_eq!(tokenizer.token_bytes(256), b" k");
    assert_eq!(decode(&tokenizer, &ids, true), "5 km");
    assert_eq!(decode(&tokenizer, &ids, false), "5 km<|end|>");
    assert_eq!(tokenizer.id_of("<|end|>"), Some(257));
    assert!(tokenizer.is_special(257) && !tokenizer.is_special(258));
    assert_eq!(tokenizer.token_bytes(258), b"<tool call>");
    assert_eq!(tokenizer.vocab_size(), 259);
}

#[test]
fn truncation_in_the_file_is_ignored() {
    let tokenizer = load(&byte_level());
    assert_eq!(tokenizer.encode("abcdefgh", true).unwrap().len(), 8);
}

#[test]
fn errors_name_the_file_and_the_field() {
    let missing = Tokenizer::load(Path::new("/nonexistent"))
        .unwrap_err()
        .to_string();
    assert!(missing.contains("/nonexistent/tokenizer.json"), "{missing}");

    let mut value = byte_level();
    value["decoder"] = json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": true});
    let error = Tokenizer::load(write(&value).path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: decoder: type \"CTC\""), "{error}");

    value["decoder"] = serde_json::Value::Null;
    let error = Tokenizer::load(write(&value).path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: decoder: is missing"), "{error}");

    let error = Tokenizer::load(write(&json!({"version": "1.0"})).path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("tokenizer.json: file:"), "{error}");
}

proptest! {
    #[test]
    fn byte_level_text_survives_the_round_trip(text in "(\\PC|[ km\n地é😀]){0,12}") {
        let tokenizer = load(&byte_level());
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(decode(&tokenizer, &ids, true), text);
    }

    #[test]
    fn sentencepiece_text_survives_the_round_trip(text in "[ km地é😀]{0,12}") {
        let tokenizer = load(&sentencepiece());
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(decode(&tokenizer, &ids, true), text);
    }
}
