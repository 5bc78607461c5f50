//! Where plans, revisions and workers are kept: one trait, two backends.
//!
//! - [`embedded::EmbeddedStore`]: a file in a data directory, or memory alone; no server.
//! - `etcd::EtcdStore` (feature `etcd`): a real etcd.
//!
//! One behaviour suite holds both to the same semantics: linearizable reads, transactions with preconditions,
//! watches without gaps, leases.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use penstock_store::{Key, Operation, Precondition, Store, Transaction, embedded::EmbeddedStore};
//!
//! let store = EmbeddedStore::in_memory();
//! let key = Key::Rollout("demo".into());
//! let create = Transaction {
//!     preconditions: vec![Precondition::Absent(key.clone())],
//!     operations: vec![Operation::Put { key: key.clone(), value: "{}".into(), lease: None }],
//! };
//! let revision = store.commit(create.clone()).await?;
//! assert_eq!(store.get(&key).await?.map(|entry| entry.mod_revision), Some(revision));
//! assert!(store.commit(create).await.is_err(), "it exists now");
//! # Ok(())
//! # }
//! ```
//!
//! Values are bytes: this crate refuses to know what they mean. It has no queue that can grow without bound.

use std::{collections::BTreeSet, fmt, pin::Pin, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio_stream::Stream;

pub mod embedded;
#[cfg(feature = "etcd")]
pub mod etcd;
mod key;
mod lease;

pub use key::{Key, KeyError, Prefix};
pub use lease::{Lease, LeaseId};

/// A value and where it stands in the store's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Its value.
    pub value: Bytes,
    /// Revision of the store at which it was written last.
    pub mod_revision: u64,
    /// Revision of the store at which it was created.
    pub create_revision: u64,
    /// The lease that it lives and dies with.
    pub lease: Option<LeaseId>,
}

/// Entries as of one revision of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// In the order of their keys.
    pub entries: Vec<Entry>,
    /// The revision; a watch from the next one misses nothing.
    pub revision: u64,
}

/// What must hold for a transaction to be committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Precondition {
    /// The key is not there.
    Absent(Key),
    /// The key is there.
    Exists(Key),
    /// The key was written last at this revision.
    ModRevision(Key, u64),
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Writes a value.
    Put {
        /// Where.
        key: Key,
        /// What.
        value: Bytes,
        /// The lease that it lives and dies with.
        lease: Option<LeaseId>,
    },
    /// Deletes a key; no error if it is not there.
    Delete(Key),
}

/// Changes that are made together or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// All must hold.
    pub preconditions: Vec<Precondition>,
    /// All are made, under one revision; at most one for each key.
    pub operations: Vec<Operation>,
}

/// What a watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was written.
    Put(Entry),
    /// A key was deleted, or its lease ended.
    Delete {
        /// The key.
        key: Key,
        /// Revision at which it went.
        mod_revision: u64,
    },
    /// History was lost between the last event and this: here is everything as it stands now.
    Resync(Listing),
}

/// Events in the order of their revisions, without gaps. It resumes by itself when the connection is lost and
/// ends only when it is dropped.
pub type WatchStream = Pin<Box<dyn Stream<Item = WatchEvent> + Send>>;

/// Why the store did not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// It cannot be reached, or has no leader.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// It did not answer in time.
    #[error("the store did not answer within {0:?}")]
    Timeout(Duration),
    /// The lease is gone.
    #[error("lease {0} is gone")]
    LeaseGone(LeaseId),
    /// A key below the prefix is none of ours.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// It failed otherwise.
    #[error("the store failed: {0}")]
    Failed(String),
}

/// Why a transaction was not committed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// A precondition does not hold; nothing was changed.
    #[error("{key} is not as expected")]
    Conflict {
        /// Its key.
        key: Key,
    },
    /// The store did not answer; whether it was committed is unknown.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A store with transactions, watches and leases.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync {
    /// The value of a key.
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError>;

    /// Every entry below a prefix.
    async fn list(&self, prefix: Prefix) -> Result<Listing, StoreError>;

    /// Commits a transaction; returns its revision (the present one if it changes nothing).
    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError>;

    /// Every change below a prefix, from a revision on (that one included); 0 and 1 mean everything.
    async fn watch(&self, prefix: Prefix, from_revision: u64) -> Result<WatchStream, StoreError>;

    /// A lease that is kept alive until it is dropped or revoked; once dropped, it runs out after `ttl`.
    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError>;

    /// A round trip.
    async fn health(&self) -> Result<(), StoreError>;
}

// === impl StoreError ===

impl StoreError {
    /// Whether the same call may work later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Timeout(_))
    }
}

// === impl Precondition ===

impl Precondition {
    /// The key that it is about.
    pub fn key(&self) -> &Key {
        match self {
            Self::Absent(key) | Self::Exists(key) | Self::ModRevision(key, _) => key,
        }
    }
}

// === impl Transaction ===

impl Transaction {
    /// Operations have no order among each other, so that two on one key would mean nothing.
    fn changes_each_key_once(&self) -> Result<(), StoreError> {
        let mut changed = BTreeSet::new();
        match self.operations.iter().find(|o| !changed.insert(o.key())) {
            Some(twice) => {
                let reason = format!("{} is changed twice in one transaction", twice.key());
                Err(StoreError::Failed(reason))
            }
            None => Ok(()),
        }
    }
}

// === impl Operation ===

impl Operation {
    /// The key that it changes.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete(key) => key,
        }
    }
}
