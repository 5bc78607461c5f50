//! The engine: continuous batching over a paged KV pool, on one OS thread of its own.
//!
//! It takes token ids and returns token ids with timestamps. It refuses to know gRPC, text or telemetry.
//!
//! ```text
//! submit(Sequence) ─▶ bounded queue ─▶ scheduler ─▶ Batch ─▶ Runner (forward + sample) ─▶ TokenStream
//! ```
//!
//! ```
//! use penstock_engine::{Engine, EngineConfig, Event, FakeConfig, FakeRunner, Sequence};
//!
//! let runner = Box::new(FakeRunner::new(FakeConfig::default()));
//! let engine = Engine::start(EngineConfig::default(), runner)?;
//! let mut stream = engine.submit(Sequence {
//!     prompt: vec![1, 2, 3],
//!     max_tokens: 4,
//!     ..Sequence::default()
//! })?;
//! let mut tokens = 0;
//! while let Some(event) = stream.blocking_next() {
//!     tokens += usize::from(matches!(event, Event::Token(_)));
//! }
//! assert_eq!(tokens, 4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::time::{Duration, Instant};

mod candle;
mod constraint;
mod engine;
mod fake;
mod runner;
mod sampler;
mod sampling;
mod scheduler;
mod stream;
#[cfg(test)]
mod testing;

pub use candle::CandleRunner;
pub use constraint::Constraint;
pub use engine::{Engine, EngineConfig, EngineEnd, EngineError, EngineStats};
pub use fake::{FakeConfig, FakeRunner};
pub use penstock_grammar::{Matcher, MatcherError};
pub use penstock_model::Batch;
pub use runner::{Runner, RunnerError, RunnerInfo, SampleRequest, SampledToken, TokenHistory};
pub use sampler::Sampler;
pub use sampling::{SamplingParams, SamplingParamsError};
pub use stream::TokenStream;

/// One request as the engine sees it. Built by the worker, moved whole.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// Prompt token ids, at least one, each below the vocabulary size.
    pub prompt: Vec<u32>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Ids that end the reply (the checkpoint's end-of-sequence ids unless `ignore_eos`, and the request's own).
    pub stop_token_ids: Vec<u32>,
    /// Tokens to generate at most, at least 1. The engine also ends the reply at the end of the context.
    pub max_tokens: usize,
    /// Alternatives to report per token; `None` reports no log-probabilities.
    pub top_logprobs: Option<usize>,
    /// When the request must be over.
    pub deadline: Option<Instant>,
    /// KV is shared only between sequences of one namespace (tenant, adapter).
    pub namespace: u64,
    /// Sequences of a higher priority leave the queue first, whatever the others have waited.
    pub priority: i32,
    /// Whose it is. Among sequences of one priority, the tenants who were served least go first.
    pub tenant: u64,
    /// So many of the last ids of `prompt` are the reply's own, generated elsewhere: it goes on behind them as if they
    /// had been generated here, and they are not told again. `max_tokens` counts them.
    pub resumed: usize,
    /// What the reply must satisfy, behind what is resumed; its vocabulary is the model's. Tokens that it leaves no
    /// choice about are taken without sampling, and the reply ends where it ends.
    pub grammar: Option<Matcher>,
    /// The prompt's tokens from this index on are told first, each with its log-probability (none for the very first)
    /// and the alternatives that `top_logprobs` asks for. Their KV is then computed whatever the cache has. Not for a
    /// reply that is resumed.
    pub prompt_logprobs: Option<usize>,
}

impl Default for Sequence {
    /// One token behind an empty prompt, which must be given.
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            sampling: SamplingParams::default(),
            stop_token_ids: Vec::new(),
            max_tokens: 1,
            top_logprobs: None,
            deadline: None,
            namespace: 0,
            priority: 0,
            tenant: 0,
            resumed: 0,
            grammar: None,
            prompt_logprobs: None,
        }
    }
}

