//! The embedded store: everything in memory, every lasting change in a redb file first.
//!
//! Leased entries are kept in memory only: their owners are tasks of this process, so that none survives it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{
    CommitError, Entry, Key, Lease, LeaseId, Listing, Operation, Precondition, Prefix, Store, StoreError,
    Transaction, WatchEvent, WatchStream, lease::Revoke,
};

mod disk;

use disk::{Disk, Stored};

/// Changes remembered for watches that start in the past.
const HISTORY: usize = 4096;
/// Changes that a slow watch may lag behind before it is given everything anew.
const LAG: usize = 1024;
/// How often leases are looked through.
const REAP_EVERY: Duration = Duration::from_millis(100);

/// A store in this process.
#[derive(Clone)]
pub struct EmbeddedStore {
    inner: Arc<Inner>,
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it.
    #[error("{} is in use by another instance; stop it, or choose another directory with --data-dir", .0.display())]
    Locked(PathBuf),
    /// It cannot be created.
    #[error("cannot create {}", path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file in it is no store.
    #[error("cannot read {}: {reason}; move it away to start anew", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

struct Inner {
    state: Mutex<State>,
    changes: broadcast::Sender<(u64, WatchEvent)>,
    disk: Option<Disk>,
}

#[derive(Default)]
struct State {
    revision: u64,
    /// Oldest revision whose changes are all in `history`.
    history_from: u64,
    entries: BTreeMap<String, Entry>,
    history: VecDeque<(u64, WatchEvent)>,
    leases: HashMap<LeaseId, LeaseState>,
    next_lease: i64,
}

struct LeaseState {
    expires: Instant,
    lost: CancellationToken,
}

// === impl EmbeddedStore ===

impl EmbeddedStore {
    /// Opens the store in `directory`, which is created if need be. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Another process has the directory, or its file is not readable.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        fs::create_dir_all(directory).map_err(|source| OpenError::Create {
            path: directory.to_owned(),
            source,
        })?;
        let (disk, revision, entries) = Disk::open(directory)?;
        Ok(Self::start(
            State {
                revision,
                history_from: revision + 1,
                entries,
                ..State::default()
            },
            Some(disk),
        ))
    }

    /// A store that is gone with its last handle. Must be called within a tokio runtime.
    pub fn in_memory() -> Self {
        Self::start(
            State {
                history_from: 1,
                ..State::default()
            },
            None,
        )
    }

    fn start(state: State, disk: Option<Disk>) -> Self {
        let (changes, _) = broadcast::channel(LAG);
        let inner = Arc::new(Inner {
            state: Mutex::new(state),
            changes,
            disk,
        });
        tokio::spawn(reap(Arc::downgrade(&inner)));
        Self { inner }
    }

    /// Forgets all history before the present revision, as etcd's compaction does.
    pub fn compact(&self) {
        let mut state = self.inner.lock();
        state.history.clear();
        state.history_from = state.revision + 1;
    }

    /// Changes are written by a thread that may wait for the disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, CommitError> + Send + 'static,
    ) -> Result<T, CommitError> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => Err(StoreError::Failed(error.to_string()).into()),
        }
    }
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore")
            .field("revision", &self.inner.lock().revision)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        Ok(self.inner.lock().entries.get(&key.to_string()).cloned())
    }

    async fn list(&self, prefix: Prefix) -> Result<Listing, StoreError> {
        Ok(self.inner.lock().list(prefix))
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        transaction.changes_each_key_once()?;
        self.blocking(move |inner| inner.commit(&transaction)).await
    }

    async fn watch(&self, prefix: Prefix, from_revision: u64) -> Result<WatchStream, StoreError> {
        let (backlog, changes, seen) = {
            let state = self.inner.lock();
            // Subscribed under the lock: what is not in the backlog comes through the channel.
            (
                state.since(prefix, from_revision),
                self.inner.changes.subscribe(),
                state.revision.max(from_revision.saturating_sub(1)),
            )
        };
        let (events, receiver) = mpsc::channel(64);
        tokio::spawn(forward(
            Arc::downgrade(&self.inner),
            prefix,
            backlog,
            changes,
            seen,
            events,
        ));
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let lost = CancellationToken::new();
        let id = self.inner.lock().grant(ttl, lost.clone());
        let keep_alive = tokio::spawn(keep_alive(Arc::downgrade(&self.inner), id, ttl)).abort_handle();
        let store = self.clone();
        let revoke: Revoke = Box::new(move || {
            Box::pin(async move {
                let ended = store
                    .blocking(move |inner| inner.end_leases(|lease, _| lease == id))
                    .await;
                ended
                    .map(drop)
                    .map_err(|error| StoreError::Failed(error.to_string()))
            })
        });
        Ok(Lease::new(id, lost, keep_alive, revoke))
    }

    async fn health(&self) -> Result<(), StoreError> {
        // The lock is all that a read needs.
        drop(self.inner.lock());
        Ok(())
    }
}

