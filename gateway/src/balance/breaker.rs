//! When a worker that fails is left alone, and when it is tried again.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// A worker that was ejected is left alone for so long; twice as long each time again.
const FIRST: Duration = Duration::from_secs(2);
/// It is never left alone for longer.
const LONGEST: Duration = Duration::from_secs(60);
/// Requests whose outcomes are looked at, and how old they may be.
const WINDOW: usize = 32;
const AGE: Duration = Duration::from_secs(10);
/// A worker that fails this share of them, and so many, is an outlier.
const SHARE: f64 = 0.5;
const FAILURES: usize = 5;
/// Requests that succeed in a row until earlier ejections are forgotten.
const HEALED: u32 = 32;

/// The outcomes of one worker's requests, and what follows.
#[derive(Debug, Clone)]
pub struct Breaker {
    outcomes: VecDeque<(Instant, bool)>,
    open_until: Option<Instant>,
    /// A request is on its way that decides whether the worker is back.
    probing_since: Option<Instant>,
    /// Ejections that are not forgotten.
    ejections: u32,
    successes: u32,
}

// === impl Breaker ===

impl Breaker {
    /// Nothing is known.
    pub fn new() -> Self {
        Self {
            outcomes: VecDeque::new(),
            open_until: None,
            probing_since: None,
            ejections: 0,
            successes: 0,
        }
    }

    /// Whether requests should go elsewhere.
    pub fn is_open(&self, now: Instant) -> bool {
        let ejected = self.open_until.is_some_and(|until| now < until);
        // A probe that nobody has heard of for long was a request that takes long.
        let probed = self
            .probing_since
            .is_some_and(|since| now.saturating_duration_since(since) < FIRST);
        ejected || probed
    }

    /// A request goes to the worker. The first one after an ejection finds out for the others.
    pub fn sent(&mut self, now: Instant) {
        if self.open_until.is_some() {
            self.probing_since = Some(now);
        }
    }

    /// A request ended well, or began to.
    pub fn succeeded(&mut self, now: Instant) {
        self.note(now, true);
        self.open_until = None;
        self.probing_since = None;
        self.successes += 1;
        if self.successes >= HEALED {
            self.ejections = 0;
        }
    }

    /// A request failed by the worker's fault; too many of them eject it.
    pub fn failed(&mut self, now: Instant) {
        self.note(now, false);
        let failures = self.outcomes.iter().filter(|(_, good)| !good).count();
        let outlier = failures >= FAILURES && failures as f64 >= SHARE * self.outcomes.len() as f64;
        if outlier || self.probing_since.is_some() {
            self.eject(now);
        }
    }

    /// The worker cannot be reached, or says that it takes nothing: it is left alone at once.
    pub fn eject(&mut self, now: Instant) {
        if self.open_until.is_some_and(|until| now < until) && self.probing_since.is_none() {
            // The others of one failure.
            return;
        }
        let pause = FIRST.saturating_mul(1 << self.ejections.min(5)).min(LONGEST);
        self.open_until = Some(now + pause);
        self.probing_since = None;
        self.ejections += 1;
        self.successes = 0;
        self.outcomes.clear();
    }

    fn note(&mut self, now: Instant, good: bool) {
        if !good {
            self.successes = 0;
        }
        self.outcomes.push_back((now, good));
        while self.outcomes.len() > WINDOW
            || self
                .outcomes
                .front()
                .is_some_and(|(at, _)| now.saturating_duration_since(*at) > AGE)
        {
            self.outcomes.pop_front();
        }
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self::new()
    }
}
