//! When a request that nobody has begun to answer is sent to a second worker as well (Dean and Barroso, "The Tail at
//! Scale", CACM 2013). Whoever begins first is heard, and the other one is told to stop: nothing of its reply was seen,
//! so it does not matter how either one draws its tokens.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use penstock_analysis::Sketch;

/// Requests over which a percentile is taken.
const REQUESTS: u64 = 200;
/// Revisions whose times are remembered at most.
const REVISIONS: usize = 256;

/// How long a worker may take to begin a reply before a second one is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HedgeAfter {
    /// So long.
    Time(Duration),
    /// As long as 95 % of the revision's last requests took; nothing is hedged before there were 200.
    P95,
}

/// Knows how long the revisions' workers take to begin.
#[derive(Debug, Default)]
pub(crate) struct Hedge {
    after: Option<HedgeAfter>,
    /// By revision.
    times: Mutex<HashMap<u64, Times>>,
}

#[derive(Debug, Default)]
struct Times {
    seconds: Sketch,
    /// Of the requests before these.
    p95: Option<Duration>,
}

// === impl Hedge ===

impl Hedge {
    /// Without `after`, nothing is hedged.
    pub(crate) fn new(after: Option<HedgeAfter>) -> Self {
        Self {
            after,
            times: Mutex::default(),
        }
    }

    /// When to ask a second worker, where one is to be asked at all.
    pub(crate) fn delay(&self, revision: u64) -> Option<Duration> {
        match self.after? {
            HedgeAfter::Time(time) => Some(time),
            HedgeAfter::P95 => {
                let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
                times.get(&revision)?.p95
            }
        }
    }

    /// A worker took so long to begin, or took longer and was not waited for.
    pub(crate) fn took(&self, revision: u64, time: Duration) {
        if self.after != Some(HedgeAfter::P95) {
            return;
        }
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        if times.len() >= REVISIONS && !times.contains_key(&revision) {
            times.clear();
        }
        let times = times.entry(revision).or_default();
        times.seconds.add(time.as_secs_f64());
        if times.seconds.count() >= REQUESTS {
            let seconds = std::mem::take(&mut times.seconds).quantile(0.95);
            times.p95 = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_that_of_the_last_requests_of_the_same_revision() {
        let hedge = Hedge::new(Some(HedgeAfter::P95));
        let take =
            |from: u64| (from..from + REQUESTS).for_each(|ms| hedge.took(1, Duration::from_millis(ms)));
        (1..REQUESTS).for_each(|ms| hedge.took(1, Duration::from_millis(ms)));
        assert_eq!(hedge.delay(1), None, "too few");
        hedge.took(1, Duration::from_millis(REQUESTS));
        let near = |delay: Option<Duration>, ms: f64| {
            let delay = delay.unwrap().as_secs_f64() * 1e3;
            assert!((delay / ms - 1.0).abs() < 0.05, "{delay} ms");
        };
        near(hedge.delay(1), 190.0);
        assert_eq!(hedge.delay(2), None, "another revision");
        take(1000);
        near(hedge.delay(1), 1190.0);
    }

    #[test]
    fn a_time_is_a_time_and_nothing_is_hedged_unasked() {
        let time = Duration::from_millis(30);
        assert_eq!(Hedge::new(Some(HedgeAfter::Time(time))).delay(1), Some(time));
        let none = Hedge::new(None);
        (0..2 * REQUESTS).for_each(|_| none.took(1, time));
        assert_eq!(none.delay(1), None);
    }
}
