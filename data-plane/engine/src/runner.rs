//! What runs a batch: the seam between the scheduler and whatever computes tokens.

use std::collections::HashMap;

use penstock_model::Batch;

use crate::{Constraint, MatcherError, SamplingParams, SequenceError};

/// Computes one step: the forward pass of a batch, and one sampled token per row of logits.
///
/// Called from the engine's thread only. An implementation may keep KV by page id; the scheduler guarantees that
/// a page is written by one sequence only until it is shared, and read by none before it is written.
pub trait Runner: Send {
    /// Size of the vocabulary; every token id is below it.
    fn vocab_size(&self) -> usize;

    /// Longest sequence, prompt and reply together, in tokens.
    fn context_length(&self) -> usize;

    /// What it is, for people.
    fn describe(&self) -> RunnerInfo;

    /// Whether it can run a step now. Asked before each step, and while there is nothing to do.
    ///
    /// # Errors
    /// Not now, and why; it is asked again.
    fn ready(&mut self) -> Result<(), RunnerError> {
        Ok(())
    }

    /// Runs `batch`. `samples` has one entry per row of logits ([`Batch::logit_rows`]), in the order of the batch;
    /// `out` gets one token for each, in the same order, or the error of that row alone.
    ///
    /// # Errors
    /// The step failed; the KV that it was to write is undefined.
    fn step(
        &mut self,
        batch: &Batch,
        samples: &[SampleRequest<'_>],
        out: &mut Vec<Result<SampledToken, RunnerError>>,
    ) -> Result<(), RunnerError>;
}

/// What a runner is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunnerInfo {
    /// `candle` or `fake`.
    pub name: &'static str,
    /// What it runs on, e.g. `cpu (avx512, amx)`.
    pub device: String,
}

/// How to sample one row of logits.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// Parameters.
    pub params: &'a SamplingParams,
    /// Index of the token in the reply, from 0; the random number is hash(seed, index).
    pub index: u64,
    /// Tokens seen so far, where penalties need them.
    pub history: Option<&'a TokenHistory>,
    /// Alternatives to report; `None` reports no log-probabilities.
    pub top_logprobs: Option<usize>,
    /// The token of the prompt that follows: nothing is sampled, this one is reported with the log-probability that
    /// the model gives it, whatever the parameters.
    pub follows: Option<u32>,
    /// Ids that end the reply: not before `min_tokens`.
    pub stop_token_ids: &'a [u32],
    /// What the reply must satisfy.
    pub grammar: Option<&'a Constraint>,
}

/// How often each token was seen, in the prompt and in the reply.
#[derive(Debug, Clone, Default)]
pub struct TokenHistory(HashMap<u32, Occurrences>);

/// Where a token was seen.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Occurrences {
    pub(crate) in_reply: u32,
}

/// One sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// Its log-probability, if asked for.
    pub logprob: Option<f32>,
    /// The likeliest alternatives, likeliest first, if asked for.
    pub top: Vec<(u32, f32)>,
}

/// Why a step failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    /// The model failed.
    #[error("{0}")]
    Model(String),
    /// The device has no memory left for the step.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// A part of what runs the model is gone for now. The requests of the step can be sent again, elsewhere at best.
    #[error("{0}")]
    Unavailable(String),
    /// The grammar of a row cannot be followed.
    #[error(transparent)]
    Grammar(#[from] MatcherError),
    /// The model yields logits that are not numbers.
    #[error("the logits of row {row} are not numbers")]
    NotNumbers {
        /// Index among the rows of this step.
        row: usize,
    },
}

// === impl RunnerError ===

impl From<RunnerError> for SequenceError {
    fn from(error: RunnerError) -> Self {
        match error {
            RunnerError::Grammar(error) => Self::Grammar(error),
            RunnerError::Unavailable(reason) => Self::Unavailable(reason),
            error => Self::Runner(error.to_string()),
        }
    }
}

// === impl TokenHistory ===

impl TokenHistory {
    /// What a sequence has seen when its prompt is all there is.
    pub fn of_prompt(prompt: &[u32]) -> Self {
        Self(prompt.iter().map(|&id| (id, Occurrences::default())).collect())
    }

    /// A token was generated.
    pub fn generated(&mut self, id: u32) {
        self.0.entry(id).or_default().in_reply += 1;
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, Occurrences)> {
        self.0.iter().map(|(&id, &seen)| (id, seen))
    }
}
