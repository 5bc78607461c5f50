//! Grammars of requests, compiled for one revision's vocabulary.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_engine::Matcher;
use penstock_grammar::{Config, Grammar, GrammarCompiler, Vocabulary, VocabularyError};
use penstock_text::Tokenizer;

use crate::generate::{CallError, Violation};

/// The compiler of one revision, or why it has none.
#[derive(Debug)]
pub(crate) struct Grammars(Result<Arc<GrammarCompiler>, VocabularyError>);

// === impl Grammars ===

impl Grammars {
    /// Takes a tenth of a second or more for a large vocabulary. A model whose vocabulary cannot be constrained is
    /// served without.
    pub(crate) fn new(
        revision: &str,
        tokenizer: &Arc<Tokenizer>,
        vocab_size: usize,
        eos_token_ids: &[u32],
    ) -> Self {
        let vocabulary = vocabulary(tokenizer, vocab_size, eos_token_ids);
        if let Err(error) = &vocabulary {
            tracing::warn!(revision, %error, "its replies cannot be constrained by grammars");
        }
        Self(vocabulary.map(|vocabulary| Arc::new(GrammarCompiler::new(vocabulary, Config::default()))))
    }

    /// A matcher at the beginning of a reply; compiles off the async threads, until `deadline` at the longest.
    pub(crate) async fn compile(
        &self,
        grammar: Option<Grammar>,
        deadline: Option<Instant>,
    ) -> Result<Option<Matcher>, CallError> {
        let Some(grammar) = grammar else {
            return Ok(None);
        };
        let compiler = self.0.as_ref().map_err(|error| {
            let description = format!("cannot be followed by this model: {error}");
            CallError::from(Violation::new("grammar", description))
        })?;
        if let Some(compiled) = compiler.cached(&grammar) {
            return Ok(Some(compiled.matcher()));
        }
        let compiler = compiler.clone();
        let limit = deadline.map_or(Duration::MAX, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        let compile = move || compiler.compile_with_deadline(&grammar, limit);
        match tokio::task::spawn_blocking(compile).await {
            Ok(compiled) => Ok(Some(compiled?.matcher())),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

fn vocabulary(
    tokenizer: &Arc<Tokenizer>,
    vocab_size: usize,
    eos_token_ids: &[u32],
) -> Result<Arc<Vocabulary>, VocabularyError> {
    let len = tokenizer.vocab_size().min(vocab_size);
    let ids = 0..u32::try_from(len).unwrap_or(u32::MAX);
    let tokens = ids
        .clone()
        .map(|id| tokenizer.token_bytes_with_special(id).to_vec());
    let special: Vec<u32> = ids.clone().filter(|&id| tokenizer.is_special(id)).collect();
    // The padding of a model's vocabulary may hold an end that its tokenizer lacks; nothing can spell it.
    let ends: Vec<u32> = eos_token_ids
        .iter()
        .copied()
        .filter(|id| ids.contains(id))
        .collect();
    let tokenize = {
        let tokenizer = tokenizer.clone();
        move |text: &str| tokenizer.encode(text, false).unwrap_or_default()
    };
    Vocabulary::with_tokenizer(tokens.collect(), &special, &ends, tokenize)
}
