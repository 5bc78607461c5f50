//! What each revision did in each trial since the process started: whole at every report, so that a lost report
//! loses nothing.

mod entry;
mod keys;
mod recent;

use std::{
    collections::HashMap,
    hash::Hasher as _,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use penstock_plan::{Revision, Route, Snapshot, Trial};
use penstock_proto::v1;
use xxhash_rust::xxh3::Xxh3;

pub(crate) use entry::{Ended, Entry, Running};

/// What belongs to a trial that is over is reported for so long.
const KEEP: Duration = Duration::from_secs(3600);
/// Counts of one model that are reported after their trials at most: plans that change fast must not fill the memory
/// of the gateways, and with it that of the control plane.
const MOST_OVER: usize = 32;

/// Which trial of which revision a count belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subject<'s> {
    pub(crate) model: &'s str,
    pub(crate) revision: &'s Revision,
    /// Empty without a rollout.
    pub(crate) rollout_uid: &'s str,
    pub(crate) attempt: u32,
    pub(crate) step: u32,
}

/// The counts of every revision and trial.
#[derive(Debug, Default)]
pub(crate) struct Ledger(RwLock<HashMap<u64, Arc<Entry>>>);

// === impl Subject ===

impl<'s> Subject<'s> {
    /// A revision in the trial that `route` is in.
    pub(crate) fn of(route: &'s Route, revision: &'s Revision) -> Self {
        let trial = route.trial.as_ref();
        Self {
            model: &route.model,
            revision,
            rollout_uid: &route.rollout_uid,
            attempt: trial.map_or(0, |trial| trial.attempt),
            step: trial.map_or(0, |trial| trial.step),
        }
    }

    /// 64 bits for a handful of entries: they do not collide.
    fn hash(&self) -> u64 {
        let mut hash = Xxh3::new();
        let Revision { name, digest } = self.revision;
        for text in [self.model, name, digest, self.rollout_uid] {
            hash.write(text.as_bytes());
            hash.write(&[0]);
        }
        hash.write(&self.attempt.to_le_bytes());
        hash.write(&self.step.to_le_bytes());
        hash.finish()
    }
}

// === impl Ledger ===

impl Ledger {
    /// The counts of a revision in the trial that `route` is in.
    pub(crate) fn entry(&self, route: &Route, revision: &Revision) -> Arc<Entry> {
        self.entry_of(Subject::of(route, revision), route.trial.as_ref())
    }

    /// The counts of a subject; `trial` says what counts as a bad event where they are begun now.
    pub(crate) fn entry_of(&self, subject: Subject<'_>, trial: Option<&Trial>) -> Arc<Entry> {
        if let Some(entry) = self.find(subject) {
            return entry;
        }
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let begun = || Arc::new(Entry::new(subject, trial));
        entries.entry(subject.hash()).or_insert_with(begun).clone()
    }

    /// The counts of a subject, if there are any.
    pub(crate) fn find(&self, subject: Subject<'_>) -> Option<Arc<Entry>> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(&subject.hash()).cloned()
    }

    /// Every count. What belongs to a trial that has been over for an hour is dropped, and the oldest of many.
    pub(crate) fn report(&self, snapshot: Option<&Snapshot>, now: Instant) -> Vec<v1::RevisionStats> {
        let in_force = |entry: &Entry| {
            let route = snapshot.and_then(|snapshot| snapshot.routes.get(&entry.model));
            route.is_some_and(|route| entry.is_of(route))
        };
        let mut entries = self.0.write().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| entry.idle(in_force(entry), now) < KEEP);
        drop_oldest(&mut entries);
        let entries: Vec<Arc<Entry>> = entries.values().cloned().collect();
        entries.iter().map(|entry| entry.report()).collect()
    }
}

/// Leaves the newest few of those whose trials are over.
fn drop_oldest(entries: &mut HashMap<u64, Arc<Entry>>) {
    let mut over: HashMap<&str, Vec<(Instant, u64)>> = HashMap::new();
    for (hash, entry) in entries.iter() {
        if let Some(since) = entry.over_since() {
            over.entry(&entry.model).or_default().push((since, *hash));
        }
    }
    let oldest = over.into_values().flat_map(|mut ended| {
        ended.sort_unstable();
        ended.truncate(ended.len().saturating_sub(MOST_OVER));
        ended
    });
    let oldest: Vec<u64> = oldest.map(|(_, hash)| hash).collect();
    for hash in oldest {
        entries.remove(&hash);
    }
}

/// The hash by which a sticky key is known here: of the key, never the key itself.
pub(crate) fn key_hash(key: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key.as_bytes())
}

#[cfg(test)]
mod tests;
