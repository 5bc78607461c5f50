//! A runner without a model, for load tests: made-up tokens at a given pace.

use std::{
    thread,
    time::{Duration, Instant},
};

use penstock_grammar::TokenMask;
use penstock_model::{Batch, BatchSequence};

use crate::{
    SampleRequest, SampledToken,
    runner::{Runner, RunnerError, RunnerInfo},
};

/// How a fake runner behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeConfig {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Longest sequence in tokens.
    pub context_length: usize,
    /// Time per step.
    pub pace: Duration,
    /// The tokens that it yields lie in this range of ids.
    pub token_ids: std::ops::Range<u32>,
}

/// Yields tokens that depend on the sequence's last token and position alone.
#[derive(Debug)]
pub struct FakeRunner {
    config: FakeConfig,
}

// === impl FakeConfig ===

impl Default for FakeConfig {
    /// Lower-case ASCII letters, at once.
    fn default() -> Self {
        Self {
            vocab_size: 256,
            context_length: 4096,
            pace: Duration::ZERO,
            token_ids: 97..123,
        }
    }
}

// === impl FakeRunner ===

impl FakeRunner {
    /// A runner that behaves as `config` says.
    pub fn new(config: FakeConfig) -> Self {
        Self { config }
    }
}

/// The token that was meant where the mask has it, else one that it has.
fn constrained(mask: &TokenMask, id: u32, mixed: u64) -> u32 {
    let nth = usize::try_from(mixed % mask.count().max(1) as u64).unwrap_or(0);
    match mask.allows(id) {
        true => id,
        false => mask.iter().nth(nth).unwrap_or(id),
    }
}

impl Runner for FakeRunner {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn context_length(&self) -> usize {
        self.config.context_length
    }

    fn describe(&self) -> RunnerInfo {
        RunnerInfo {
            name: "fake",
            device: "none".into(),
        }
    }

    fn step(
        &mut self,
        batch: &Batch,
        samples: &[SampleRequest<'_>],
        out: &mut Vec<Result<SampledToken, RunnerError>>,
    ) -> Result<(), RunnerError> {
        let end = Instant::now() + self.config.pace;
        let range = &self.config.token_ids;
        let rows = batch.sequences.iter().flat_map(BatchSequence::logit_rows);
        for (row, request) in rows.zip(samples) {
            let last = batch.tokens[row];
            let context_len = u64::from(batch.positions[row]) + 1;
            let mixed = u64::from(last).wrapping_mul(31).wrapping_add(context_len * 7);
            let span = u64::from(range.end - range.start).max(1);
            let id = range.start + u32::try_from(mixed % span).unwrap_or(0);
            let id = match request.grammar.filter(|_| request.follows.is_none()) {
                None => request.follows.unwrap_or(id),
                Some(grammar) => match grammar.with_mask(|mask| constrained(mask, id, mixed)) {
                    Ok(id) => id,
                    Err(error) => {
                        out.push(Err(error.into()));
                        continue;
                    }
                },
            };
            let top = (0..request.top_logprobs.unwrap_or(0))
                .map(|rank| (id, -(rank as f32)))
                .collect();
            out.push(Ok(SampledToken {
                id,
                logprob: request.top_logprobs.map(|_| 0.0),
                top,
            }));
        }
        thread::sleep(end.saturating_duration_since(Instant::now()));
        Ok(())
    }
}
