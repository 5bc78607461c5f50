//! How many tokens in flight a worker takes, learnt from its queue.

/// Tokens in flight before anything is known: a few requests.
const FIRST: f64 = 8_192.0;
/// No worker takes less: one long prompt must always be possible.
const LEAST: f64 = 2_048.0;
/// Part of the way to the measured limit that one report goes.
const STEP: f64 = 0.05;
/// Growth in a round after somebody has waited; twice as much in each round after it, up to the other.
const GROWTH: f64 = 0.01;
const MOST_GROWTH: f64 = 0.5;
/// Share of the limit that must be in use for it to grow.
const IN_USE: f64 = 0.8;
/// Part of its life that a request may wait at a worker: without any wait, it would idle between two.
const SPARE: f64 = 1.0 / 32.0;

/// What a worker says of the time that a request had there.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Life {
    /// Waiting, in seconds.
    pub queue_s: f64,
    /// One step, in seconds: who arrives in the middle of one waits for its end.
    pub step_s: f64,
    /// All of it, in seconds.
    pub total_s: f64,
}

/// The limit of one worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    tokens: f64,
    most: f64,
    /// Nobody has waited yet.
    starting: bool,
    /// Rounds in which nobody waited.
    calm: f64,
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
            calm: 0.0,
        }
    }

    /// Tokens in flight that the worker takes.
    pub fn tokens(&self) -> u64 {
        // Positive and far below 2^53.
        self.tokens as u64
    }

    /// A request of `tokens` got its first token while `in_flight` were there from this gateway. At first that lets the
    /// next one in: a worker with a queue brings no first tokens, and the limit grows no faster than it works.
    pub fn began(&mut self, in_flight: u64, tokens: u64) {
        if self.starting && in_flight as f64 >= IN_USE * self.tokens {
            self.tokens = (self.tokens + tokens as f64).min(self.most);
        }
    }

    /// A request of `tokens` ended. When it began, `in_flight` were there from this gateway, its own included.
    ///
    /// By Little's law the share of its life that it waited is the share of those tokens that had no room.
    pub fn reported(&mut self, life: Life, in_flight: u64, tokens: u64) {
        let waited = (life.queue_s - life.step_s).max(0.0) / life.total_s.max(1e-9);
        let in_flight = in_flight as f64;
        if waited > SPARE {
            self.starting = false;
            let fits = in_flight * (1.0 - waited.min(1.0) + SPARE);
            if fits < self.tokens {
                self.tokens += STEP * (fits - self.tokens);
            }
            self.calm = 0.0;
        } else if !self.starting && in_flight >= IN_USE * self.tokens {
            // One round is as many tokens as the limit. The longer nobody waits, the bolder.
            self.calm += tokens as f64 / self.tokens;
            let growth = (GROWTH * self.calm.exp2()).min(MOST_GROWTH);
            self.tokens += growth * tokens as f64;
        }
        self.tokens = self.tokens.clamp(LEAST, self.most);
    }

    /// The worker refused a request because its queue was full.
    pub fn refused(&mut self, in_flight: u64) {
        self.starting = false;
        self.tokens = self.tokens.min(0.9 * in_flight as f64).max(LEAST);
    }
}
