//! The runner of real models.

use penstock_model::{Batch, Model, ModelError};

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

    fn ready(&mut self) -> Result<(), RunnerError> {
        self.model.ready().map_err(failure)
    }

    fn step(
        &mut self,
        batch: &Batch,
        samples: &[SampleRequest<'_>],
        out: &mut Vec<Result<SampledToken, RunnerError>>,
    ) -> Result<(), RunnerError> {
        self.model.forward(batch, &mut self.logits).map_err(failure)?;
        let rows = self.logits.chunks_exact_mut(self.model.config().vocab_size);
        for (row, (logits, request)) in rows.zip(samples).enumerate() {
            out.push(self.sampler.sample(row, logits, request));
        }
        Ok(())
    }
}

fn failure(error: ModelError) -> RunnerError {
    let reason = error.to_string();
    match error {
        ModelError::Rank(_) => RunnerError::Unavailable(reason),
        _ if tells_of_memory(&reason) => RunnerError::OutOfMemory(reason),
        _ => RunnerError::Model(reason),
    }
}

/// Devices tell of memory that they lack in words alone.
fn tells_of_memory(reason: &str) -> bool {
    let words = reason.to_lowercase();
    words.contains("out of memory") || words.contains("out_of_memory")
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread,
        time::{Duration, Instant},
    };

    use penstock_grammar::{Grammar, GrammarCompiler, Vocabulary};
    use penstock_model::{
        CacheLayout, Collective, CollectiveError, Device, Dtype, LoadOptions, LocalCollective, TensorParallel,
    };

    use super::*;
    use crate::{Engine, EngineConfig, Sequence, testing::Heard};

    /// An engine that runs the demo checkpoint in f32.
    fn start(config: EngineConfig) -> Engine {
        start_on(config, LocalCollective::group(1, Duration::from_secs(60)))
    }

    fn start_on<C: Collective + 'static>(config: EngineConfig, ranks: Vec<C>) -> Engine {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo/v1");
        let options = LoadOptions {
            dtype: Some(Dtype::F32),
            cache: CacheLayout {
                page_size: config.page_size,
                num_pages: config.num_pages,
            },
            device: Device::Cpu,
            tensor_parallel: TensorParallel {
                size: ranks.len(),
                timeout: Duration::from_millis(300),
            },
            progress: &|_| {},
        };
        let ranks = ranks
            .into_iter()
            .map(|rank| Arc::new(rank) as Arc<dyn Collective>);
        let model = Model::load_with(&dir, options, ranks.collect()).unwrap();
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
        assert!(tells_of_memory(
            "a tensor operation failed: DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"no\")"
        ));
        assert!(!tells_of_memory("invalid batch"));
        let rank = ModelError::Rank("rank 1 has no memory".into());
        assert!(matches!(failure(rank), RunnerError::Unavailable(reason) if reason.contains("rank 1")));
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

    #[test]
    fn a_constrained_model_writes_what_its_schema_wants_alone_and_in_company() {
        let schema = r#"{"type":"object","properties":{"city":{"type":"string","maxLength":20},
            "people":{"type":"integer","minimum":0,"maximum":99999999},"capital":{"type":"boolean"}},
            "required":["city","people","capital"],"additionalProperties":false}"#;
        let (compiler, tokenizer) = demo_grammars();
        let grammar = compiler.compile(&Grammar::JsonSchema(schema.into())).unwrap();
        let constrained = |end| Sequence {
            max_tokens: 100,
            grammar: Some(grammar.matcher()),
            ..greedy(&prompt(end))
        };
        let engine = start(EngineConfig::default());
        let mut streams: Vec<_> = (0..6)
            .map(|end| match end % 2 {
                0 => engine.submit(constrained(end)).unwrap(),
                _ => engine.submit(greedy(&prompt(end))).unwrap(),
            })
            .collect();
        let together: Vec<Heard> = streams.iter_mut().map(Heard::all).collect();
        for (end, together) in (0..).zip(&together) {
            let engine = start(EngineConfig::default());
            let alone = match end % 2 {
                0 => Heard::all(&mut engine.submit(constrained(end)).unwrap()),
                _ => Heard::all(&mut engine.submit(greedy(&prompt(end))).unwrap()),
            };
            assert_eq!(alone.tokens, together.tokens);
            if end % 2 == 0 {
                let text = tokenizer.decode(&alone.tokens, true).unwrap();
                let value: serde_json::Value = serde_json::from_str(&text).unwrap();
                assert!(
                    value["people"].is_u64() && value["capital"].is_boolean(),
                    "{text}"
                );
                assert!(engine.stats().forced_tokens > 0);
                assert!(alone.logprobs.iter().all(|logprob| logprob.unwrap().is_finite()));
            }
        }
    }

    #[test]
    fn a_prompt_is_told_with_the_log_probabilities_that_its_tokens_had_as_a_reply() {
        let engine = start(EngineConfig::default());
        let begun = Heard::all(&mut engine.submit(greedy(&prompt(0))).unwrap());
        let whole = [prompt(0), begun.tokens.clone()].concat();
        let scoring = Sequence {
            prompt_logprobs: Some(0),
            max_tokens: 1,
            ..greedy(&whole)
        };
        let told = Heard::all(&mut engine.submit(scoring).unwrap()).prompt;
        assert_eq!(told.iter().map(|token| token.0).collect::<Vec<_>>(), whole);
        let reply = told[prompt(0).len()..].iter().zip(&begun.logprobs);
        for (told, had) in reply {
            assert!((told.1.unwrap() - had.unwrap()).abs() < 1e-3, "{told:?} {had:?}");
        }
    }

    /// A compiler of grammars for the demo model's vocabulary, which is byte-level BPE.
    fn demo_grammars() -> (GrammarCompiler, tokenizers::Tokenizer) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo/v1/tokenizer.json");
        let tokenizer = tokenizers::Tokenizer::from_file(path).unwrap();
        let special: Vec<u32> = tokenizer.get_added_tokens_decoder().into_keys().collect();
        let decode = |id| tokenizer.decode(&[id], false).unwrap();
        let tokens = (0..tokenizer.get_vocab_size(true) as u32).map(decode);
        // Parts of characters are left out: they decode to U+FFFD.
        let bytes = tokens.map(|text| match text.contains('\u{FFFD}') {
            true => Vec::new(),
            false => text.into_bytes(),
        });
        let vocabulary = Vocabulary::new(bytes.collect(), &special, &special).unwrap();
        (GrammarCompiler::new(vocabulary, Default::default()), tokenizer)
    }

    /// A rank that does not come while it is told so.
    #[derive(Debug)]
    struct Lazy {
        inner: LocalCollective,
        stuck: Arc<AtomicBool>,
    }

    impl Collective for Lazy {
        fn rank(&self) -> usize {
            self.inner.rank()
        }

        fn size(&self) -> usize {
            self.inner.size()
        }

        fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
            while self.rank() == 1 && self.stuck.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            self.inner.all_reduce(values)
        }

        fn abort(&self, reason: &str) {
            self.inner.abort(reason);
        }

        fn reset(&self) {
            self.inner.reset();
        }
    }

    #[test]
    fn a_stuck_rank_ends_its_requests_and_the_engine_serves_again_when_it_is_back() {
        let alone = start(EngineConfig::default());
        let expected = Heard::all(&mut alone.submit(greedy(&prompt(0))).unwrap()).tokens;
        let stuck = Arc::new(AtomicBool::new(false));
        let ranks = LocalCollective::group(2, Duration::from_millis(300))
            .into_iter()
            .map(|inner| Lazy {
                inner,
                stuck: stuck.clone(),
            });
        let engine = start_on(EngineConfig::default(), ranks.collect());
        assert_eq!(
            Heard::all(&mut engine.submit(greedy(&prompt(0))).unwrap()).tokens,
            expected
        );
        let until = |wanted: bool| {
            let begun = Instant::now();
            while engine.stats().progress_stalled != wanted {
                assert!(begun.elapsed() < Duration::from_secs(20));
                thread::sleep(Duration::from_millis(2));
            }
        };
        stuck.store(true, Ordering::SeqCst);
        let mut waiting: Vec<_> = (0..3)
            .map(|end| engine.submit(greedy(&prompt(end))).unwrap())
            .collect();
        for stream in &mut waiting {
            let closing = Heard::all(stream).closing;
            let Some(crate::Event::Failed(crate::SequenceError::Unavailable(reason))) = closing else {
                panic!("{closing:?}")
            };
            assert!(reason.contains('1'), "{reason}");
        }
        until(true);
        assert!(engine.stats().unavailable.unwrap().contains("rank 1"));
        stuck.store(false, Ordering::SeqCst);
        until(false);
        assert_eq!(
            Heard::all(&mut engine.submit(greedy(&prompt(0))).unwrap()).tokens,
            expected
        );
    }
}
