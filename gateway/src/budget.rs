//! How many requests may be sent a second time. Without a bound, retries would be the load that keeps a fleet down.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Retries that each request earns.
const PER_REQUEST: f64 = 0.25;
/// Retries that each second earns, for gateways with little traffic.
const PER_SECOND: f64 = 10.0;
/// Retries saved at most: the streams of one worker that is lost while all of them wait for their first token.
const MOST: f64 = 256.0;

/// A purse of retries, as in Finagle and linkerd.
#[derive(Debug)]
pub(crate) struct RetryBudget(Mutex<Purse>);

#[derive(Debug)]
struct Purse {
    retries: f64,
    at: Instant,
}

// === impl RetryBudget ===

impl RetryBudget {
    /// A request was sent.
    pub(crate) fn earn(&self) {
        self.purse().add(PER_REQUEST);
    }

    /// Takes one retry, if there is one.
    pub(crate) fn spend(&self) -> bool {
        self.purse().spend(Instant::now())
    }

    /// Takes one for what is not needed, only desirable: half of the purse stays for workers that are lost.
    pub(crate) fn spend_spare(&self) -> bool {
        let mut purse = self.purse();
        purse.refill(Instant::now());
        purse.retries > MOST / 2.0 && purse.take()
    }

    fn purse(&self) -> std::sync::MutexGuard<'_, Purse> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self(Mutex::new(Purse {
            retries: MOST,
            at: Instant::now(),
        }))
    }
}

// === impl Purse ===

impl Purse {
    fn add(&mut self, retries: f64) {
        self.retries = (self.retries + retries).min(MOST);
    }

    fn spend(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.take()
    }

    fn refill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.add(since * PER_SECOND);
    }

    fn take(&mut self) -> bool {
        let has = self.retries >= 1.0;
        if has {
            self.retries -= 1.0;
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn retries_are_a_quarter_of_the_requests_when_the_purse_is_empty() {
        let now = Instant::now();
        let mut purse = Purse {
            retries: MOST,
            at: now,
        };
        let saved = (0..1000).filter(|_| purse.spend(now)).count();
        assert_eq!(saved, 256);
        (0..40).for_each(|_| purse.add(PER_REQUEST));
        assert_eq!((0..1000).filter(|_| purse.spend(now)).count(), 10);
        let later = now + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| purse.spend(later)).count(), 10);
    }
    #[test]
    fn what_is_not_needed_leaves_half_of_the_purse() {
        let budget = RetryBudget::default();
        let spent = (0..1000).filter(|_| budget.spend_spare()).count();
        // A few were earned in the meantime, ten a second.
        assert!((128..140).contains(&spent), "{spent}");
        assert!((0..120).all(|_| budget.spend()));
    }
}