impl Sequence {
    /// How the reply ended, if what was generated elsewhere is all of it.
    pub(crate) fn ended(&self, context_length: usize) -> Option<FinishReason> {
        let last = self.prompt.last().filter(|_| self.resumed > 0)?;
        let room = context_length.saturating_sub(self.prompt.len() - self.resumed);
        let grammar_ended = self.grammar.as_ref().is_some_and(Matcher::is_stopped);
        let may_be_stopped = grammar_ended || self.resumed > self.sampling.min_tokens;
        if self.stop_token_ids.contains(last) && may_be_stopped {
            Some(FinishReason::StopToken(*last))
        } else if grammar_ended {
            Some(FinishReason::Grammar)
        } else {
            (self.resumed >= self.max_tokens.min(room)).then_some(FinishReason::Length)
        }
    }
}

/// What a [`TokenStream`] yields. `Finished` or `Failed` is always the last.
#[derive(Debug, Clone)]
pub enum Event {
    /// The sequence left the queue: its prompt starts to be computed.
    Started {
        /// When.
        at: Instant,
        /// Prompt tokens whose KV was already there.
        cached_tokens: usize,
    },
    /// Tokens of the prompt, in order, if asked for: before the first generated one.
    Prompt(Vec<Token>),
    /// One generated token.
    Token(Token),
    /// The reply is complete.
    Finished(Finished),
    /// The reply cannot be completed.
    Failed(SequenceError),
}

/// One generated token.
#[derive(Debug, Clone)]
pub struct Token {
    /// Token id.
    pub id: u32,
    /// When its step ended.
    pub at: Instant,
    /// Its log-probability (natural logarithm; after penalties, bias and grammar, before temperature), if asked for.
    /// It is 0 for a token that a grammar left no choice about.
    pub logprob: Option<f32>,
    /// The likeliest alternatives as (id, log-probability), likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// How a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated; it is the last [`Token`] of the stream.
    StopToken(u32),
    /// `max_tokens` or the end of the context.
    Length,
    /// The grammar ended: nothing may follow.
    Grammar,
}

/// Closing facts of a sequence.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens generated, a final stop token included.
    pub completion_tokens: usize,
    /// Whether the reply satisfies its grammar; `None` where it has none.
    pub grammar_satisfied: Option<bool>,
}

/// Why a running sequence failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SequenceError {
    /// The deadline passed.
    #[error("deadline exceeded after {completion_tokens} tokens")]
    DeadlineExceeded {
        /// Tokens generated so far.
        completion_tokens: usize,
    },
    /// The model's forward pass failed.
    #[error("the model failed: {0}")]
    Runner(String),
    /// What runs the model is gone for now; the request can be sent again, elsewhere at best.
    #[error("the engine cannot go on for now: {0}")]
    Unavailable(String),
    /// The grammar cannot be followed any further.
    #[error(transparent)]
    Grammar(#[from] MatcherError),
    /// The engine's own bookkeeping failed; it dropped all KV and goes on.
    #[error("the engine failed and lost the request; it can be sent again")]
    Internal,
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// Why a sequence was not admitted.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The waiting queue is full; try again after `retry_after`.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// Sequences waiting.
        waiting: usize,
        /// When room is expected.
        retry_after: Duration,
    },
    /// The prompt leaves no room to generate.
    #[error("the prompt has {prompt} tokens, the context holds {context} and at least one must be generated")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Context length (or all of the KV pool, if that is smaller), in tokens.
        context: usize,
    },
    /// The prompt is empty.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A token id outside the vocabulary.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Its index in the prompt.
        position: usize,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A grammar for another vocabulary.
    #[error("the grammar is for a vocabulary of {grammar} tokens, the model has {vocab_size}")]
    GrammarVocabulary {
        /// Tokens that the grammar knows.
        grammar: usize,
        /// Size of the model's vocabulary.
        vocab_size: usize,
    },
    /// Sampling parameters out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingParamsError),
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
}
