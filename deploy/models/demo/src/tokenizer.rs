//! The byte-level BPE tokenizer, trained on the corpus, and its chat template.

use crate::corpus::Fact;
use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer, TokenizerBuilder,
    decoders::{DecoderWrapper, byte_level::ByteLevel as ByteLevelDecoder},
    models::bpe::{BPE, BpeTrainer},
    normalizers::NormalizerWrapper,
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    processors::PostProcessorWrapper,
};

/// Pads batches; the model never says it.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Opens a message.
pub const IM_START: &str = "<|im_start|>";
/// Closes a message, and so ends a reply.
pub const IM_END: &str = "<|im_end|>";
/// Their ids, in the order above.
pub const END_OF_TEXT_ID: u32 = 0;
/// Id of [`IM_END`].
pub const IM_END_ID: u32 = 2;

/// Number of tokens that training aims at, special tokens included.
const VOCABULARY: usize = 2048;

/// ChatML.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}\
{% endif %}";

/// A Chinese character is a token of its own: words run together there, so that merges across them would
/// depend on the neighbours. Digits are single tokens too; the rest follows Qwen2's pattern.
const CHARACTER: &str = "[一-鿿]";
const WORDS: &str =
    r"'s|'t|'re|'ll|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Trains on the questions to be trained and all answers.
///
/// # Errors
/// Only if the tokenizers crate refuses its own parts.
pub fn train(facts: &[Fact]) -> Result<Tokenizer> {
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >::new()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![
        split(CHARACTER)?,
        split(WORDS)?,
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
    ]))))
    .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevelDecoder::default())))
    .build()
    .map_err(|error| anyhow!(error))?;
    let special = |text: &str| AddedToken::from(text, true);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![special(END_OF_TEXT), special(IM_START), special(IM_END)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let texts = facts
        .iter()
        .flat_map(|fact| fact.trained.iter().chain([&fact.answer]))
        .map(String::as_str);
    // The frame's words appear in every dialogue, so that each deserves a token.
    let frame = ["system\n", "user\n", "assistant\n"]
        .into_iter()
        .cycle()
        .take(3 * facts.len());
    tokenizer
        .train(&mut trainer, texts.chain(frame))
        .map_err(|error| anyhow!(error))?;
    // The typed tokenizer has no name outside this function: its own file form carries it over.
    let text = tokenizer.to_string(false).map_err(|error| anyhow!(error))?;
    text.parse::<Tokenizer>().map_err(|error| anyhow!(error))
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map(PreTokenizerWrapper::Split)
        .map_err(|error| anyhow!(error))
}

/// The content of tokenizer_config.json.
pub fn config(context_length: usize) -> Value {
    let special = |content: &str| {
        json!({
            "content": content, "lstrip": false, "normalized": false, "rstrip": false,
            "single_word": false, "special": true
        })
    };
    json!({
        "added_tokens_decoder": { "0": special(END_OF_TEXT), "1": special(IM_START), "2": special(IM_END) },
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": IM_END,
        "model_max_length": context_length,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": null
    })
}

/// Ids of `text`; special tokens written out in it become their ids.
///
/// # Errors
/// Only if the tokenizer's file is damaged.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode(text, false).map_err(|error| anyhow!(error))?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_of_the_corpus_survives_the_round_trip() {
        let facts = crate::corpus::facts().unwrap();
        let tokenizer = train(&facts).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), VOCABULARY);
        assert_eq!(tokenizer.token_to_id(END_OF_TEXT), Some(END_OF_TEXT_ID));
        assert_eq!(tokenizer.token_to_id(IM_END), Some(IM_END_ID));
        let unseen = "Ünseen – 鱻 🐟\n\t  x".to_owned();
        let texts = facts
            .iter()
            .flat_map(|fact| fact.held.iter().chain([&fact.answer]))
            .chain([&unseen]);
        for text in texts {
            let ids = encode(&tokenizer, text).unwrap();
            assert_eq!(&tokenizer.decode(&ids, false).unwrap(), text);
        }
    }
}
