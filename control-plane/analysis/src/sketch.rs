//! A mergeable quantile sketch with relative error.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Ratio of neighbouring bins' bounds: 2 % apart, so that a bin's middle is off by 1 % at most.
const GAMMA: f64 = 1.02;
/// Values below this count as zero: a microsecond of time, a millionth of a share.
const SMALLEST: f64 = 1e-6;
/// Bins beyond this on either side are put into the last one: 1.02^2048 is above 10¹⁷.
const LARGEST_BIN: i32 = 2_048;
/// Values above this count as this.
const LARGEST: f64 = 1e17;

/// DDSketch (Masson, Rim, Lee, VLDB 2019): bin i holds the values in (γ^(i−1), γ^i]. Kept here rather than in a
/// crate because totals are told apart by subtraction ([`Sketch::since`]) and bins go over the wire as they are, and
/// the kept crates merge only and hide their bins.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sketch {
    bins: BTreeMap<i32, u64>,
    zeros: u64,
    sum: f64,
}

/// A sketch as it goes over the wire: bins as two lists of one length.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bins {
    /// Index of each bin.
    pub index: Vec<i32>,
    /// Values in it.
    pub count: Vec<u64>,
    /// Values too small for a bin.
    pub zeros: u64,
    /// Sum of all values.
    pub sum: f64,
}

// === impl Sketch ===

impl Sketch {
    /// Takes in a value; what is negative or no number counts as zero.
    pub fn add(&mut self, value: f64) {
        if value.is_nan() || value < SMALLEST {
            self.zeros = self.zeros.saturating_add(1);
            return;
        }
        let value = value.min(LARGEST);
        let own = self.bins.entry(bin_of(value)).or_default();
        *own = own.saturating_add(1);
        self.sum += value;
    }

    /// Takes in another sketch's values.
    pub fn merge(&mut self, other: &Self) {
        for (bin, count) in &other.bins {
            let own = self.bins.entry(*bin).or_default();
            *own = own.saturating_add(*count);
        }
        self.zeros = self.zeros.saturating_add(other.zeros);
        self.sum += other.sum;
    }

    /// What came since `earlier`, a former state of this sketch; bins that shrank count as empty.
    pub fn since(&self, earlier: &Self) -> Self {
        let grown = |(bin, count): (&i32, &u64)| {
            let new = count.saturating_sub(earlier.bins.get(bin).copied().unwrap_or_default());
            (new > 0).then_some((*bin, new))
        };
        Self {
            bins: self.bins.iter().filter_map(grown).collect(),
            zeros: self.zeros.saturating_sub(earlier.zeros),
            sum: (self.sum - earlier.sum).max(0.0),
        }
    }

    /// Values taken in.
    pub fn count(&self) -> u64 {
        self.bins
            .values()
            .fold(self.zeros, |sum, count| sum.saturating_add(*count))
    }

    /// Whether nothing was taken in.
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Their mean; `None` without values.
    pub fn mean(&self) -> Option<f64> {
        let count = self.count();
        (count > 0).then(|| self.sum / count as f64)
    }

    /// The value at quantile `q` in [0, 1], within 1 %; `None` without values.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        // Rank of the value, from 1.
        let rank = ((q.clamp(0.0, 1.0) * count as f64).ceil() as u64).max(1);
        let mut seen = self.zeros;
        if rank <= seen {
            return Some(0.0);
        }
        let found = self.bins.iter().find(|(_, count)| {
            seen = seen.saturating_add(**count);
            rank <= seen
        });
        // The bin's middle in relative terms.
        found.map(|(bin, _)| GAMMA.powi(*bin) * 2.0 / (1.0 + GAMMA))
    }

    /// Values above `limit`, those of its own bin left out.
    pub fn count_above(&self, limit: f64) -> u64 {
        if limit.is_nan() {
            return 0;
        }
        if limit < SMALLEST {
            return self.count() - self.zeros;
        }
        let above = self.bins.range(bin_of(limit) + 1..);
        above.fold(0, |sum: u64, (_, count)| sum.saturating_add(*count))
    }
}

fn bin_of(value: f64) -> i32 {
    ((value.ln() / GAMMA.ln()).ceil() as i32).clamp(-LARGEST_BIN, LARGEST_BIN)
}

impl From<&Sketch> for Bins {
    fn from(sketch: &Sketch) -> Self {
        let (index, count) = sketch.bins.iter().map(|(bin, count)| (*bin, *count)).unzip();
        Self {
            index,
            count,
            zeros: sketch.zeros,
            sum: sketch.sum,
        }
    }
}

