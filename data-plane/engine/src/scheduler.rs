//! What runs in the next step: continuous batching with chunked prefill (Sarathi, arXiv 2308.16369), ordered by
//! longest cached prefix with ageing.
//!
//! Who owns which KV of a sequence: tokens `[0, committed)` lie in pages of the tree that its guard protects,
//! `[committed, computed)` in pages of its own, the rest is not computed yet. At most one token, the one sampled
//! last, is not computed while it decodes.

use std::{collections::VecDeque, time::Instant};

use penstock_kv::RadixCache;
use penstock_model::Batch;

use crate::{
    EngineConfig, EngineStats, Event, FinishReason, Finished, SampleRequest, SampledToken, SequenceError,
    Token, runner::RunnerError,
};

mod sequence;

pub(crate) use sequence::Running;

/// Tokens of a reply that admission sets KV aside for; longer ones may be retracted.
const RESERVED_TOKENS: usize = 256;
/// What one pass over a waiting sequence is worth, in cached tokens: nothing waits for ever.
const AGEING_TOKENS: usize = 64;
/// With more waiting sequences than this, looking all of them up costs more than it saves: first come, first
/// served.
const LONGEST_PREFIX_LIMIT: usize = 128;

/// Waiting and running sequences over one page pool.
pub(crate) struct Scheduler {
    cache: RadixCache,
    waiting: VecDeque<Box<Running>>,
    running: Vec<Box<Running>>,
    /// Indices into `running` of the batch's sequences, in its order.
    scheduled: Vec<usize>,
    max_running: usize,
    max_batch_tokens: usize,
    /// Sequences that left the queue for good or to run, less those that came back, since it was last asked.
    departures: isize,
    steps: u64,
    tokens: u64,
    retractions: u64,
}

// === impl Scheduler ===

