//! One sequence as the scheduler keeps it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use penstock_kv::PrefixGuard;

use crate::{
    Constraint, Event, SampleRequest, SampledToken, SamplingParams, Sequence, SequenceError, TokenHistory,
    stream::EventSink,
};

/// Tokens of one prompt whose log-probabilities one step tells: each takes a row of logits, 600 kB for the vocabularies
/// of 2025.
const SCORED_PER_STEP: usize = 64;

/// A place in the queue, given back when dropped: whatever becomes of a sequence, the count stays right.
#[derive(Debug)]
pub(crate) struct QueuePlace(Arc<AtomicUsize>);

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
    pub(super) priority: i32,
    pub(super) tenant: u64,
    /// How many came before it.
    pub(super) arrival: u64,
    /// Times that a later one was admitted before it.
    pub(super) passes: usize,
    pub(super) started: bool,
    /// While it waits.
    pub(super) place: Option<QueuePlace>,
    pub(super) history: Option<TokenHistory>,
    pub(super) grammar: Option<Constraint>,
    /// While the prompt's log-probabilities are told: how many of its tokens are.
    pub(super) scored: Option<usize>,
    sampling: SamplingParams,
    max_tokens: usize,
    top_logprobs: Option<usize>,
    deadline: Option<Instant>,
}

// === impl QueuePlace ===

impl QueuePlace {
    /// Takes a place among those that `count` counts.
    pub(crate) fn take(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count.clone())
    }

    /// Places taken, this one included.
    pub(crate) fn taken(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

// === impl Running ===

impl Running {
    /// A sequence that waits. Its prompt is shorter than `context_length`.
    pub(crate) fn new(sequence: Sequence, sink: EventSink, place: QueuePlace, context_length: usize) -> Self {
        let prompt_len = sequence.prompt.len() - sequence.resumed;
        let history = sequence.sampling.has_penalties().then(|| {
            let (prompt, reply) = sequence.prompt.split_at(prompt_len);
            let mut history = TokenHistory::of_prompt(prompt);
            reply.iter().for_each(|&id| history.generated(id));
            history
        });
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
            priority: sequence.priority,
            tenant: sequence.tenant,
            arrival: 0,
            passes: 0,
            started: false,
            place: Some(place),
            history,
            grammar: sequence.grammar.map(Constraint::new),
            scored: sequence
                .prompt_logprobs
                .filter(|&told| sequence.resumed == 0 && told < prompt_len),
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

    /// Only the token sampled last is not computed. (A sequence that was retracted computes its reply again, one
    /// whose grammar forced tokens computes these; both count as prefill until then.)
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
            follows: None,
            stop_token_ids: &self.stop_token_ids,
            grammar: self.grammar.as_ref(),
        }
    }

    /// A token that the grammar leaves no choice about: what its row of logits would have come to.
    pub(super) fn forced_token(&self, id: u32) -> SampledToken {
        let alternatives = self.top_logprobs.unwrap_or(0).min(1);
        SampledToken {
            id,
            logprob: self.top_logprobs.map(|_| 0.0),
            top: vec![(id, 0.0); alternatives],
        }
    }

    /// How to treat the rows of the step under way: what follows in the prompt is scored, then a token is sampled.
    pub(super) fn sample_requests(&self) -> impl Iterator<Item = SampleRequest<'_>> {
        let rows = match (self.scored, self.samples_next()) {
            (Some(_), _) => self.in_step,
            (None, samples) => usize::from(samples),
        };
        let end = self.computed + self.in_step;
        (end - rows..end).map(|position| SampleRequest {
            follows: self.tokens.get(position + 1).copied(),
            ..self.sample_request()
        })
    }

    /// The tokens whose KV may come from the cache: those in front of the first one whose logits are wanted. (The tree
    /// itself leaves out the last.)
    pub(super) fn matchable(&self) -> &[u32] {
        &self.tokens[..self.scored.unwrap_or(self.tokens.len()).max(1)]
    }

    /// Tokens that the next step may compute.
    pub(super) fn step_limit(&self) -> usize {
        let left = self.tokens.len() - self.computed;
        match self.scored {
            // The scores of a chunk and the first token are two events, neither of which may be held back.
            Some(_) if self.sink.room() < 2 => 0,
            Some(_) => left.min(SCORED_PER_STEP),
            None => left,
        }
    }

    /// Whether a stop token may have ended the reply with its last token.
    pub(super) fn may_be_stopped(&self) -> bool {
        self.generated() > self.sampling.min_tokens
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.sink.is_closed()
    }

    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Ends the stream of a sequence whose deadline has passed.
    pub(super) fn close_late(&mut self) {
        let completion_tokens = self.generated();
        let error = SequenceError::DeadlineExceeded { completion_tokens };
        self.sink.close(Event::Failed(error));
    }

    /// Pages that it will still want, its reply counted up to `cap` tokens.
    pub(super) fn reserved_pages(&self, page_size: usize, cap: usize) -> usize {
        let end = self.tokens.len() + self.remaining().min(cap);
        end.div_ceil(page_size).saturating_sub(self.pages.len())
    }

    /// Whether this one is computing the very page that `other`, of whose tokens `cached` are in the tree, lacks
    /// next.
    pub(super) fn is_filling_for(&self, other: &Self, cached: usize, page_size: usize) -> bool {
        let end = cached + page_size;
        let same_page = !self.is_decoding() && self.committed == cached && self.namespace == other.namespace;
        same_page && self.tokens.len() >= end && self.tokens.get(..end) == other.tokens.get(..end)
    }
}
