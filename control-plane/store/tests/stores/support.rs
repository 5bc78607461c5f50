//! What the behaviours share.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use penstock_store::{
    CommitError, Entry, Key, LeaseId, Operation, Precondition, Store, Transaction, WatchEvent, WatchStream,
};
use tokio_stream::StreamExt as _;

/// Longest wait for something that is to happen: a hang fails its test instead of stopping it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A key that counts for nothing but itself.
pub(crate) fn key(name: &str) -> Key {
    Key::Rollout(name.to_owned())
}

pub(crate) fn put(key: &Key, value: impl Into<String>) -> Operation {
    Operation::Put {
        key: key.clone(),
        value: Bytes::from(value.into()),
        lease: None,
    }
}

pub(crate) fn put_leased(key: &Key, value: &str, lease: LeaseId) -> Operation {
    Operation::Put {
        key: key.clone(),
        value: Bytes::copy_from_slice(value.as_bytes()),
        lease: Some(lease),
    }
}

pub(crate) fn transaction(
    preconditions: impl IntoIterator<Item = Precondition>,
    operations: impl IntoIterator<Item = Operation>,
) -> Transaction {
    Transaction {
        preconditions: preconditions.into_iter().collect(),
        operations: operations.into_iter().collect(),
    }
}

/// Writes without preconditions; returns the revision.
pub(crate) async fn write(store: &Arc<dyn Store>, operation: Operation) -> u64 {
    store.commit(transaction([], [operation])).await.expect("written")
}

pub(crate) async fn get(store: &Arc<dyn Store>, key: &Key) -> Option<Entry> {
    store.get(key).await.expect("read")
}

/// The key that a refused transaction names.
pub(crate) fn conflict(result: Result<u64, CommitError>) -> Key {
    match result {
        Err(CommitError::Conflict { key }) => key,
        other => panic!("a conflict was expected, not {other:?}"),
    }
}

/// The next event.
pub(crate) async fn next(watch: &mut WatchStream) -> WatchEvent {
    tokio::time::timeout(PATIENCE, watch.next())
        .await
        .expect("an event in time")
        .expect("a watch does not end")
}

/// Follows a watch until the entry of `last` is put, applying everything to `state`. Returns the revisions in the
/// order in which they came.
pub(crate) async fn apply_until(
    watch: &mut WatchStream,
    state: &mut BTreeMap<Key, Entry>,
    last: &Key,
) -> Vec<u64> {
    let mut revisions = Vec::new();
    loop {
        match next(watch).await {
            WatchEvent::Put(entry) => {
                revisions.push(entry.mod_revision);
                let over = entry.key == *last;
                state.insert(entry.key.clone(), entry);
                if over {
                    return revisions;
                }
            }
            WatchEvent::Delete { key, mod_revision } => {
                revisions.push(mod_revision);
                state.remove(&key);
            }
            WatchEvent::Resync(listing) => {
                *state = listing.entries.into_iter().map(|e| (e.key.clone(), e)).collect();
                if state.contains_key(last) {
                    return revisions;
                }
            }
        }
    }
}

/// Waits until a key is gone.
pub(crate) async fn gone(store: &Arc<dyn Store>, key: &Key) {
    let wait = async {
        while get(store, key).await.is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("{key} is still there"));
}
