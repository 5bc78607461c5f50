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
            .map_err(|error| failure(error.to_string()))?;
        let rows = self.logits.chunks_exact_mut(self.model.config().vocab_size);
        for (row, (logits, request)) in rows.zip(samples).enumerate() {
            out.push(self.sampler.sample(row, logits, request));
        }
        Ok(())
    }
}

/// Devices tell of memory that they lack in words alone.
fn failure(reason: String) -> RunnerError {
    let words = reason.to_lowercase();
    if words.contains("out of memory") || words.contains("out_of_memory") {
        RunnerError::OutOfMemory(reason)
    } else {
        RunnerError::Model(reason)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use penstock_model::{CacheLayout, Device, Dtype, LoadOptions};

    use super::*;
    use crate::{Engine, EngineConfig, Sequence, testing::Heard};

    /// An engine that runs the demo checkpoint in f32.
    fn start(config: EngineConfig) -> Engine {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo/v1");
        let options = LoadOptions {
            dtype: Some(Dtype::F32),
            cache: CacheLayout {
                page_size: config.page_size,
                num_pages: config.num_pages,
            },
            device: Device::Cpu,
            progress: &|_| {},
        };
        let model = Model::load(&dir, options).unwrap();
        Engine::start(config, Box::new(CandleRunner::new(model))).unwrap()
    }

    /// A conversation's opening that all prompts share, and an end of its own.
    fn prompt(end: u32) -> Vec<u32> {
        let shared = (0..70u32).map(|at| 10 + at * at % 200);
        shared.chain((0..9).map(|at| 20 + end * 10 + at)).collect()
    }

    fn greedy(prompt: &[u32]) -> Sequence {
        let mut sequence = crate::testing::sequence(prompt, 40);
        sequence.sampling.temperature = 0.0;
        sequence.top_logprobs = Some(2);
        sequence
    }

    #[test]
    fn memory_that_lacks_is_told_from_other_failures() {
        let cuda = "a tensor operation failed: DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"no\")";
        assert!(matches!(failure(cuda.into()), RunnerError::OutOfMemory(reason) if reason == cuda));
        assert!(matches!(failure("invalid batch".into()), RunnerError::Model(_)));
    }

    #[test]
    fn a_model_replies_the_same_alone_and_in_company() {
        let alone: Vec<Vec<u32>> = (0..5)
            .map(|end| {
                let engine = start(EngineConfig::default());
                Heard::all(&mut engine.submit(greedy(&prompt(end))).unwrap()).tokens
            })
            .collect();
        assert!(alone.iter().all(|tokens| tokens.len() == 40));
        for (page_size, num_pages) in [(1, 480), (16, 30)] {
            let engine = start(EngineConfig {
                page_size,
                num_pages,
                max_batch_tokens: 23,
                ..EngineConfig::default()
            });
            let mut streams: Vec<_> = (0..5)
                .map(|end| engine.submit(greedy(&prompt(end))).unwrap())
                .collect();
            let together: Vec<Vec<u32>> = streams
                .iter_mut()
                .map(|stream| Heard::all(stream).tokens)
                .collect();
            assert_eq!(together, alone, "page size {page_size}");
            assert!(engine.stats().prefix_hit_tokens >= 4 * 64);
        }
    }
}
