//! A runner with a memory: what it yields depends on every slot that the page tables point to, so a wrong page
//! table, a page freed too early or written twice changes tokens or fails the step.

use std::sync::LazyLock;

use penstock_grammar::{Grammar, GrammarCompiler, Matcher, TokenMask, Vocabulary};
use penstock_model::Batch;

use crate::{
    EngineConfig, Event, Runner, RunnerError, RunnerInfo, SampleRequest, SampledToken, Sequence, TokenStream,
};

/// Ids from here on are never generated.
pub(crate) const GENERATED_BELOW: u32 = 200;
/// A sequence whose last token is this one yields no numbers.
pub(crate) const POISON: u32 = 250;
pub(crate) const VOCAB_SIZE: usize = 256;
/// Ends a reply under a grammar.
pub(crate) const END: u32 = 128;

type Hook = Box<dyn FnMut(&Batch) -> Result<(), RunnerError> + Send>;

pub(crate) struct MemoryRunner {
    page_size: usize,
    context_length: usize,
    /// Per slot: the token, and the hash of all tokens up to it.
    slots: Vec<(u32, u64)>,
    hook: Hook,
}

// === impl MemoryRunner ===

impl MemoryRunner {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        Self::with_hook(config, |_| Ok(()))
    }

    /// `hook` is called before each step; it may fail, panic or block.
    pub(crate) fn with_hook(
        config: &EngineConfig,
        hook: impl FnMut(&Batch) -> Result<(), RunnerError> + Send + 'static,
    ) -> Self {
        Self {
            page_size: config.page_size,
            context_length: 10_000,
            slots: vec![(0, 0); config.page_size * config.num_pages],
            hook: Box::new(hook),
        }
    }

    fn slot(&self, pages: &[u32], position: usize) -> usize {
        pages[position / self.page_size] as usize * self.page_size + position % self.page_size
    }
}

impl Runner for MemoryRunner {
    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn context_length(&self) -> usize {
        self.context_length
    }

    fn describe(&self) -> RunnerInfo {
        RunnerInfo {
            name: "memory",
            device: "none".into(),
        }
    }

    fn step(
        &mut self,
        batch: &Batch,
        samples: &[SampleRequest<'_>],
        out: &mut Vec<Result<SampledToken, RunnerError>>,
    ) -> Result<(), RunnerError> {
        (self.hook)(batch)?;
        assert_eq!(samples.len(), batch.logit_rows());
        for sequence in &batch.sequences {
            let pages = batch.pages(sequence);
            let query = &batch.tokens[sequence.query_start..][..sequence.query_len];
            let first = sequence.context_len - sequence.query_len;
            for (&token, position) in query.iter().zip(first..) {
                let before = position.checked_sub(1);
                let seen = before.map_or(0, |before| self.slots[self.slot(pages, before)].1);
                let slot = self.slot(pages, position);
                self.slots[slot] = (token, chain(seen, token));
            }
        }
        for sequence in &batch.sequences {
            let pages = batch.pages(sequence);
            let mut seen = 0;
            for position in 0..sequence.context_len {
                let (token, hash) = self.slots[self.slot(pages, position)];
                seen = chain(seen, token);
                assert_eq!(seen, hash, "position {position} holds another sequence's KV");
            }
            let last = batch.tokens[sequence.query_start + sequence.query_len - 1];
            for row in sequence
                .logit_rows()
                .take(sequence.logit_rows().len().saturating_sub(1))
            {
                out.push(Ok(scored(&samples[out.len()], batch.positions[row])));
            }
            if sequence.logits && last == POISON {
                out.push(Err(RunnerError::NotNumbers { row: out.len() }));
            } else if sequence.logits && samples[out.len()].follows.is_some() {
                out.push(Ok(scored(&samples[out.len()], sequence.context_len as u32 - 1)));
            } else if sequence.logits {
                let request = &samples[out.len()];
                let id = match request.grammar {
                    None => Ok(next_token(seen)),
                    Some(grammar) => grammar.with_mask(|mask| constrained_token(mask, seen)),
                };
                out.push(id.map_err(RunnerError::Grammar).map(|id| SampledToken {
                    id,
                    logprob: request.top_logprobs.map(|_| -1.0),
                    top: Vec::new(),
                }));
            }
        }
        Ok(())
    }
}

fn chain(seen: u64, token: u32) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(&token.to_le_bytes(), seen)
}

