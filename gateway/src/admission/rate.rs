//! Requests and tokens of each tenant per minute.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Tenants remembered at most. One that has been idle for a minute has its full rates back, and may be forgotten.
const TENANTS: usize = 65_536;
const MINUTE: f64 = 60.0;

#[derive(Debug)]
pub(super) struct Tenants {
    requests: Option<u64>,
    tokens: Option<u64>,
    buckets: HashMap<u64, Buckets>,
}

#[derive(Debug, Clone, Copy)]
struct Buckets {
    requests: f64,
    tokens: f64,
    at: Instant,
}

/// A tenant has used up its rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{limit} {unit} per minute are used up: {retry_after:?} are left until there is room")]
pub(super) struct Exceeded {
    limit: u64,
    unit: &'static str,
    retry_after: Duration,
}

// === impl Tenants ===

impl Tenants {
    pub(super) fn new(requests: Option<u64>, tokens: Option<u64>) -> Self {
        Self {
            requests,
            tokens,
            buckets: HashMap::new(),
        }
    }

    /// Takes one request and its tokens, or neither.
    pub(super) fn charge(&mut self, tenant: u64, tokens: u64, now: Instant) -> Result<(), Exceeded> {
        if self.requests.is_none() && self.tokens.is_none() {
            return Ok(());
        }
        if self.buckets.len() >= TENANTS && !self.buckets.contains_key(&tenant) {
            self.forget(now);
        }
        let (requests, most_tokens) = (self.requests, self.tokens);
        let full = Buckets {
            requests: requests.map_or(0.0, |limit| limit as f64),
            tokens: most_tokens.map_or(0.0, |limit| limit as f64),
            at: now,
        };
        let buckets = self.buckets.entry(tenant).or_insert(full);
        let minutes = now.saturating_duration_since(buckets.at).as_secs_f64() / MINUTE;
        buckets.at = now;
        buckets.requests = (buckets.requests + minutes * full.requests).min(full.requests);
        buckets.tokens = (buckets.tokens + minutes * full.tokens).min(full.tokens);
        if let Some(limit) = requests {
            check(buckets.requests, 1.0, limit, "requests")?;
        }
        if let Some(limit) = most_tokens {
            // A request that is larger than the rate itself takes a whole minute.
            check(buckets.tokens, (tokens as f64).min(full.tokens), limit, "tokens")?;
        }
        buckets.requests -= 1.0;
        buckets.tokens -= tokens as f64;
        Ok(())
    }

    /// A request that was charged with `expected` tokens was `real`.
    pub(super) fn correct(&mut self, tenant: u64, expected: u64, real: u64) {
        if let (Some(_), Some(buckets)) = (self.tokens, self.buckets.get_mut(&tenant)) {
            buckets.tokens += expected as f64 - real as f64;
        }
    }

    fn forget(&mut self, now: Instant) {
        let minute = Duration::from_secs(60);
        self.buckets
            .retain(|_, buckets| now.saturating_duration_since(buckets.at) < minute);
        if self.buckets.len() >= TENANTS {
            // So many at once are no tenants: who makes up names must not fill the memory.
            self.buckets.clear();
        }
    }
}

fn check(has: f64, wants: f64, limit: u64, unit: &'static str) -> Result<(), Exceeded> {
    if has >= wants {
        return Ok(());
    }
    let seconds = (wants - has) / (limit as f64).max(1.0) * MINUTE;
    Err(Exceeded {
        limit,
        unit,
        retry_after: Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600)),
    })
}

// === impl Exceeded ===

impl Exceeded {
    /// When the request would be admitted.
    pub(super) fn retry_after(&self) -> Duration {
        self.retry_after
    }
}