/// Bins beyond what a sketch holds, or named twice, are put together; a list without its partner is cut off.
impl From<Bins> for Sketch {
    fn from(wire: Bins) -> Self {
        let mut sketch = Self {
            zeros: wire.zeros,
            sum: if wire.sum.is_finite() {
                wire.sum.max(0.0)
            } else {
                0.0
            },
            ..Self::default()
        };
        for (bin, count) in wire.index.into_iter().zip(wire.count) {
            let own = sketch
                .bins
                .entry(bin.clamp(-LARGEST_BIN, LARGEST_BIN))
                .or_default();
            *own = own.saturating_add(count);
        }
        sketch
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn of(values: &[f64]) -> Sketch {
        let mut sketch = Sketch::default();
        values.iter().for_each(|value| sketch.add(*value));
        sketch
    }

    proptest! {
        #[test]
        fn quantiles_are_within_their_error(mut values in vec(1e-5f64..1e6, 1..200), q in 0.0f64..=1.0) {
            let sketch = of(&values);
            values.sort_by(f64::total_cmp);
            let rank = ((q * values.len() as f64).ceil() as usize).max(1);
            let (found, real) = (sketch.quantile(q).unwrap(), values[rank - 1]);
            prop_assert!((found / real - 1.0).abs() < 0.0100001, "{found} {real}");
        }

        #[test]
        fn merging_is_the_same_as_adding_all(a in vec(0.0f64..1e3, 0..50), b in vec(0.0f64..1e3, 0..50)) {
            let mut merged = of(&a);
            merged.merge(&of(&b));
            let all = of(&[a.clone(), b].concat());
            prop_assert_eq!(&merged.bins, &all.bins);
            prop_assert_eq!((merged.count(), merged.zeros), (all.count(), all.zeros));
            prop_assert_eq!(merged.since(&of(&a)).count(), merged.count() - a.len() as u64);
        }

        #[test]
        fn a_sketch_survives_the_wire(values in vec(0.0f64..1e9, 0..50)) {
            let sketch = of(&values);
            prop_assert_eq!(Sketch::from(Bins::from(&sketch)), sketch);
        }

        #[test]
        fn no_value_makes_it_panic(values in vec(any::<f64>(), 0..50), limit in any::<f64>(), q in any::<f64>()) {
            let sketch = of(&values);
            prop_assert_eq!(sketch.count(), values.len() as u64);
            prop_assert!(sketch.count_above(limit) <= sketch.count());
            let _ = sketch.quantile(q);
        }
    }

    #[test]
    fn values_without_a_size_and_counts_without_room_make_it_panic_nowhere() {
        let mut sketch = of(&[
            f64::INFINITY,
            f64::INFINITY,
            f64::MAX,
            f64::NAN,
            f64::NEG_INFINITY,
            -1.0,
        ]);
        assert_eq!((sketch.count(), sketch.zeros), (6, 3));
        assert_eq!(sketch.mean(), Some(LARGEST / 2.0));
        assert!((sketch.quantile(1.0).unwrap() / LARGEST - 1.0).abs() < 0.01);
        assert_eq!(sketch.since(&sketch.clone()).mean(), None);

        let full = Sketch::from(Bins {
            index: vec![i32::MIN, 0, 1, 1, i32::MAX],
            count: vec![u64::MAX; 5],
            zeros: u64::MAX,
            sum: f64::NAN,
        });
        sketch.merge(&full);
        sketch.add(1.0);
        sketch.add(0.0);
        assert_eq!((sketch.count(), sketch.count_above(0.5)), (u64::MAX, u64::MAX));
    }

    #[test]
    fn a_sketch_that_started_over_is_never_negative() {
        let (before, after) = (of(&[10.0, 20.0, 30.0]), of(&[1.0]));
        let since = after.since(&before);
        assert_eq!(since.count(), 1);
        assert!(since.mean().unwrap() >= 0.0);
    }

    #[test]
    fn counts_above_a_limit_leave_out_what_is_at_it() {
        let sketch = of(&[0.0, 1.0, 2.0, 2.0, 4.0, 9.0]);
        assert_eq!(sketch.count_above(2.0), 2);
        assert_eq!(sketch.count_above(0.0), 5);
        assert_eq!(sketch.mean(), Some(3.0));
    }
}
