//! What runs in the next step: continuous batching with chunked prefill (Sarathi, arXiv 2308.16369), ordered by
//! longest cached prefix with ageing.
//!
//! Who owns which KV of a sequence: tokens `[0, committed)` lie in pages of the tree that its guard protects,
//! `[committed, computed)` in pages of its own, the rest is not computed yet. At most one token, the one sampled
//! last, is not computed while it decodes.

use std::{
    sync::{Arc, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use penstock_kv::RadixCache;
use penstock_model::Batch;

use crate::{
    EngineConfig, EngineStats, Event, SampleRequest, SampledToken, SequenceError, constraint::MasksAhead,
    runner::RunnerError,
};

mod reply;
mod sequence;
mod waiting;

pub(crate) use sequence::{QueuePlace, Running};
use waiting::{Place, Waiting};

/// Tokens of a reply that admission sets KV aside for; longer ones may be retracted.
const RESERVED_TOKENS: usize = 256;
/// With more waiting sequences than `LOOKED_AT_EACH_STEP`, those whose caller is gone or too late are looked for so
/// often only, beside the moment that they are chosen: a step costs no more the more requests wait.
const SWEEP_EVERY: Duration = Duration::from_millis(100);
const LOOKED_AT_EACH_STEP: usize = 512;

/// Waiting and running sequences over one page pool.
pub(crate) struct Scheduler {
    cache: RadixCache,
    waiting: Waiting,
    /// When those that wait were looked at.
    swept: Option<Instant>,
    /// How many sequences wait, here and on their way here.
    places: Arc<AtomicUsize>,
    running: Vec<Running>,
    /// Indices into `running` of the batch's sequences, in its order.
    scheduled: Vec<usize>,
    max_running: usize,
    max_batch_tokens: usize,
    /// In the last step a sequence went without the pages or the place that it wanted.
    starved: bool,
    masks: MasksAhead,
    counters: Counters,
}

/// What a scheduler has done.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counters {
    steps: u64,
    tokens: u64,
    forced_tokens: u64,
    lookup_tokens: u64,
    hit_tokens: u64,
    retractions: u64,
    faults: u64,
}

// === impl Scheduler ===

impl Scheduler {
    pub(crate) fn new(config: &EngineConfig, places: Arc<AtomicUsize>) -> Self {
        Self {
            cache: RadixCache::new(config.num_pages, config.page_size),
            waiting: Waiting::default(),
            swept: None,
            places,
            running: Vec::new(),
            scheduled: Vec::new(),
            // Every running sequence gets at least one token a step, or the last ones would stand still.
            max_running: config.max_running.min(config.max_batch_tokens),
            max_batch_tokens: config.max_batch_tokens,
            starved: false,
            masks: MasksAhead::start(&config.name),
            counters: Counters::default(),
        }
    }

    /// A scheduler without sequences and KV in the place of one whose bookkeeping is broken; what that one held
    /// fails.
    pub(crate) fn replacing(broken: &mut Self, config: &EngineConfig) -> Self {
        let mut fresh = Self::new(config, broken.places.clone());
        fresh.counters = broken.counters;
        fresh.counters.faults += 1;
        for mut lost in broken.running.drain(..).chain(broken.waiting.drain()) {
            lost.sink.close(Event::Failed(SequenceError::Internal));
        }
        fresh
    }

    /// Whether every page is accounted for; asked when nothing runs.
    pub(crate) fn is_sound(&self) -> bool {
        let cache = self.cache.stats();
        cache.protected_pages == 0 && cache.free_pages + cache.evictable_pages == cache.total_pages
    }

    pub(crate) fn enqueue(&mut self, sequence: Running) {
        self.waiting.arrived(sequence);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub(crate) fn fill(&self, stats: &mut EngineStats) {
        let cache = self.cache.stats();
        stats.running = self.running.len();
        stats.total_pages = cache.total_pages;
        stats.free_pages = cache.free_pages;
        stats.cached_pages = cache.evictable_pages;
        stats.steps = self.counters.steps;
        stats.tokens_generated = self.counters.tokens;
        stats.forced_tokens = self.counters.forced_tokens;
        stats.prefix_lookup_tokens = self.counters.lookup_tokens;
        stats.prefix_hit_tokens = self.counters.hit_tokens;
        stats.retractions = self.counters.retractions;
        stats.faults = self.counters.faults;
    }

    /// Ends sequences whose consumer is gone or whose deadline has passed, and sends what the others held back.
    pub(crate) fn sweep(&mut self, now: Instant) {
        for index in (0..self.running.len()).rev() {
            let sequence = &mut self.running[index];
            sequence.sink.flush();
            if sequence.is_abandoned() {
                // What was generated may lie past a stop that the consumer saw: it is not kept.
                let prompt_len = sequence.prompt_len;
                self.end(index, prompt_len);
            } else if sequence.is_late(now) {
                let mut ended = self.end(index, usize::MAX);
                ended.close_late();
            }
        }
        let rests = |last: Instant| now.saturating_duration_since(last) < SWEEP_EVERY;
        if self.waiting.len() > LOOKED_AT_EACH_STEP && self.swept.is_some_and(rests) {
            return;
        }
        self.swept = Some(now);
        self.waiting.retain_mut(|sequence| {
            sequence.sink.flush();
            let late = sequence.is_late(now);
            if late {
                sequence.close_late();
            }
            !late && !sequence.is_abandoned()
        });
    }

    /// Fills `batch` with the next step; returns how many sequences were admitted.
    pub(crate) fn schedule(&mut self, now: Instant, batch: &mut Batch) -> usize {
        batch.clear();
        self.make_room_for_the_starved();
        self.make_room_for_decode();
        self.scheduled.clear();
        let mut budget = self.max_batch_tokens;
        // Decode first: a long prompt never holds up replies that are under way.
        for index in 0..self.running.len() {
            if budget > 0 && self.running[index].is_decoding() && !self.running[index].sink.is_blocked() {
                budget -= self.push(index, 1, batch);
            }
        }
        // So are forced tokens, and what a retracted reply computes again, before new prompts.
        for is_reply in [true, false] {
            for index in 0..self.running.len() {
                let sequence = &self.running[index];
                let runs = !sequence.is_decoding() && !sequence.sink.is_blocked();
                if budget > 0 && runs && is_reply == (sequence.generated() > 0) {
                    self.catch_up(index);
                    budget -= self.push(index, budget, batch);
                }
            }
        }
        self.admit_waiting(now, budget, batch)
    }

    /// Admits sequences and pushes their first chunks while the budget lasts; returns how many.
    fn admit_waiting(&mut self, now: Instant, mut budget: usize, batch: &mut Batch) -> usize {
        let mut admitted = 0;
        while budget > 0 {
            let Some(chosen) = self.choose() else { break };
            if self.running.len() >= self.max_running {
                self.starved = true;
                break;
            }
            if !self.admit(chosen, now) {
                self.starved = true;
                break;
            }
            let last = self.running.len() - 1;
            self.waiting.passed(&self.running[last]);
            admitted += 1;
            budget -= self.push(last, budget, batch);
        }
        admitted
    }

    /// How to sample the rows of the batch.
    pub(crate) fn samples(&self) -> Vec<SampleRequest<'_>> {
        let sequences = self.scheduled.iter().map(|&index| &self.running[index]);
        sequences.flat_map(Running::sample_requests).collect()
    }

    /// The step is done: tokens go out, KV into the tree, what is complete leaves.
    pub(crate) fn advance(&mut self, now: Instant, sampled: &mut Vec<Result<SampledToken, RunnerError>>) {
        self.counters.steps += 1;
        let mut rows = sampled.drain(..);
        let mut ended = Vec::new();
        for &index in &self.scheduled {
            let sequence = &mut self.running[index];
            let samples = sequence.samples_next();
            let row = match reply::score(sequence, &mut rows, now) {
                Ok(()) => samples.then(|| rows.next()).flatten(),
                Err(error) => Some(Err(error)),
            };
            if let Some(Err(error)) = row {
                // What this step computed is not to be trusted: it stays out of the tree.
                ended.push((index, Event::Failed(error.into())));
                continue;
            }
            let was_prefill = !sequence.is_decoding();
            sequence.computed += std::mem::take(&mut sequence.in_step);
            if was_prefill {
                commit(&mut self.cache, sequence, usize::MAX);
            }
            if let Some(Ok(token)) = row {
                let before = sequence.generated();
                match reply::accept(sequence, token, now) {
                    Ok(Some(finished)) => ended.push((index, Event::Finished(finished))),
                    Ok(None) => sequence
                        .grammar
                        .iter()
                        .for_each(|grammar| self.masks.compute(grammar)),
                    Err(error) => ended.push((index, Event::Failed(error.into()))),
                }
                let tokens = (sequence.generated() - before) as u64;
                self.counters.tokens += tokens;
                self.waiting
                    .serve(sequence.tenant, 0, sequence.generated() - before);
                self.counters.forced_tokens += tokens.saturating_sub(1);
            }
        }
        drop(rows);
        ended.sort_unstable_by_key(|&(index, _)| index);
        for (index, closing) in ended.into_iter().rev() {
            // Pages are free by the time that the consumer knows.
            self.end(index, usize::MAX).sink.close(closing);
        }
    }

    /// The step failed: so do its sequences. What they computed before is sound and stays cached.
    pub(crate) fn fail_step(&mut self, error: &SequenceError) {
        let mut failed = std::mem::take(&mut self.scheduled);
        failed.sort_unstable();
        for index in failed.into_iter().rev() {
            self.end(index, usize::MAX)
                .sink
                .close(Event::Failed(error.clone()));
        }
    }

    /// Ends everything.
    pub(crate) fn fail_all(&mut self, error: &SequenceError) {
        while let Some(last) = self.running.len().checked_sub(1) {
            let mut sequence = self.end(last, usize::MAX);
            sequence.sink.close(Event::Failed(error.clone()));
        }
        for mut sequence in self.waiting.drain() {
            sequence.sink.close(Event::Failed(error.clone()));
        }
    }

    /// Adds up to `limit` tokens of a running sequence to the batch, as far as pages can be had.
    fn push(&mut self, index: usize, limit: usize, batch: &mut Batch) -> usize {
        let page_size = self.cache.page_size();
        let sequence = &mut self.running[index];
        let count = limit.min(sequence.step_limit());
        if count == 0 {
            return 0;
        }
        let pages = (sequence.computed + count).div_ceil(page_size);
        let missing = pages.saturating_sub(sequence.pages.len());
        if missing > 0 && !self.cache.allocate_into(missing, &mut sequence.pages) {
            self.starved = true;
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
        if sequence.scored.is_some() {
            batch.want_all_logits();
        }
        self.scheduled.push(index);
        count
    }

    /// Retracts the sequences admitted last until every other one can write its next token.
    fn make_room_for_decode(&mut self) {
        let page_size = self.cache.page_size();
        let needs_page = |s: &&Running| s.is_decoding() && s.computed == s.pages.len() * page_size;
        while self.running.len() > 1 {
            let needed = self.running.iter().filter(needs_page).count();
            if needed <= self.cache.available() {
                return;
            }
            self.retract(self.running.len() - 1);
        }
    }

    /// Where a sequence went without pages or a place, one that rests for its consumer gives up its own; if
    /// nothing could run at all, the one admitted last does.
    fn make_room_for_the_starved(&mut self) {
        if !std::mem::take(&mut self.starved) {
            return;
        }
        let resting = self.running.iter().rposition(|s| s.sink.is_blocked());
        // Not the only one: that would go round for ever.
        let last = self.running.len().checked_sub(1).filter(|&last| last > 0);
        if let Some(index) = resting.or(last.filter(|_| self.scheduled.is_empty())) {
            self.retract(index);
        }
    }

    /// Puts a running sequence back into the queue, before those that have not started.
    fn retract(&mut self, index: usize) {
        let mut sequence = self.remove(index, usize::MAX);
        sequence.passes = 0;
        sequence.place = Some(QueuePlace::take(&self.places));
        self.counters.retractions += 1;
        self.waiting.put_back(sequence);
    }

    /// Moves a sequence in prefill on to what others have put into the tree since its last chunk.
    fn catch_up(&mut self, index: usize) {
        let sequence = &mut self.running[index];
        if self.cache.peek_prefix(sequence.namespace, sequence.matchable()) <= sequence.computed {
            return;
        }
        let found = self.cache.match_prefix(sequence.namespace, sequence.matchable());
        let shared = sequence.committed / self.cache.page_size();
        self.cache.free(&sequence.pages[shared..]);
        if let Some(behind) = sequence.guard.replace(found.guard) {
            self.cache.release(behind);
        }
        sequence.pages = found.pages;
        sequence.computed = found.tokens;
        sequence.committed = found.tokens;
    }

    /// The waiting sequence to admit next. One whose prefix is just being computed by another is left until it can
    /// share it.
    fn choose(&self) -> Option<Place> {
        let page_size = self.cache.page_size();
        self.waiting.choose(|sequence| {
            let cached = self.cache.peek_prefix(sequence.namespace, sequence.matchable());
            let filling = |s: &Running| s.is_filling_for(sequence, cached, page_size);
            (!self.running.iter().any(filling)).then_some(cached)
        })
    }

    /// Starts a waiting sequence if its KV is likely to fit; leaves it where it is otherwise.
    fn admit(&mut self, chosen: Place, now: Instant) -> bool {
        let Some(mut sequence) = self.waiting.take(chosen) else {
            return false;
        };
        let cached = self.cache.peek_prefix(sequence.namespace, sequence.matchable());
        // A look before the match, which counts as a use: a sequence that does not fit is looked at every step.
        if !self.fits(&sequence, cached) {
            self.waiting.untake(chosen, sequence);
            return false;
        }
        let found = self.cache.match_prefix(sequence.namespace, sequence.matchable());
        // And one after it: what was just protected can no longer be evicted.
        if !self.fits(&sequence, found.tokens) {
            self.cache.release(found.guard);
            self.waiting.untake(chosen, sequence);
            return false;
        }
        sequence.place = None;
        if !sequence.started {
            sequence.started = true;
            sequence
                .grammar
                .iter()
                .for_each(|grammar| self.masks.compute(grammar));
            self.counters.lookup_tokens += sequence.prompt_len as u64;
            self.counters.hit_tokens += found.tokens as u64;
            self.waiting.serve(
                sequence.tenant,
                sequence.prompt_len - found.tokens.min(sequence.prompt_len),
                0,
            );
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
        true
    }

    /// Whether a sequence of which `cached` tokens are there is likely to find the pages that it needs. Alone, it
    /// always does.
    fn fits(&self, sequence: &Running, cached: usize) -> bool {
        let page_size = self.cache.page_size();
        let extend = sequence.tokens.len() - cached;
        let own = (extend + sequence.remaining().min(RESERVED_TOKENS)).div_ceil(page_size) + 1;
        let reserved = |running: &Running| running.reserved_pages(page_size, RESERVED_TOKENS);
        let promised: usize = self.running.iter().map(reserved).sum();
        self.running.is_empty() || own + promised <= self.cache.available()
    }

    /// Takes a sequence out for good.
    fn end(&mut self, index: usize, keep: usize) -> Running {
        let sequence = self.remove(index, keep);
        self.waiting.left(sequence.tenant);
        sequence
    }

    /// Takes a sequence out: the KV of its first `keep` tokens goes into the tree, as far as it is computed and
    /// fills whole pages; its other pages are free.
    fn remove(&mut self, index: usize, keep: usize) -> Running {
        let mut sequence = self.running.remove(index);
        commit(&mut self.cache, &mut sequence, keep);
        let shared = sequence.committed / self.cache.page_size();
        self.cache.free(&sequence.pages[shared..]);
        if let Some(guard) = sequence.guard.take() {
            self.cache.release(guard);
        }
        sequence.pages.clear();
        sequence.in_step = 0;
        sequence.computed = 0;
        sequence.committed = 0;
        sequence
    }
}

/// Puts the whole pages that a sequence has computed of its first `limit` tokens into the tree; duplicates are
/// freed and its page table points to the tree's pages from then on.
fn commit(cache: &mut RadixCache, sequence: &mut Running, limit: usize) {
    let page_size = cache.page_size();
    let whole = sequence.computed.min(limit) / page_size * page_size;
    if whole <= sequence.committed {
        return;
    }
    if let Some(guard) = sequence.guard.take() {
        let pages = &mut sequence.pages[..whole / page_size];
        sequence.guard = Some(cache.insert(guard, &sequence.tokens[..whole], pages));
        sequence.committed = whole;
    }
}

#[cfg(test)]
mod tests;
