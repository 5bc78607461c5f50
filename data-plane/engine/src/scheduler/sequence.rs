//! One sequence as the scheduler keeps it.

use std::time::Instant;

use penstock_kv::PrefixGuard;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{SampleRequest, SamplingParams, Sequence, TokenHistory, stream::EventSink};

/// A sequence, waiting or running.
#[derive(Debug)]
pub(crate) struct Running {
    /// Prompt, then reply.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    /// Tokens whose KV is computed.
    pub(super) computed: usize,
    /// Tokens whose KV lies in the tree.
    pub(super) committed: usize,
    /// Tokens in the step under way.
    pub(super) in_step: usize,
    pub(super) pages: Vec<u32>,
    pub(super) guard: Option<PrefixGuard>,
    pub(super) sink: EventSink,
    pub(super) namespace: u64,
    pub(super) stop_token_ids: Vec<u32>,
    /// Times that it was passed over.
    pub(super) passes: usize,
    pub(super) started: bool,
    /// Its KV is not to be trusted.
    pub(super) poisoned: bool,
    pub(super) history: Option<TokenHistory>,
    sampling: SamplingParams,
    max_tokens: usize,
    top_logprobs: Option<usize>,
    deadline: Option<Instant>,
}

// === impl Running ===

impl Running {
    pub(crate) fn new(sequence: Sequence, sink: EventSink, context_length: usize) -> Self {
        let prompt_len = sequence.prompt.len();
        let history = sequence
            .sampling
            .has_penalties()
            .then(|| TokenHistory::of_prompt(&sequence.prompt));
        Self {
            prompt_len,
            computed: 0,
            committed: 0,
            in_step: 0,
            pages: Vec::new(),
            guard: None,
            sink,
            namespace: sequence.namespace,
            stop_token_ids: sequence.stop_token_ids,
            passes: 0,
            started: false,
            poisoned: false,
            history,
            sampling: sequence.sampling,
            max_tokens: sequence.max_tokens.clamp(1, context_length - prompt_len),
            top_logprobs: sequence.top_logprobs,
            deadline: sequence.deadline,
            tokens: sequence.prompt,
        }
    }

    /// Tokens of the reply so far.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens of the reply still to come, at most.
    pub(super) fn remaining(&self) -> usize {
        self.max_tokens - self.generated()
    }

    /// Only the token sampled last is not computed. (A sequence that was retracted computes its reply again,
    /// and counts as prefill until then.)
    pub(super) fn is_decoding(&self) -> bool {
        self.computed + 1 == self.tokens.len() && self.generated() > 0
    }

    /// Whether the step under way computes all that is there, so that a token is sampled.
    pub(super) fn samples_next(&self) -> bool {
        self.computed + self.in_step == self.tokens.len()
    }

    pub(super) fn sample_request(&self) -> SampleRequest<'_> {
        SampleRequest {
            params: &self.sampling,
            index: self.generated() as u64,
            history: self.history.as_ref(),
            top_logprobs: self.top_logprobs,
        }
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.sink.is_closed()
    }

    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Pages that it will still want, its reply counted up to `cap` tokens.
    pub(super) fn reserved_pages(&self, page_size: usize, cap: usize) -> usize {
        let end = self.tokens.len() + self.remaining().min(cap);
        end.div_ceil(page_size).saturating_sub(self.pages.len())
    }

    /// While its prompt is being computed: the key of the first page that is not in the tree yet.
    pub(super) fn filling(&self, page_size: usize) -> Option<u64> {
        match self.is_decoding() {
            true => None,
            false => self.page_key(self.committed / page_size, page_size),
        }
    }

    /// Identifies the prefix up to the end of page `index`, if that page is whole.
    pub(super) fn page_key(&self, index: usize, page_size: usize) -> Option<u64> {
        let prefix = self.tokens.get(..(index + 1) * page_size)?;
        let mut key = self.namespace;
        for id in prefix {
            key = xxh3_64_with_seed(&id.to_le_bytes(), key);
        }
        Some(key)
    }
}
