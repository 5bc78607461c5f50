//! Bad events of one key come in clusters: a user whose request fails asks again. One per key, metric and window is
//! counted.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

/// Keys remembered in one window at most. Beyond it bad events count even if their key had one: so many users with
/// bad events are no cluster.
const MOST: usize = 65_536;

/// Who had a bad event in the present window.
#[derive(Debug)]
pub(super) struct Recent {
    /// Zero counts every event.
    window: Duration,
    began: Instant,
    seen: HashSet<(u64, usize)>,
}

impl Recent {
    pub(super) fn new(window: Duration, now: Instant) -> Self {
        Self {
            window,
            began: now,
            seen: HashSet::new(),
        }
    }

    /// Whether the bad event counts: the first of this key for this metric in the window. An event without a key
    /// is a cluster of its own.
    pub(super) fn counts(&mut self, key: Option<u64>, metric: usize, now: Instant) -> bool {
        let Some(key) = key.filter(|_| !self.window.is_zero()) else {
            return true;
        };
        if now.saturating_duration_since(self.began) >= self.window {
            self.began = now;
            self.seen.clear();
        }
        if self.seen.len() >= MOST {
            return !self.seen.contains(&(key, metric));
        }
        self.seen.insert((key, metric))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_per_key_metric_and_window_counts() {
        let start = Instant::now();
        let mut recent = Recent::new(Duration::from_secs(60), start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(recent.counts(Some(7), 0, at(0)));
        assert!(!recent.counts(Some(7), 0, at(59)));
        assert!(recent.counts(Some(7), 1, at(59)), "another metric");
        assert!(recent.counts(Some(8), 0, at(59)), "another key");
        assert!(recent.counts(None, 0, at(59)) && recent.counts(None, 0, at(59)));
        assert!(recent.counts(Some(7), 0, at(60)), "another window");
        let mut every = Recent::new(Duration::ZERO, start);
        assert!(every.counts(Some(7), 0, at(0)) && every.counts(Some(7), 0, at(0)));
    }

    #[test]
    fn keys_are_bounded() {
        let start = Instant::now();
        let mut recent = Recent::new(Duration::from_secs(60), start);
        for key in 0..100_000 {
            assert!(recent.counts(Some(key), 0, start));
        }
        assert_eq!(recent.seen.len(), MOST);
        assert!(!recent.counts(Some(0), 0, start));
    }
}
