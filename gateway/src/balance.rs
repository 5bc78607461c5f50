//! Which worker of a revision gets a request. Pure: loads and time are arguments, and chance is one number.
//!
//! ```text
//! Glance ─▶ Prefix ─▶ index: who has computed this prefix? ─ known ──▶ holder, unless it is too busy
//!                       ▲                                  └ unknown ▶ rendezvous of the anchor, bounded by load
//!          own decisions, cached counts of the trailers
//! ```
//!
//! There is no tokenizer here. A conversation is known by hashes of the bytes of its messages, cut into growing
//! chunks. Gateways that never talk send a conversation to the same worker all the same, because the hash of its head
//! ranks the workers.

mod breaker;
mod glance;
mod index;
mod limit;
mod load;
mod prefix;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

pub use breaker::Breaker;
pub use glance::Glance;
use index::Index;
pub use limit::{Life, Limit};
pub use load::Load;
pub use prefix::{Prefix, hash};

/// A worker may carry so many times the mean load before a request that belongs to it goes elsewhere. The bound is
/// that of consistent hashing with bounded loads (arXiv 1608.01350).
const SPREAD: f64 = 1.5;
/// Load in tokens below which nobody counts as busy.
const SLACK: u64 = 2048;
/// Weight of the newest request in moving means.
const NEWEST: f64 = 0.02;

/// How a worker is chosen among those that serve the revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Policy {
    /// Who has computed the longest part of the prompt, sessions included, unless it is too busy
    #[default]
    Prefix,
    /// Requests of one `x-session-id` stay together; others go to the less busy of two
    Session,
    /// The less busy of two random workers
    TwoChoices,
    /// Any
    Random,
}

/// What a request wants of a worker.
#[derive(Debug, Clone, Default)]
pub struct Want {
    /// Hashes of its prompt.
    pub prefix: Prefix,
    /// Hash of the revision that it is for.
    pub namespace: u64,
    /// Hash of its session.
    pub session: Option<u64>,
    /// Bytes of its prompt.
    pub bytes: usize,
    /// Work that it is expected to be, prompt and reply, in tokens.
    pub tokens: u64,
}

/// A worker that could serve.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Hash of its name.
    pub id: u64,
    /// Work that it has, in tokens.
    pub load: u64,
}

/// What a worker says of a request that ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ended {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Part of them that it did not have to compute.
    pub cached_tokens: u32,
    /// Tokens of the reply.
    pub completion_tokens: u32,
}

/// Chooses, and learns from what comes of it.
#[derive(Debug)]
pub struct Balancer {
    policy: Policy,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    index: Index,
    bytes_per_token: f64,
    reply_tokens: f64,
}

// === impl Balancer ===

impl Balancer {
    /// A balancer whose index holds `nodes` chunks of prompts at most, about 100 bytes each.
    pub fn new(policy: Policy, nodes: usize) -> Self {
        Self {
            policy,
            state: Mutex::new(State {
                index: Index::new(nodes),
                bytes_per_token: 4.0,
                reply_tokens: 256.0,
            }),
        }
    }

    /// What a request wants: `namespace` keeps revisions apart, whose caches share nothing.
    pub fn want(&self, glance: &Glance<'_>, namespace: u64, session: Option<&[u8]>) -> Want {
        let input = glance.input();
        let prefix = match self.policy {
            Policy::Prefix => Prefix::of(input, glance.head(), namespace),
            _ => Prefix::default(),
        };
        let session = session.filter(|_| matches!(self.policy, Policy::Prefix | Policy::Session));
        let (bytes_per_token, reply_tokens) = {
            let state = self.state();
            (state.bytes_per_token, state.reply_tokens)
        };
        let most = f64::from(glance.max_tokens().unwrap_or(u32::MAX));
        let tokens = input.len() as f64 / bytes_per_token + reply_tokens.min(most);
        Want {
            prefix,
            namespace,
            session: session.map(|session| hash(namespace, session)),
            bytes: input.len(),
            // Both parts are bounded by the size of a request.
            tokens: tokens as u64,
        }
    }

    /// Index of the worker that gets the request; `draw` is a random number. `None` where there is no candidate.
    pub fn choose(&self, want: &Want, candidates: &[Candidate], draw: u64) -> Option<usize> {
        match (candidates.len(), self.policy) {
            (0, _) => None,
            (1, _) => Some(0),
            (count, Policy::Random) => Some((draw % count as u64) as usize),
            (_, Policy::TwoChoices) => Some(less_busy(candidates, draw)),
            (_, Policy::Prefix | Policy::Session) => Some(self.affine(want, candidates, draw)),
        }
    }

