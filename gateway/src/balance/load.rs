//! How busy a worker is, in tokens.

use std::time::{Duration, Instant};

/// Work that ended counts less and less: after this time, half. Without it, conversations whose users think would all
/// begin on one worker.
const HALF_LIFE: Duration = Duration::from_secs(10);
/// What a worker said of itself counts so long.
const REPORT_HOLDS: Duration = Duration::from_secs(5);

/// A worker's load, as one gateway knows it.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    requests: u64,
    tokens: u64,
    /// Work that ended lately, at `at`.
    recent: f64,
    at: Instant,
    /// Requests that other gateways sent there, as the worker's count and our own tell, and when.
    others: Option<(u64, Instant)>,
}

// === impl Load ===

impl Load {
    /// No load.
    pub fn new(now: Instant) -> Self {
        Self {
            requests: 0,
            tokens: 0,
            recent: 0.0,
            at: now,
            others: None,
        }
    }

    /// A request of so many tokens begins.
    pub fn begin(&mut self, tokens: u64) {
        self.requests += 1;
        self.tokens += tokens;
    }

    /// A request that began with so many tokens ends.
    pub fn end(&mut self, tokens: u64, now: Instant) {
        self.requests = self.requests.saturating_sub(1);
        self.tokens = self.tokens.saturating_sub(tokens);
        self.recent = self.decayed(now) + tokens as f64;
        self.at = now;
    }

    /// The worker says how many sequences it has, running and waiting.
    pub fn reported(&mut self, sequences: u64, now: Instant) {
        self.others = Some((sequences.saturating_sub(self.requests), now));
    }

    /// Requests in flight from here.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Tokens in flight from here.
    pub fn in_flight(&self) -> u64 {
        self.tokens
    }

    /// Load in tokens; one request of another gateway counts as `mean`.
    pub fn total(&self, mean: u64, now: Instant) -> u64 {
        let others = self
            .others
            .filter(|(_, at)| now.saturating_duration_since(*at) < REPORT_HOLDS)
            .map_or(0, |(others, _)| others);
        // Positive and far below 2^53.
        self.tokens + others * mean + self.decayed(now) as u64
    }

    fn decayed(&self, now: Instant) -> f64 {
        let halves = now.saturating_duration_since(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.recent * (-halves).exp2()
    }
}