/// Feeds one watch: first the backlog, then every change as it happens.
async fn forward(
    inner: Weak<Inner>,
    prefix: Prefix,
    backlog: Vec<WatchEvent>,
    mut changes: broadcast::Receiver<(u64, WatchEvent)>,
    mut seen: u64,
    events: mpsc::Sender<WatchEvent>,
) {
    for event in backlog {
        if events.send(event).await.is_err() {
            return;
        }
    }
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = events.closed() => return,
        };
        let event = match change {
            Ok((revision, event)) if revision > seen && event.concerns(prefix) => event,
            Ok(_) => continue,
            Err(broadcast::error::RecvError::Lagged(_)) => {
                let Some(inner) = inner.upgrade() else { return };
                let listing = inner.lock().list(prefix);
                seen = listing.revision;
                WatchEvent::Resync(listing)
            }
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Moves a lease's end on, until it has ended.
async fn keep_alive(inner: Weak<Inner>, id: LeaseId, ttl: Duration) {
    loop {
        tokio::time::sleep(ttl / 3).await;
        let Some(inner) = inner.upgrade() else { return };
        let mut state = inner.lock();
        let Some(lease) = state.leases.get_mut(&id) else {
            return;
        };
        lease.expires = Instant::now() + ttl;
    }
}

/// Ends leases whose owners are gone.
async fn reap(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(REAP_EVERY).await;
        let Some(inner) = inner.upgrade() else { return };
        let now = Instant::now();
        let over = inner.lock().leases.values().any(|lease| lease.expires <= now);
        if over {
            let ended =
                tokio::task::spawn_blocking(move || inner.end_leases(|_, lease| lease.expires <= now)).await;
            if let Ok(Err(error)) = ended {
                tracing::error!(error = &error as &dyn std::error::Error, "cannot end leases");
            }
        }
    }
}

// === impl Inner ===

impl Inner {
    /// A panic while the state was locked left it whole: every change is applied after all checks.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(&self, transaction: &Transaction) -> Result<u64, CommitError> {
        let mut state = self.lock();
        state.check(transaction)?;
        self.make(&mut state, transaction)
    }

    /// Makes the changes of a transaction whose preconditions hold.
    fn make(&self, state: &mut State, transaction: &Transaction) -> Result<u64, CommitError> {
        if !state.is_changed_by(transaction) {
            return Ok(state.revision);
        }
        let revision = state.revision + 1;
        if let Some(disk) = &self.disk {
            disk.write(revision, &state.lasting(transaction, revision))
                .map_err(CommitError::Store)?;
        }
        for event in state.apply(&transaction.operations, revision) {
            // Nobody watching is no error.
            let _ = self.changes.send((revision, event));
        }
        Ok(revision)
    }

    /// Ends the leases that `over` picks, and deletes their keys in one transaction.
    fn end_leases(&self, over: impl Fn(LeaseId, &LeaseState) -> bool) -> Result<u64, CommitError> {
        let mut state = self.lock();
        let ended: Vec<LeaseId> = state
            .leases
            .iter()
            .filter(|(id, lease)| over(**id, lease))
            .map(|(id, _)| *id)
            .collect();
        let of_ended = |entry: &&Entry| entry.lease.is_some_and(|lease| ended.contains(&lease));
        let operations = state
            .entries
            .values()
            .filter(of_ended)
            .map(|e| Operation::Delete(e.key.clone()))
            .collect();
        // Under one lock: nothing that is written again under another lease is deleted.
        let revision = self.make(
            &mut state,
            &Transaction {
                preconditions: Vec::new(),
                operations,
            },
        )?;
        for id in &ended {
            if let Some(lease) = state.leases.remove(id) {
                lease.lost.cancel();
            }
        }
        Ok(revision)
    }
}

// === impl State ===

