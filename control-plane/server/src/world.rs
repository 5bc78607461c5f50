//! The store's content as this process knows it, and what follows from it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use penstock_plan::{
    Endpoint, EndpointSet, Ledger, Published, PublishedRevision, Rollout, Route, Snapshot, WorkerRecord,
    build_routes,
};
use penstock_proto::v1;
use penstock_store::{Entry, Key, Listing, WatchEvent};
use tokio::sync::watch;
use tonic::Status;

/// What every gateway is to apply.
#[derive(Debug, Clone, Default)]
pub(crate) struct Target {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) digest: Arc<str>,
    pub(crate) endpoints: Arc<EndpointSet>,
    /// What every worker is to serve beside what its command line names.
    pub(crate) placement: Arc<v1::Placement>,
    /// W3C trace context of the change that made the snapshot, or empty.
    pub(crate) traceparent: Arc<str>,
}

/// Shared by the controller, which writes, and the services, which read.
#[derive(Debug, Default)]
pub(crate) struct World {
    state: Mutex<State>,
    target: watch::Sender<Target>,
    /// Counts changes of anything that a status shows.
    changes: watch::Sender<u64>,
    /// Epochs up to this one are in force somewhere with a content that this store does not know: the store
    /// was lost. The next snapshot goes above it, since no gateway goes back.
    floor: AtomicU64,
    /// Under which this control plane runs for leader.
    address: String,
}

/// Entries by kind, and the revision of the store up to which they are complete.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) rollouts: BTreeMap<String, Stored<Rollout>>,
    pub(crate) workers: BTreeMap<String, WorkerRecord>,
    pub(crate) leader: Option<Stored<String>>,
    pub(crate) pointer_revision: Option<u64>,
    models: BTreeMap<(String, String), Stored<PublishedRevision>>,
    snapshots: BTreeMap<u64, Snapshot>,
    /// Counts that a leader wrote down, by model.
    pub(crate) observations: BTreeMap<String, Stored<Ledger>>,
    /// First epoch that carries each model's present plan: (uid, generation, epoch).
    first_epochs: BTreeMap<String, (String, u64, u64)>,
    /// Last epoch that was looked at for them.
    noted: u64,
    pub(crate) revision: u64,
    pub(crate) loaded: bool,
}

/// A value with its place in the store's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored<T> {
    pub(crate) value: T,
    pub(crate) create_revision: u64,
    pub(crate) mod_revision: u64,
}

// === impl World ===

impl World {
    /// Empty, until the store answers. Others reach this control plane at `address`.
    pub(crate) fn new(address: String) -> Self {
        Self {
            address,
            ..Self::default()
        }
    }

    /// Address of another control plane that leads, as far as is known.
    pub(crate) fn other_leader(&self) -> Option<String> {
        let state = self.state();
        let leader = state.leader.as_ref().map(|leader| &leader.value);
        leader.filter(|leader| **leader != self.address).cloned()
    }