impl Scheduler {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        Self {
            cache: RadixCache::new(config.num_pages, config.page_size),
            waiting: VecDeque::new(),
            running: Vec::new(),
            scheduled: Vec::new(),
            max_running: config.max_running,
            max_batch_tokens: config.max_batch_tokens,
            departures: 0,
            steps: 0,
            tokens: 0,
            retractions: 0,
        }
    }

    pub(crate) fn enqueue(&mut self, sequence: Box<Running>) {
        self.waiting.push_back(sequence);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that left the queue since the last call, less those that were put back into it.
    pub(crate) fn take_departures(&mut self) -> isize {
        std::mem::take(&mut self.departures)
    }

    pub(crate) fn fill(&self, stats: &mut EngineStats) {
        let cache = self.cache.stats();
        stats.running = self.running.len();
        stats.total_pages = cache.total_pages;
        stats.free_pages = cache.free_pages;
        stats.cached_pages = cache.evictable_pages;
        stats.steps = self.steps;
        stats.tokens_generated = self.tokens;
        stats.prefix_lookup_tokens = cache.lookup_tokens;
        stats.prefix_hit_tokens = cache.hit_tokens;
        stats.retractions = self.retractions;
    }

    /// Ends sequences whose consumer is gone or whose deadline has passed.
    pub(crate) fn sweep(&mut self, now: Instant) {
        for index in (0..self.running.len()).rev() {
            let sequence = &self.running[index];
            if sequence.is_abandoned() {
                self.remove(index);
            } else if sequence.is_late(now) {
                let completion_tokens = sequence.generated();
                let mut ended = self.remove(index);
                ended.sink.send(Event::Failed(SequenceError::DeadlineExceeded {
                    completion_tokens,
                }));
            }
        }
        let before = self.waiting.len();
        self.waiting.retain_mut(|sequence| {
            if sequence.is_late(now) && !sequence.is_abandoned() {
                let completion_tokens = sequence.generated();
                sequence.sink.send(Event::Failed(SequenceError::DeadlineExceeded {
                    completion_tokens,
                }));
                return false;
            }
            !sequence.is_abandoned()
        });
        self.departures += (before - self.waiting.len()).cast_signed();
    }

    /// Fills `batch` with the next step; returns how many sequences were admitted.
    pub(crate) fn schedule(&mut self, now: Instant, batch: &mut Batch) -> usize {
        batch.clear();
        self.scheduled.clear();
        self.make_room_for_decode();
        let mut budget = self.max_batch_tokens;
        // Decode first: a long prompt never holds up replies that are under way.
        for index in 0..self.running.len() {
            if budget > 0 && self.running[index].is_decoding() && self.running[index].sink.flush() {
                budget -= self.push(index, 1, batch);
            }
        }
        for index in 0..self.running.len() {
            if budget > 0 && !self.running[index].is_decoding() {
                budget -= self.push(index, budget, batch);
            }
        }
        let mut admitted = 0_usize;
        while budget > 0 && self.running.len() < self.max_running {
            let Some(chosen) = self.choose() else { break };
            let Some(sequence) = self.waiting.remove(chosen) else {
                break;
            };
            if let Err(sequence) = self.admit(sequence, now) {
                self.waiting.insert(chosen, sequence);
                break;
            }
            admitted += 1;
            budget -= self.push(self.running.len() - 1, budget, batch);
        }
        if !self.waiting.is_empty() {
            self.waiting.iter_mut().for_each(|sequence| sequence.passes += 1);
        }
        self.departures += admitted.cast_signed();
        admitted
    }

    /// How to sample the rows of the batch.
    pub(crate) fn samples(&self) -> Vec<SampleRequest<'_>> {
        let wanted = self
            .scheduled
            .iter()
            .map(|&index| &self.running[index])
            .filter(|s| s.samples_next());
        wanted.map(|sequence| sequence.sample_request()).collect()
    }

    /// The step is done: tokens go out, KV into the tree, what is complete leaves.
    pub(crate) fn advance(&mut self, now: Instant, sampled: &mut Vec<Result<SampledToken, RunnerError>>) {
        self.steps += 1;
        let mut tokens = sampled.drain(..);
        let mut ended = Vec::new();
        for &index in &self.scheduled {
            let sequence = &mut self.running[index];
            let samples = sequence.samples_next();
            let was_prefill = !sequence.is_decoding();
            sequence.computed += std::mem::take(&mut sequence.in_step);
            if was_prefill {
                commit(&mut self.cache, sequence);
            }
            if !samples {
                continue;
            }
            match tokens.next() {
                Some(Ok(token)) => {
                    self.tokens += 1;
                    if accept(sequence, token, now) {
                        ended.push(index);
                    }
                }
                Some(Err(error)) => {
                    sequence
                        .sink
                        .send(Event::Failed(SequenceError::Runner(error.to_string())));
                    sequence.poisoned = true;
                    ended.push(index);
                }
                None => {}
            }
        }
        drop(tokens);
        ended.sort_unstable();
        for index in ended.into_iter().rev() {
            self.remove(index);
        }
    }

    /// The step failed: so do its sequences. What they computed before is sound and stays cached.
    pub(crate) fn fail_step(&mut self, reason: &str) {
        let mut failed = std::mem::take(&mut self.scheduled);
        failed.sort_unstable();
        for index in failed.into_iter().rev() {
            let mut sequence = self.remove(index);
            sequence
                .sink
                .send(Event::Failed(SequenceError::Runner(reason.to_owned())));
        }
    }

    /// Ends everything.
    pub(crate) fn fail_all(&mut self) {
        while !self.running.is_empty() {
            let mut sequence = self.remove(self.running.len() - 1);
            sequence.sink.send(Event::Failed(SequenceError::ShuttingDown));
        }
        self.departures += self.waiting.len().cast_signed();
        for mut sequence in self.waiting.drain(..) {
            sequence.sink.send(Event::Failed(SequenceError::ShuttingDown));
        }
    }

    /// Adds up to `limit` tokens of a running sequence to the batch, as far as pages can be had.
    fn push(&mut self, index: usize, limit: usize, batch: &mut Batch) -> usize {
        let page_size = self.cache.page_size();
        let sequence = &mut self.running[index];
        let count = limit.min(sequence.tokens.len() - sequence.computed);
        let pages = (sequence.computed + count).div_ceil(page_size);
        let missing = pages.saturating_sub(sequence.pages.len());
        if missing > 0 && !self.cache.allocate_into(missing, &mut sequence.pages) {
            return 0;
        }
        sequence.in_step = count;
        let tokens = &sequence.tokens[sequence.computed..sequence.computed + count];
        batch.push(
            tokens,
            sequence.computed,
            &sequence.pages[..pages],
            sequence.samples_next(),
        );
        self.scheduled.push(index);
        count
    }

    /// Retracts the sequences admitted last until every other one can write its next token.
    fn make_room_for_decode(&mut self) {
        loop {
            let page_size = self.cache.page_size();
            let needs_page = |s: &&Box<Running>| s.is_decoding() && s.computed == s.pages.len() * page_size;
            let needed = self.running.iter().filter(needs_page).count();
            if needed <= self.cache.available() || self.running.len() <= 1 {
                return;
            }
            let last = self.running.len() - 1;
            let mut sequence = self.remove(last);
            sequence.passes = 0;
            self.retractions += 1;
            // It goes on first: its reply is under way.
            self.waiting.push_front(sequence);
            self.departures -= 1;
        }
    }

    /// The waiting sequence to admit next: the most cached tokens and the longest wait. One whose prefix is just
    /// being computed by another is left until it can share it.
    fn choose(&mut self) -> Option<usize> {
        if self.waiting.len() > LONGEST_PREFIX_LIMIT {
            return Some(0);
        }
        let cache = &self.cache;
        let in_flight: Vec<u64> = self
            .running
            .iter()
            .filter_map(|s| s.filling(cache.page_size()))
            .collect();
        let score = |sequence: &Running| {
            let cached = cache.peek_prefix(sequence.namespace, &sequence.tokens);
            let shared = sequence.page_key(cached / cache.page_size(), cache.page_size());
            if shared.is_some_and(|key| in_flight.contains(&key)) {
                return None;
            }
            Some(cached + sequence.passes * AGEING_TOKENS)
        };
        let scored = self
            .waiting
            .iter()
            .enumerate()
            .filter_map(|(index, s)| score(s).map(|score| (index, score)));
        // The first of equals has waited longest.
        scored
            .reduce(|best, next| if next.1 > best.1 { next } else { best })
            .map(|(index, _)| index)
    }

    /// Starts a sequence if its KV is likely to fit; gives it back otherwise.
    fn admit(&mut self, mut sequence: Box<Running>, now: Instant) -> Result<(), Box<Running>> {
        let page_size = self.cache.page_size();
        let found = self.cache.match_prefix(sequence.namespace, &sequence.tokens);
        let extend = sequence.tokens.len() - found.tokens;
        let own = (extend + sequence.remaining().min(RESERVED_TOKENS)).div_ceil(page_size) + 1;
        let promised: usize = self
            .running
            .iter()
            .map(|running| running.reserved_pages(page_size, RESERVED_TOKENS))
            .sum();
        // Checked after locking: what was just protected can no longer be evicted.
        if !self.running.is_empty() && own + promised > self.cache.available() {
            self.cache.release(found.guard);
            return Err(sequence);
        }
        if !sequence.started {
            sequence.started = true;
            sequence.sink.send(Event::Started {
                at: now,
                cached_tokens: found.tokens,
            });
        }
        sequence.computed = found.tokens;
        sequence.committed = found.tokens;
        sequence.pages = found.pages;
        sequence.guard = Some(found.guard);
        self.running.push(sequence);
        Ok(())
    }

    /// Takes a sequence out: its KV goes into the tree, pages that hold no whole page's worth are free.
    fn remove(&mut self, index: usize) -> Box<Running> {
        let mut sequence = self.running.remove(index);
        sequence.in_step = 0;
        if !sequence.poisoned {
            commit(&mut self.cache, &mut sequence);
        }
        let shared = sequence.committed / self.cache.page_size();
        self.cache.free(&sequence.pages[shared..]);
        sequence.pages.clear();
        if let Some(guard) = sequence.guard.take() {
            self.cache.release(guard);
        }
        sequence.computed = 0;
        sequence.committed = 0;
        sequence
    }
}