impl State {
    fn list(&self, prefix: Prefix) -> Listing {
        let below = self.entries.range(prefix.as_str().to_owned()..);
        let entries = below
            .take_while(|(key, _)| key.starts_with(prefix.as_str()))
            .map(|(_, entry)| entry.clone())
            .collect();
        Listing {
            entries,
            revision: self.revision,
        }
    }

    /// What a watch from `from` has missed.
    fn since(&self, prefix: Prefix, from: u64) -> Vec<WatchEvent> {
        let from = from.max(1);
        if from < self.history_from && from <= self.revision {
            return vec![WatchEvent::Resync(self.list(prefix))];
        }
        let missed = self
            .history
            .iter()
            .filter(|(revision, event)| *revision >= from && event.concerns(prefix));
        missed.map(|(_, event)| event.clone()).collect()
    }

    fn grant(&mut self, ttl: Duration, lost: CancellationToken) -> LeaseId {
        self.next_lease += 1;
        let id = LeaseId(self.next_lease);
        self.leases.insert(
            id,
            LeaseState {
                expires: Instant::now() + ttl,
                lost,
            },
        );
        id
    }

    fn check(&self, transaction: &Transaction) -> Result<(), CommitError> {
        for precondition in &transaction.preconditions {
            let found = self.entries.get(&precondition.key().to_string());
            let holds = match precondition {
                Precondition::Absent(_) => found.is_none(),
                Precondition::Exists(_) => found.is_some(),
                Precondition::ModRevision(_, revision) => {
                    found.is_some_and(|entry| entry.mod_revision == *revision)
                }
            };
            if !holds {
                return Err(CommitError::Conflict {
                    key: precondition.key().clone(),
                });
            }
        }
        for operation in &transaction.operations {
            if let Operation::Put {
                lease: Some(lease), ..
            } = operation
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseGone(*lease).into());
            }
        }
        Ok(())
    }

    /// A transaction that changes nothing has no revision of its own.
    fn is_changed_by(&self, transaction: &Transaction) -> bool {
        transaction.operations.iter().any(|operation| match operation {
            Operation::Put { .. } => true,
            Operation::Delete(key) => self.entries.contains_key(&key.to_string()),
        })
    }

    /// The changes that go to disk: leased entries do not, and take an unleased one of their key away.
    fn lasting(&self, transaction: &Transaction, revision: u64) -> Vec<(String, Option<Stored>)> {
        let change = |operation: &Operation| {
            let key = operation.key().to_string();
            let stored = match operation {
                Operation::Put {
                    value, lease: None, ..
                } => {
                    let create_revision = self
                        .entries
                        .get(&key)
                        .map_or(revision, |entry| entry.create_revision);
                    Some(Stored {
                        create_revision,
                        mod_revision: revision,
                        value: value.clone(),
                    })
                }
                Operation::Put { .. } | Operation::Delete(_) => None,
            };
            (key, stored)
        };
        transaction.operations.iter().map(change).collect()
    }

    fn apply(&mut self, operations: &[Operation], revision: u64) -> Vec<WatchEvent> {
        self.revision = revision;
        let mut events = Vec::with_capacity(operations.len());
        for operation in operations {
            let text = operation.key().to_string();
            match operation {
                Operation::Put { key, value, lease } => {
                    let create_revision = self
                        .entries
                        .get(&text)
                        .map_or(revision, |entry| entry.create_revision);
                    let (key, value, lease) = (key.clone(), value.clone(), *lease);
                    let entry = Entry {
                        key,
                        value,
                        mod_revision: revision,
                        create_revision,
                        lease,
                    };
                    self.entries.insert(text, entry.clone());
                    events.push(WatchEvent::Put(entry));
                }
                Operation::Delete(key) if self.entries.remove(&text).is_some() => {
                    events.push(WatchEvent::Delete {
                        key: key.clone(),
                        mod_revision: revision,
                    });
                }
                Operation::Delete(_) => {}
            }
        }
        self.history
            .extend(events.iter().map(|event| (revision, event.clone())));
        while self.history.len() > HISTORY {
            if let Some((revision, _)) = self.history.pop_front() {
                self.history_from = revision + 1;
            }
        }
        events
    }
}

// === impl WatchEvent ===

impl WatchEvent {
    fn concerns(&self, prefix: Prefix) -> bool {
        match self {
            Self::Put(entry) => prefix.contains(&entry.key),
            Self::Delete { key, .. } => prefix.contains(key),
            Self::Resync(_) => true,
        }
    }
}
