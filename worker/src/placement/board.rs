//! Where each revision stands, for the reports to the control plane.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use penstock_proto::v1::{self, revision_state::State};
use tokio::sync::watch;

use crate::{
    ModelSpec,
    catalogue::Served,
    progress::{LoadProgress, ObserveLoad},
};

/// A revision of a model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RevisionName {
    pub(crate) model: String,
    pub(crate) revision: String,
}

/// What is told of each revision. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Board {
    lines: Arc<Mutex<BTreeMap<RevisionName, Line>>>,
    /// Counts what should be told at once.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Line {
    state: State,
    message: String,
    done_bytes: u64,
    total_bytes: u64,
    /// Attempts to load that memory did not suffice for.
    out_of_memory: u64,
    /// Its digest and engine, once it is loaded; a report keeps no engine alive.
    served: Weak<Served>,
}

// === impl RevisionName ===

impl RevisionName {
    pub(crate) fn new(model: &str, revision: &str) -> Self {
        Self {
            model: model.to_owned(),
            revision: revision.to_owned(),
        }
    }
}

impl From<&ModelSpec> for RevisionName {
    fn from(spec: &ModelSpec) -> Self {
        Self::new(&spec.model, &spec.revision)
    }
}

impl From<&Served> for RevisionName {
    fn from(served: &Served) -> Self {
        Self::new(&served.model, &served.revision)
    }
}

impl fmt::Display for RevisionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.model, self.revision)
    }
}

// === impl Board ===

impl Board {
    /// Everything that should be told at once.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The revision is in this state now.
    pub(crate) fn enter(&self, name: &RevisionName, state: State) {
        self.change(name, |line| {
            line.state = state;
            line.message.clear();
        });
    }

    /// The revision cannot be served.
    pub(crate) fn failed(&self, name: &RevisionName, message: String) {
        tracing::error!(revision = %name, reason = message, "revision failed; the others are served on");
        self.change(name, |line| {
            line.state = State::Failed;
            line.message = message;
        });
    }

    /// Memory did not suffice for it.
    pub(crate) fn out_of_memory(&self, name: &RevisionName) {
        self.change(name, |line| line.out_of_memory += 1);
    }

    /// The revision is loaded.
    pub(crate) fn loaded(&self, name: &RevisionName, served: &Arc<Served>) {
        self.change(name, |line| line.served = Arc::downgrade(served));
    }

    /// There is nothing more to tell of it.
    pub(crate) fn forget(&self, name: &RevisionName) {
        self.lines().remove(name);
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// So many bytes are fetched or loaded; told with the next report, not at once.
    pub(crate) fn progress(&self, name: &RevisionName, done_bytes: u64, total_bytes: u64) {
        if let Some(line) = self.lines().get_mut(name) {
            (line.done_bytes, line.total_bytes) = (done_bytes, total_bytes);
        }
    }

    /// What the control plane is told.
    pub(crate) fn report(&self) -> v1::WorkerReport {
        let lines = self.lines();
        let revisions = lines.iter().map(|(name, line)| line.state(name)).collect();
        v1::WorkerReport { revisions }
    }

    /// Ends the engines of all, those of revisions that retire included.
    pub(crate) fn shut_down(&self) {
        for line in self.lines().values() {
            if let Some(served) = line.served.upgrade() {
                served.engine.shutdown();
            }
        }
    }

    fn change(&self, name: &RevisionName, change: impl FnOnce(&mut Line)) {
        change(self.lines().entry(name.clone()).or_default());
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn lines(&self) -> MutexGuard<'_, BTreeMap<RevisionName, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ObserveLoad for Board {
    fn loaded(&self, progress: LoadProgress<'_>) {
        let name = RevisionName::new(progress.model, progress.revision);
        self.progress(&name, progress.loaded_bytes, progress.total_bytes);
    }

    fn ready(&self, _: &str, _: &str) {}
}

// === impl Line ===

impl Line {
    fn state(&self, name: &RevisionName) -> v1::RevisionState {
        let served = self.served.upgrade();
        let stats = served
            .as_ref()
            .map(|served| served.engine.stats())
            .unwrap_or_default();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        v1::RevisionState {
            model: name.model.clone(),
            revision: name.revision.clone(),
            digest: served.map(|served| served.digest.clone()).unwrap_or_default(),
            state: self.state.into(),
            message: self.message.clone(),
            done_bytes: self.done_bytes,
            total_bytes: self.total_bytes,
            out_of_memory: self.out_of_memory + stats.out_of_memory,
            retractions: stats.retractions,
            prefix_lookup_tokens: stats.prefix_lookup_tokens,
            prefix_hit_tokens: stats.prefix_hit_tokens,
            pages_total: stats.total_pages as u64,
            pages_free: stats.free_pages as u64,
            running: count(stats.running),
            waiting: count(stats.waiting),
        }
    }
}
