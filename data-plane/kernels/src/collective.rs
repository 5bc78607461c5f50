//! Sums over the ranks of a tensor-parallel model.
//!
//! Ranks are threads. On the CPU they sum through shared memory; a device's library (NCCL) implements the same trait.

use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

/// What one rank needs of the others. Every rank makes the same calls in the same order.
pub trait Collective: Send + Sync + fmt::Debug {
    /// Index of this rank, below [`size`](Self::size).
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Replaces `values` by their sum over all ranks. Every rank gets the same bits, whatever the order of arrival.
    ///
    /// # Errors
    /// A rank has not come in time, has failed, or brought another number of values. From then on every call of every
    /// rank fails, until [`reset`](Self::reset).
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Makes the calls of all ranks fail: this one cannot go on.
    fn abort(&self, reason: &str);

    /// Starts anew after a failure. No rank may be in a call.
    fn reset(&self);
}

/// Why ranks cannot go on together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// Some rank has not come.
    #[error("tensor-parallel rank {ranks:?} has not come to the sum for {} s", after.as_secs_f32())]
    Stuck {
        /// Those that have not.
        ranks: Vec<usize>,
        /// How long the others waited.
        after: Duration,
    },
    /// A rank failed.
    #[error("tensor-parallel rank {rank} failed: {reason}")]
    Aborted {
        /// Which.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// Ranks disagree about what is summed.
    #[error("tensor-parallel rank {rank} brought {found} values instead of {expected}")]
    Length {
        /// Which.
        rank: usize,
        /// Values that it brought.
        found: usize,
        /// Values that the rank that noticed has.
        expected: usize,
    },
}

/// Sums through the memory of one process: each rank lays its values down, waits for all, and adds them in the order
/// of the ranks.
#[derive(Debug)]
pub struct LocalCollective {
    group: Arc<Group>,
    rank: usize,
}

#[derive(Debug)]
struct Group {
    timeout: Duration,
    meeting: Mutex<Meeting>,
    changed: Condvar,
    /// Two sets, used in turn: nobody can be two sums ahead of another, so nothing is overwritten before it is read.
    laid_down: [Vec<RwLock<Vec<f32>>>; 2],
}

#[derive(Debug)]
struct Meeting {
    round: u64,
    arrived: Vec<bool>,
    failed: Option<CollectiveError>,
}

// === impl LocalCollective ===

impl LocalCollective {
    /// One for each of `size` ranks. A rank that has waited for `timeout` gives up.
    pub fn group(size: usize, timeout: Duration) -> Vec<Self> {
        let set = || (0..size).map(|_| RwLock::default()).collect();
        let group = Arc::new(Group {
            timeout,
            meeting: Mutex::new(Meeting {
                round: 0,
                arrived: vec![false; size],
                failed: None,
            }),
            changed: Condvar::new(),
            laid_down: [set(), set()],
        });
        let one = |rank| Self {
            group: group.clone(),
            rank,
        };
        (0..size).map(one).collect()
    }
}

impl Collective for LocalCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.laid_down[0].len()
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let round = self.group.meeting().going()?;
        let set = &self.group.laid_down[(round % 2) as usize];
        {
            let mut own = set[self.rank].write().unwrap_or_else(PoisonError::into_inner);
            own.clear();
            own.extend_from_slice(values);
        }
        self.group.meet(self.rank)?;
        for (rank, laid_down) in set.iter().enumerate() {
            let laid_down = laid_down.read().unwrap_or_else(PoisonError::into_inner);
            if laid_down.len() != values.len() {
                return Err(self.group.fail(CollectiveError::Length {
                    rank,
                    found: laid_down.len(),
                    expected: values.len(),
                }));
            }
            match rank {
                0 => values.copy_from_slice(&laid_down),
                _ => values
                    .iter_mut()
                    .zip(&*laid_down)
                    .for_each(|(sum, part)| *sum += part),
            }
        }
        Ok(())
    }

    fn abort(&self, reason: &str) {
        self.group.fail(CollectiveError::Aborted {
            rank: self.rank,
            reason: reason.to_owned(),
        });
    }

    fn reset(&self) {
        let mut meeting = self.group.meeting();
        meeting.failed = None;
        meeting.arrived.fill(false);
    }
}

// === impl Group ===

