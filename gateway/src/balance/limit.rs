//! How many tokens in flight a worker takes, learnt from its queue.

/// Tokens in flight before anything is known: a few dozen requests.
const FIRST: f64 = 32_768.0;
/// No worker takes less: one long prompt must always be possible.
const LEAST: f64 = 2_048.0;
/// Part of the way to the measured limit that one report goes.
const STEP: f64 = 0.2;
/// Share of the limit that must be in use for it to grow.
const IN_USE: f64 = 0.8;
/// Sequences that may wait at a worker, as a share of those that run: without any, it would idle between two.
const SPARE: f64 = 1.0 / 16.0;

/// The limit of one worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    tokens: f64,
    most: f64,
    /// Nobody has waited yet.
    starting: bool,
}

// === impl Limit ===

impl Limit {
    /// Nothing is known but the most that may be.
    pub fn new(most: u64) -> Self {
        let most = (most as f64).max(LEAST);
        Self {
            tokens: FIRST.min(most),
            most,
            starting: true,
        }
    }

    /// Tokens in flight that the worker takes.
    pub fn tokens(&self) -> u64 {
        // Positive and far below 2^53.
        self.tokens as u64
    }

    /// A request of `tokens` ended while `in_flight` were there from this gateway, the request's own included. The
    /// worker says how many sequences run and wait.
    pub fn reported(&mut self, running: u32, waiting: u32, in_flight: u64, tokens: u64) {
        let (running, waiting) = (f64::from(running), f64::from(waiting));
        let spare = (running * SPARE).max(1.0);
        let in_flight = in_flight as f64;
        if waiting > spare {
            // The share of our tokens that it runs, and a few that wait.
            let fits = in_flight * (running + spare) / (running + waiting);
            self.starting = false;
            if fits < self.tokens {
                self.tokens += STEP * (fits - self.tokens);
            }
        } else if waiting == 0.0 && in_flight >= IN_USE * self.tokens {
            // At first twice as many in each round, then a tenth more.
            self.tokens += tokens as f64 * if self.starting { 1.0 } else { 0.1 };
        }
        self.tokens = self.tokens.clamp(LEAST, self.most);
    }

    /// The worker refused a request because its queue was full.
    pub fn refused(&mut self, in_flight: u64) {
        self.starting = false;
        self.tokens = self.tokens.min(0.9 * in_flight as f64).max(LEAST);
    }
}
