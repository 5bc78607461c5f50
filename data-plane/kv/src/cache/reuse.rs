//! What past reuse says about the next one.

use std::{
    collections::{HashMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use super::node::NodeId;

/// Weight of the newest interval in the running figures.
const WEIGHT: f64 = 1.0 / 32.0;
/// Intervals to have seen before they count as regular.
const ENOUGH: u32 = 16;
/// Regular: the standard deviation is below this share of the mean.
const REGULAR: f64 = 0.25;
/// How many standard deviations late a use may be.
const LATENESS: f64 = 3.0;

/// Evicted edges to remember at most.
const REMEMBERED: usize = 4096;

/// When evicted edges were used last: uses that come just too late for the cache count as uses too, or a cache
/// that finds nothing would never learn why.
#[derive(Debug, Default)]
pub(super) struct Evicted {
    /// By what names an edge below a node.
    last_uses: HashMap<u64, u64>,
    /// Oldest first; may name edges that have been recalled since.
    order: VecDeque<u64>,
}

/// Running mean and variance of the time between two uses of the same sequence.
#[derive(Debug, Default)]
pub(super) struct ReuseIntervals {
    seen: u32,
    mean: f64,
    variance: f64,
}

// === impl Evicted ===

impl Evicted {
    /// The edge below `parent` that starts with `first_page` is gone.
    pub(super) fn remember(&mut self, parent: NodeId, first_page: &[u32], last_use: u64) {
        let name = name(parent, first_page);
        if self.last_uses.insert(name, last_use).is_none() {
            self.order.push_back(name);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.last_uses.remove(&oldest);
        }
    }

    /// When that edge was used last; it is asked for again and is news no more.
    pub(super) fn recall(&mut self, parent: NodeId, first_page: &[u32]) -> Option<u64> {
        self.last_uses.remove(&name(parent, first_page))
    }
}

/// A collision, or a node that came to stand in an evicted one's place, costs one wrong interval.
fn name(parent: NodeId, first_page: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (parent, first_page).hash(&mut hasher);
    hasher.finish()
}

// === impl ReuseIntervals ===

impl ReuseIntervals {
    /// A sequence was used again after `interval`.
    pub(super) fn note(&mut self, interval: u64) {
        let weight = WEIGHT.max(1.0 / f64::from(self.seen + 1));
        self.seen = self.seen.saturating_add(1);
        // Exponentially weighted (West, 1979).
        let difference = interval as f64 - self.mean;
        self.mean += weight * difference;
        self.variance = (1.0 - weight) * (self.variance + weight * difference * difference);
    }

    /// If uses come back regularly: the age after which a sequence that has not come back will not.
    pub(super) fn overdue_after(&self) -> Option<f64> {
        let deviation = self.variance.sqrt();
        let regular = self.seen >= ENOUGH && deviation < REGULAR * self.mean;
        regular.then_some(self.mean + LATENESS * deviation + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_intervals_say_when_the_next_use_is_due() {
        let mut regular = ReuseIntervals::default();
        let mut irregular = ReuseIntervals::default();
        for step in 0..100u64 {
            regular.note(64 + step % 3);
            irregular.note(1 + step * step % 200);
            assert_eq!(regular.overdue_after().is_some(), step + 1 >= u64::from(ENOUGH));
        }
        let due = regular.overdue_after().unwrap();
        assert!((66.0..71.0).contains(&due), "{due}");
        assert_eq!(irregular.overdue_after(), None);
    }

    #[test]
    fn the_memory_of_evicted_edges_is_bounded() {
        let mut evicted = Evicted::default();
        for round in 0..3 {
            for edge in 0..2 * REMEMBERED as u32 {
                evicted.remember(NodeId::default(), &[edge], round);
                if edge % 2 == 0 {
                    assert_eq!(evicted.recall(NodeId::default(), &[edge]), Some(round));
                }
            }
        }
        assert!(evicted.last_uses.len() <= REMEMBERED && evicted.order.len() <= REMEMBERED);
        assert_eq!(evicted.recall(NodeId::default(), &[1]), None);
    }

    #[test]
    fn a_change_of_habit_is_noticed() {
        let mut intervals = ReuseIntervals::default();
        (0..100).for_each(|_| intervals.note(64));
        (0..8).for_each(|_| intervals.note(2));
        assert_eq!(intervals.overdue_after(), None);
        (0..400).for_each(|_| intervals.note(2));
        assert!(intervals.overdue_after().unwrap() < 4.0);
    }
}