/// Puts the whole pages that a sequence has computed into the tree; duplicates are freed and its page table
/// points to the tree's pages from then on.
fn commit(cache: &mut RadixCache, sequence: &mut Running) {
    let page_size = cache.page_size();
    // What an abandoned sequence generated may lie past a stop that the consumer saw: it is not kept.
    let sound = if sequence.is_abandoned() {
        sequence.computed.min(sequence.prompt_len)
    } else {
        sequence.computed
    };
    let whole = sound / page_size * page_size;
    if whole <= sequence.committed {
        return;
    }
    if let Some(guard) = sequence.guard.take() {
        let pages = &mut sequence.pages[..whole / page_size];
        sequence.guard = Some(cache.insert(guard, &sequence.tokens[..whole], pages));
        sequence.committed = whole;
    }
}

/// Appends a sampled token and sends it; true if the reply is complete.
fn accept(sequence: &mut Running, sampled: SampledToken, now: Instant) -> bool {
    let id = sampled.id;
    sequence.tokens.push(id);
    if let Some(history) = &mut sequence.history {
        history.generated(id);
    }
    sequence.sink.send(Event::Token(Token {
        id,
        at: now,
        logprob: sampled.logprob,
        top: sampled.top,
    }));
    let reason = if sequence.stop_token_ids.contains(&id) {
        FinishReason::StopToken(id)
    } else if sequence.remaining() == 0 {
        FinishReason::Length
    } else {
        return false;
    };
    let completion_tokens = sequence.generated();
    sequence.sink.send(Event::Finished(Finished {
        reason,
        completion_tokens,
    }));
    true
}

#[cfg(test)]
mod tests;