    /// What a control plane that does not lead answers.
    pub(crate) fn not_leading(&self) -> Status {
        Status::unavailable(match self.other_leader() {
            Some(leader) => format!("this control plane does not lead; {leader} does"),
            None => "no control plane leads now; try again".into(),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // State is whole after every statement that changes it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn target(&self) -> watch::Receiver<Target> {
        self.target.subscribe()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Something that a status shows has changed.
    pub(crate) fn touch(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// The next snapshot's epoch is above this.
    pub(crate) fn floor(&self) -> u64 {
        self.floor.load(Ordering::Acquire)
    }

    /// What a gateway has in force, as an epoch of ours: 0 where it is none of ours.
    pub(crate) fn known_epoch(&self, epoch: u64, digest: &str) -> u64 {
        // A thousand gateways acknowledge the same snapshot at once, whose digest is at hand.
        let is_newest = {
            let target = self.target.borrow();
            target.snapshot.epoch == epoch && *target.digest == *digest
        };
        if is_newest {
            return epoch;
        }
        let (newest, known) = {
            let state = self.state();
            let newest = state.newest_snapshot().map_or(0, |snapshot| snapshot.epoch);
            let known = state.snapshots.get(&epoch).map(Snapshot::digest);
            (newest, known)
        };
        // An old epoch may have been pruned; it is acknowledged all the same.
        let ours = known.map_or(epoch < newest, |known| known == digest);
        if ours || epoch == 0 {
            return epoch;
        }
        if self.state().loaded && self.floor.fetch_max(epoch, Ordering::AcqRel) < epoch {
            tracing::warn!(
                epoch,
                "a gateway has an epoch that the store does not know; going on above it"
            );
            self.touch();
        }
        0
    }

    /// Replaces everything.
    pub(crate) fn load(&self, listing: Listing) {
        let mut state = self.state();
        *state = State {
            first_epochs: std::mem::take(&mut state.first_epochs),
            noted: state.noted,
            ..State::default()
        };
        for entry in listing.entries {
            state.put(entry);
        }
        state.revision = listing.revision;
        state.loaded = true;
        self.refresh(state);
    }

    /// Applies one change.
    pub(crate) fn apply(&self, event: WatchEvent) {
        let mut state = self.state();
        match event {
            WatchEvent::Put(entry) => {
                state.revision = state.revision.max(entry.mod_revision);
                state.put(entry);
            }
            WatchEvent::Delete { key, mod_revision } => {
                state.revision = state.revision.max(mod_revision);
                state.delete(&key);
            }
            WatchEvent::Resync(listing) => {
                drop(state);
                return self.load(listing);
            }
        }
        self.refresh(state);
    }

    /// Recomputes the target.
    fn refresh(&self, mut state: MutexGuard<'_, State>) {
        state.note_epochs();
        let newest = state.newest_snapshot().cloned().unwrap_or_default();
        let endpoints = state.endpoints();
        let placed = state.placed();
        let told = self.target.borrow().snapshot.clone();
        let traceparent = state.traceparent(&told, &newest);
        drop(state);
        if newest.epoch < told.epoch {
            // The store was replaced by an older one while we ran.
            self.floor.fetch_max(told.epoch, Ordering::AcqRel);
        }
        self.target.send_if_modified(|target| {
            let newer = newest.epoch > target.snapshot.epoch;
            let moved = endpoints != target.endpoints.endpoints;
            let placed_anew = placed != target.placement.revisions;
            if placed_anew {
                target.placement = Arc::new(v1::Placement {
                    version: target.placement.version + 1,
                    revisions: placed,
                });
            }
            if newer {
                target.digest = newest.digest().into();
                target.snapshot = Arc::new(newest);
                target.traceparent = traceparent.into();
            }
            if moved {
                target.endpoints = Arc::new(EndpointSet {
                    version: target.endpoints.version + 1,
                    endpoints,
                });
            }
            newer || moved || placed_anew
        });
        self.touch();
    }
}

// === impl State ===

impl State {
    /// Published revisions by model, in the order in which they were published.
    pub(crate) fn published(&self) -> Published {
        let mut revisions: Vec<_> = self.models.values().collect();
        revisions.sort_by_key(|stored| stored.create_revision);
        let mut published = Published::new();
        for stored in revisions {
            published
                .entry(stored.value.model.clone())
                .or_default()
                .push(stored.value.clone());
        }
        published
    }

    /// One published revision.
    pub(crate) fn revision(&self, model: &str, revision: &str) -> Option<&Stored<PublishedRevision>> {
        self.models.get(&(model.to_owned(), revision.to_owned()))
    }

    /// Published revisions that can be routed to: those whose content is known and that nobody took back.
    fn routable(&self) -> Published {
        let mut published = self.published();
        for revisions in published.values_mut() {
            revisions.retain(|revision| !revision.digest.is_empty() && !revision.retired);
        }
        published.retain(|_, revisions| !revisions.is_empty());
        published
    }

    /// Everything that workers are to serve beside what their command lines name.
    pub(crate) fn placed(&self) -> Vec<v1::PlacedRevision> {
        let watch_words = |model: &str| {
            let rollout = self
                .rollouts
                .get(model)
                .filter(|stored| !stored.value.phase.is_final());
            rollout
                .map(|stored| stored.value.plan.analysis.watch_words.clone())
                .unwrap_or_default()
        };
        let warm = |revision: &PublishedRevision| {
            let rollout = self.rollouts.get(&revision.model).map(|stored| &stored.value);
            let own = rollout.filter(|rollout| rollout.canary == revision.revision);
            let of_plan = own
                .map(|rollout| rollout.plan.canary.warm_prefixes.as_slice())
                .unwrap_or_default();
            revision
                .warm_prefixes
                .iter()
                .chain(of_plan)
                .cloned()
                .collect::<Vec<_>>()
        };
        let wanted = self
            .models
            .values()
            .map(|stored| &stored.value)
            .filter(|revision| !revision.retired);
        let placed = wanted.map(|revision| v1::PlacedRevision {
            model: revision.model.clone(),
            revision: revision.revision.clone(),
            source: revision.source.clone(),
            digest: revision.digest.clone(),
            warm_prefixes: warm(revision),
            watch_words: watch_words(&revision.model),
        });
        // What workers have from their command lines is named only where there is something to say of it.
        placed
            .filter(|placed| !placed.source.is_empty() || !placed.watch_words.is_empty())
            .collect()
    }

    /// The routes that should be in force.
    pub(crate) fn wanted_routes(&self) -> BTreeMap<String, Route> {
        let rollouts: Vec<Rollout> = self
            .rollouts
            .values()
            .map(|stored| stored.value.clone())
            .collect();
        build_routes(&rollouts, &self.routable())
    }

    /// The newest snapshot that was published.
    pub(crate) fn newest_snapshot(&self) -> Option<&Snapshot> {
        self.snapshots.last_key_value().map(|(_, snapshot)| snapshot)
    }

    /// Epochs that are kept, oldest first.
    pub(crate) fn epochs(&self) -> impl Iterator<Item = u64> {
        self.snapshots.keys().copied()
    }

    /// First epoch that carries a rollout's present plan.
    pub(crate) fn published_epoch(&self, rollout: &Rollout) -> Option<u64> {
        let (uid, generation, epoch) = self.first_epochs.get(&rollout.model)?;
        (*uid == rollout.uid && *generation == rollout.generation).then_some(*epoch)
    }

    /// Why a worker's revision is not routed to, if so.
    pub(crate) fn refusal(&self, served: &penstock_plan::ServedRevision) -> Option<String> {
        let published = self
            .models
            .get(&(served.model.clone(), served.revision.clone()))?;
        if published.value.digest.is_empty() {
            return None;
        }
        (published.value.digest != served.digest).then(|| {
            format!(
                "{}@{} has digest {}, published is {}",
                served.model, served.revision, served.digest, published.value.digest
            )
        })
    }

    /// How many workers serve a revision now.
    pub(crate) fn endpoints_of(&self, model: &str, revision: &str) -> usize {
        let serves = |worker: &&WorkerRecord| {
            let mut served = worker.revisions.iter();
            !worker.draining
                && served.any(|s| s.model == model && s.revision == revision && self.refusal(s).is_none())
        };
        self.workers.values().filter(serves).count()
    }

    /// What gateways may send requests to.
    fn endpoints(&self) -> Vec<Endpoint> {
        let mut endpoints = Vec::new();
        for worker in self.workers.values().filter(|worker| !worker.draining) {
            let mut endpoint = Endpoint::from(worker);
            endpoint.revisions.retain(|served| self.refusal(served).is_none());
            if !endpoint.revisions.is_empty() {
                endpoints.push(endpoint);
            }
        }
        endpoints
    }

    fn note_epochs(&mut self) {
        for (epoch, snapshot) in self.snapshots.range(self.noted + 1..) {
            for route in snapshot.routes.values() {
                let same = |(uid, generation, _): &(String, u64, u64)| {
                    *uid == route.rollout_uid && *generation == route.generation
                };
                if !self.first_epochs.get(&route.model).is_some_and(same) {
                    let first = (route.rollout_uid.clone(), route.generation, *epoch);
                    self.first_epochs.insert(route.model.clone(), first);
                }
            }
            self.noted = *epoch;
        }
    }

    /// Trace context of the change that turned `old` into `new`.
    fn traceparent(&self, old: &Snapshot, new: &Snapshot) -> String {
        let changed = new
            .routes
            .iter()
            .filter(|(model, route)| old.routes.get(*model) != Some(route));
        let mut contexts = changed
            .filter_map(|(model, _)| self.rollouts.get(model))
            .map(|r| &r.value.traceparent);
        contexts
            .find(|context| !context.is_empty())
            .cloned()
            .unwrap_or_default()
    }

    fn put(&mut self, entry: Entry) {
        match &entry.key {
            Key::Worker(id) => insert(&mut self.workers, id.clone(), &entry, |stored| stored.value),
            Key::Rollout(model) => insert(&mut self.rollouts, model.clone(), &entry, |stored| stored),
            Key::Snapshot(epoch) => insert(&mut self.snapshots, *epoch, &entry, |stored| stored.value),
            Key::Model { model, revision } => {
                insert(
                    &mut self.models,
                    (model.clone(), revision.clone()),
                    &entry,
                    |stored| stored,
                );
            }
            Key::Leader => {
                let value = String::from_utf8_lossy(&entry.value).into_owned();
                let (create_revision, mod_revision) = (entry.create_revision, entry.mod_revision);
                self.leader = Some(Stored {
                    value,
                    create_revision,
                    mod_revision,
                });
            }
            Key::SnapshotPointer => self.pointer_revision = Some(entry.mod_revision),
            Key::Observations(model) => {
                insert(&mut self.observations, model.clone(), &entry, |stored| stored)
            }
            Key::Audit { .. } => {}
        }
    }

    fn delete(&mut self, key: &Key) {
        match key {
            Key::Worker(id) => drop(self.workers.remove(id)),
            Key::Rollout(model) => drop(self.rollouts.remove(model)),
            Key::Snapshot(epoch) => drop(self.snapshots.remove(epoch)),
            Key::Model { model, revision } => drop(self.models.remove(&(model.clone(), revision.clone()))),
            Key::Leader => self.leader = None,
            Key::SnapshotPointer => self.pointer_revision = None,
            Key::Observations(model) => drop(self.observations.remove(model)),
            Key::Audit { .. } => {}
        }
    }
}

/// Reads a JSON value; one that cannot be read is logged and left out, so that it spoils nothing else.
fn insert<K: Ord, V, T: serde::de::DeserializeOwned>(
    map: &mut BTreeMap<K, V>,
    key: K,
    entry: &Entry,
    keep: impl FnOnce(Stored<T>) -> V,
) {
    match serde_json::from_slice(&entry.value) {
        Ok(value) => {
            let (create_revision, mod_revision) = (entry.create_revision, entry.mod_revision);
            map.insert(
                key,
                keep(Stored {
                    value,
                    create_revision,
                    mod_revision,
                }),
            );
        }
        Err(error) => {
            tracing::error!(key = %entry.key, %error, "an entry of the store cannot be read; it is ignored")
        }
    }
}