    /// The request goes to this worker.
    pub fn sent(&self, want: &Want, worker: u64) {
        let mut state = self.state();
        if let Some(session) = want.session {
            state.index.insert(&[(session, 0)], worker);
        }
        state.index.insert(want.prefix.nodes(), worker);
    }

    /// The worker ended the request. `expected` is what [`Balancer::expects`] said before it was sent.
    pub fn ended(&self, want: &Want, worker: u64, expected: Expected, ended: Ended) {
        let mut state = self.state();
        let prompt = f64::from(ended.prompt_tokens.max(1));
        if ended.prompt_tokens > 0 && want.bytes > 0 {
            let ratio = (want.bytes as f64 / prompt).clamp(0.25, 16.0);
            state.bytes_per_token += NEWEST * (ratio - state.bytes_per_token);
        }
        state.reply_tokens += NEWEST * (f64::from(ended.completion_tokens) - state.reply_tokens);
        let computed = u64::from(ended.prompt_tokens.saturating_sub(ended.cached_tokens));
        state
            .index
            .computed(worker, computed + u64::from(ended.completion_tokens));
        if expected.bytes > 0 {
            let cached = f64::from(ended.cached_tokens) / prompt * want.bytes as f64;
            // Caches keep whole pages, and templates add tokens: half of what was expected is a hit.
            state
                .index
                .judged(worker, expected.age, cached * 2.0 >= expected.bytes as f64);
        }
    }

    /// What the index says that the worker has of the prompt.
    pub fn expects(&self, want: &Want, worker: u64) -> Expected {
        self.state().index.expects(want.prefix.nodes(), worker)
    }

    /// Forgets workers that are gone.
    pub fn retain(&self, known: impl Fn(u64) -> bool) {
        self.state().index.retain(known);
    }

    fn affine(&self, want: &Want, candidates: &[Candidate], draw: u64) -> usize {
        let bound = Bound::of(want, candidates);
        let mut state = self.state();
        let at = |worker: u64| candidates.iter().position(|candidate| candidate.id == worker);
        if let Some(session) = want.session
            && let Some(held) = state.index.holders(session).into_iter().filter_map(at).next()
            && bound.holds(&candidates[held])
        {
            return held;
        }
        let known = state.index.longest(want.prefix.nodes(), want.prefix.head());
        let holders = known.into_iter().filter_map(at);
        if let Some(holder) = holders.min_by_key(|&holder| candidates[holder].load)
            && bound.holds(&candidates[holder])
        {
            return holder;
        }
        drop(state);
        match want.session.or(want.prefix.anchor()) {
            Some(anchor) => home(anchor, candidates, bound).unwrap_or_else(|| less_busy(candidates, draw)),
            None => less_busy(candidates, draw),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a worker was thought to have of a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expected {
    /// Bytes.
    pub bytes: usize,
    /// Tokens that the worker has computed since it last saw them.
    pub age: u64,
}

/// Load that a worker may have and still get the request.
#[derive(Debug, Clone, Copy)]
struct Bound(u64);

impl Bound {
    fn of(want: &Want, candidates: &[Candidate]) -> Self {
        let total: u64 = candidates.iter().map(|candidate| candidate.load).sum();
        let mean = (total + want.tokens) as f64 / candidates.len().max(1) as f64;
        // Positive and far below 2^53.
        let bound = (SPREAD * mean) as u64;
        Self(bound.max(SLACK).saturating_sub(want.tokens))
    }

    fn holds(self, candidate: &Candidate) -> bool {
        candidate.load <= self.0
    }
}

/// The worker that an anchor ranks first among those that are not too busy: highest random weight (Thaler and
/// Ravishankar, 1998).
fn home(anchor: u64, candidates: &[Candidate], bound: Bound) -> Option<usize> {
    let free = candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| bound.holds(candidate));
    free.max_by_key(|(_, candidate)| hash(anchor, &candidate.id.to_le_bytes()))
        .map(|(index, _)| index)
}

/// The less busy of two (Mitzenmacher, "The power of two choices", 2001).
fn less_busy(candidates: &[Candidate], draw: u64) -> usize {
    let count = candidates.len() as u64;
    let first = draw % count;
    // Another one than the first, each with the same chance.
    let second = match count {
        1 => first,
        _ => (first + 1 + (draw >> 32) % (count - 1)) % count,
    };
    let load = |index: &u64| candidates[*index as usize].load;
    std::cmp::min_by_key(first, second, load) as usize
}
