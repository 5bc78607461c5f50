//! The runner of real models.

use penstock_model::{Batch, Model};

use crate::{
    SampleRequest, SampledToken,
    runner::{Runner, RunnerError, RunnerInfo},
    sampler::Sampler,
};

/// A model on candle, with sampling on the CPU.
pub struct CandleRunner {
    model: Model,
    sampler: Sampler,
    logits: Vec<f32>,
}

// === impl CandleRunner ===

impl CandleRunner {
    /// Runs `model`.
    pub fn new(model: Model) -> Self {
        Self {
            model,
            sampler: Sampler::new(),
            logits: Vec::new(),
        }
    }
}

impl Runner for CandleRunner {
    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn context_length(&self) -> usize {
        self.model.config().max_position_embeddings
    }

    fn describe(&self) -> RunnerInfo {
        RunnerInfo {
            name: "candle",
            device: self.model.device(),
        }
    }

    fn step(
        &mut self,
        batch: &Batch,
        samples: &[SampleRequest<'_>],
        out: &mut Vec<Result<SampledToken, RunnerError>>,
    ) -> Result<(), RunnerError> {
        self.model
            .forward(batch, &mut self.logits)
            .map_err(|error| RunnerError::Model(error.to_string()))?;
        let rows = self.logits.chunks_exact_mut(self.model.config().vocab_size);
        for (row, (logits, request)) in rows.zip(samples).enumerate() {
            out.push(self.sampler.sample(row, logits, request));
        }
        Ok(())
    }
}