impl Group {
    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every rank is here.
    fn meet(&self, rank: usize) -> Result<(), CollectiveError> {
        let mut meeting = self.meeting();
        let round = meeting.going()?;
        meeting.arrived[rank] = true;
        if meeting.arrived.iter().all(|&arrived| arrived) {
            meeting.arrived.fill(false);
            meeting.round += 1;
            self.changed.notify_all();
            return Ok(());
        }
        let waits = |meeting: &mut Meeting| meeting.round == round && meeting.failed.is_none();
        let (mut meeting, _) = self
            .changed
            .wait_timeout_while(meeting, self.timeout, waits)
            .unwrap_or_else(PoisonError::into_inner);
        if meeting.round != round {
            return Ok(());
        }
        let missing = || {
            meeting
                .arrived
                .iter()
                .enumerate()
                .filter(|(_, arrived)| !**arrived)
        };
        let stuck = CollectiveError::Stuck {
            ranks: missing().map(|(rank, _)| rank).collect(),
            after: self.timeout,
        };
        let failed = meeting.failed.get_or_insert(stuck).clone();
        self.changed.notify_all();
        Err(failed)
    }

    /// The first failure is the one that everybody hears of.
    fn fail(&self, error: CollectiveError) -> CollectiveError {
        let failed = self.meeting().failed.get_or_insert(error).clone();
        self.changed.notify_all();
        failed
    }
}

// === impl Meeting ===

impl Meeting {
    fn going(&self) -> Result<u64, CollectiveError> {
        match &self.failed {
            None => Ok(self.round),
            Some(failed) => Err(failed.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    proptest! {
        #[test]
        fn every_rank_gets_the_sum_in_the_order_of_the_ranks(
            rounds in prop::collection::vec(prop::collection::vec(-1e6f32..1e6, 1..40), 1..12),
            size in 1usize..5,
        ) {
            let parts = |round: &[f32], rank: usize| -> Vec<f32> {
                round.iter().map(|value| value * (rank as f32 + 0.37)).collect()
            };
            let results = thread::scope(|scope| {
                let threads: Vec<_> = LocalCollective::group(size, LONG)
                    .into_iter()
                    .map(|collective| {
                        let rounds = &rounds;
                        scope.spawn(move || {
                            let reduce = |round: &Vec<f32>| {
                                let mut values = parts(round, collective.rank());
                                collective.all_reduce(&mut values).map(|()| values)
                            };
                            rounds.iter().map(reduce).collect::<Result<Vec<_>, _>>()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            for result in results {
                for (round, sums) in rounds.iter().zip(result.unwrap()) {
                    let mut expected = parts(round, 0);
                    for rank in 1..size {
                        expected.iter_mut().zip(parts(round, rank)).for_each(|(sum, part)| *sum += part);
                    }
                    prop_assert_eq!(&sums, &expected);
                }
            }
        }
    }

    #[test]
    fn a_rank_that_does_not_come_is_named_and_all_go_on_after_a_reset() {
        let ranks = LocalCollective::group(3, Duration::from_millis(50));
        let stuck = CollectiveError::Stuck {
            ranks: vec![1],
            after: Duration::from_millis(50),
        };
        thread::scope(|scope| {
            for rank in [0, 2] {
                let (ranks, stuck) = (&ranks, &stuck);
                scope.spawn(move || assert_eq!(ranks[rank].all_reduce(&mut [1.0]).as_ref(), Err(stuck)));
            }
        });
        // It comes too late, and hears of it.
        assert_eq!(ranks[1].all_reduce(&mut [1.0]), Err(stuck));
        ranks[0].reset();
        let sum = |rank: &LocalCollective| {
            let mut values = [1.0, 2.0];
            rank.all_reduce(&mut values).map(|()| values)
        };
        // On a machine as busy as it may be, one of a few tries is in time.
        let summed = || {
            thread::scope(|scope| {
                let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || sum(rank))).collect();
                threads
                    .into_iter()
                    .all(|thread| thread.join().unwrap() == Ok([3.0, 6.0]))
            })
        };
        assert!((0..50).any(|_| {
            ranks[0].reset();
            summed()
        }));
    }

    #[test]
    fn a_rank_that_fails_or_disagrees_ends_the_wait_of_the_others() {
        let ranks = LocalCollective::group(2, LONG);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| ranks[0].all_reduce(&mut [1.0]));
            ranks[1].abort("no memory");
            let error = waiting.join().unwrap().unwrap_err().to_string();
            assert_eq!(error, "tensor-parallel rank 1 failed: no memory");
        });
        ranks[1].reset();
        thread::scope(|scope| {
            let other = scope.spawn(|| ranks[0].all_reduce(&mut [1.0]));
            let own = ranks[1].all_reduce(&mut [1.0, 2.0]);
            assert!(matches!(own, Err(CollectiveError::Length { .. })), "{own:?}");
            assert!(matches!(
                other.join().unwrap(),
                Err(CollectiveError::Length { .. })
            ));
        });
    }
}