fn next_token(seen: u64) -> u32 {
    (seen % u64::from(GENERATED_BELOW)) as u32
}

/// The reply to `prompt`, worked out without an engine.
pub(crate) fn reply(prompt: &[u32], length: usize) -> Vec<u32> {
    let mut seen = prompt.iter().fold(0, |seen, &token| chain(seen, token));
    let next = std::iter::repeat_with(|| {
        let token = next_token(seen);
        seen = chain(seen, token);
        token
    });
    next.take(length).collect()
}

/// What is told of a prompt's token, after the one at `position`: its log-probability is that position.
fn scored(request: &SampleRequest<'_>, position: u32) -> SampledToken {
    SampledToken {
        id: request.follows.unwrap(),
        logprob: Some(-(position as f32)),
        top: Vec::new(),
    }
}

fn constrained_token(mask: &TokenMask, seen: u64) -> u32 {
    let nth = seen % mask.count() as u64;
    mask.iter().nth(nth as usize).unwrap()
}

/// ASCII characters by their own numbers, and [`END`] to end a reply.
pub(crate) fn grammar(regex: &str) -> Matcher {
    static COMPILER: LazyLock<GrammarCompiler> = LazyLock::new(|| {
        let mut tokens: Vec<Vec<u8>> = (0..128).map(|byte| vec![byte]).collect();
        tokens.push(b"<end>".to_vec());
        let vocabulary = Vocabulary::new(tokens, &[END], &[END]).unwrap();
        GrammarCompiler::new(vocabulary, Default::default())
    });
    COMPILER.compile(&Grammar::Regex(regex.into())).unwrap().matcher()
}

/// The reply to `prompt` under a grammar, worked out without an engine, one mask after the other.
pub(crate) fn constrained_reply(prompt: &[u32], length: usize, mut grammar: Matcher) -> Vec<u32> {
    let mut seen = prompt.iter().fold(0, |seen, &token| chain(seen, token));
    let mut tokens = Vec::new();
    while tokens.len() < length && !grammar.is_stopped() {
        let token = constrained_token(grammar.mask().unwrap(), seen);
        grammar.commit(token).unwrap();
        seen = chain(seen, token);
        tokens.push(token);
    }
    tokens
}

pub(crate) fn sequence(prompt: &[u32], max_tokens: usize) -> Sequence {
    Sequence {
        prompt: prompt.to_vec(),
        max_tokens,
        ..Sequence::default()
    }
}

/// What a stream has yielded.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) started: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<Option<f32>>,
    /// Tokens of the prompt, with their log-probabilities.
    pub(crate) prompt: Vec<(u32, Option<f32>)>,
    /// The closing event.
    pub(crate) closing: Option<Event>,
}

// === impl Heard ===

impl Heard {
    /// Reads what is there now.
    pub(crate) fn read(&mut self, stream: &mut TokenStream) {
        while let Some(event) = stream.try_next() {
            self.note(event);
        }
    }

    /// Reads until the stream ends.
    pub(crate) fn all(stream: &mut TokenStream) -> Self {
        let mut heard = Self::default();
        while let Some(event) = stream.blocking_next() {
            heard.note(event);
        }
        heard
    }

    pub(crate) fn is_finished(&self) -> bool {
        matches!(self.closing, Some(Event::Finished(_)))
    }

    fn note(&mut self, event: Event) {
        assert!(self.closing.is_none(), "nothing comes after the closing event");
        match event {
            Event::Started { cached_tokens, .. } => {
                self.started += 1;
                self.cached_tokens = cached_tokens;
            }
            Event::Prompt(tokens) => {
                assert!(self.tokens.is_empty(), "the prompt comes before the reply");
                self.prompt
                    .extend(tokens.iter().map(|token| (token.id, token.logprob)));
            }
            Event::Token(token) => {
                self.tokens.push(token.id);
                self.logprobs.push(token.logprob);
            }
            closing => self.closing = Some(closing),
        }
    }
}
