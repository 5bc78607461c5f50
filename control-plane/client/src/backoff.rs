//! How long to wait before the next attempt.

use std::time::Duration;

use rand::RngExt as _;

/// Exponential backoff with full jitter: each delay is drawn evenly between nothing and a ceiling that doubles
/// up to a cap, so that many nodes that lost the same control plane do not come back in step (Brooker,
/// "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
#[derive(Debug)]
pub(crate) struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) const fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap,
            failures: 0,
        }
    }

    /// The next delay.
    pub(crate) fn next(&mut self, rng: &mut impl rand::Rng) -> Duration {
        let ceiling = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        rng.random_range(Duration::ZERO..=ceiling)
    }

    /// Starts over, after an attempt that went well.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    fn ceiling(&self) -> Duration {
        let factor = 2u32.saturating_pow(self.failures);
        self.base.saturating_mul(factor).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    const BASE: Duration = Duration::from_millis(100);
    const CAP: Duration = Duration::from_secs(5);

    #[test]
    fn the_ceiling_doubles_up_to_the_cap_and_no_delay_exceeds_it() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..200 {
            let mut backoff = Backoff::new(BASE, CAP);
            for ceiling_ms in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
                assert_eq!(backoff.ceiling(), Duration::from_millis(ceiling_ms));
                assert!(backoff.next(&mut rng) <= Duration::from_millis(ceiling_ms));
            }
        }
    }

    #[test]
    fn delays_are_spread_over_the_whole_range() {
        let mut rng = StdRng::seed_from_u64(2);
        let delays: Vec<Duration> = (0..1000)
            .map(|_| Backoff::new(BASE, CAP).next(&mut rng))
            .collect();
        let quarters = delays.iter().fold([0; 4], |mut quarters, delay| {
            quarters[((delay.as_micros() / 25_000) as usize).min(3)] += 1;
            quarters
        });
        // 250 each, plus or minus six standard deviations.
        assert!(
            quarters.iter().all(|count| (168..=332).contains(count)),
            "{quarters:?}"
        );
    }

    #[test]
    fn a_success_starts_over_and_a_thousand_failures_stay_at_the_cap() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut backoff = Backoff::new(BASE, CAP);
        for _ in 0..1000 {
            backoff.next(&mut rng);
        }
        assert_eq!(backoff.ceiling(), CAP);
        backoff.reset();
        assert_eq!(backoff.ceiling(), BASE);
    }
}
