//! Leases.

use std::{sync::Arc, time::Duration};

use penstock_store::{CommitError, Key, LeaseId, Prefix, Store, StoreError, WatchEvent};

use crate::support::{PATIENCE, get, gone, next, put, put_leased, transaction, write};

/// The shortest that etcd keeps.
const TTL: Duration = Duration::from_secs(2);

fn worker() -> Key {
    Key::Worker("w".into())
}

pub(crate) async fn keys_die_with_a_revoked_lease(store: Arc<dyn Store>) {
    let other = Key::Worker("other".into());
    let lease = store.grant_lease(PATIENCE).await.unwrap();
    let revision = write(&store, put_leased(&worker(), "1", lease.id())).await;
    write(&store, put(&other, "1")).await;
    assert_eq!(get(&store, &worker()).await.unwrap().lease, Some(lease.id()));

    let mut watch = store.watch(Prefix::Workers, revision).await.unwrap();
    lease.revoke().await.unwrap();
    assert_eq!(get(&store, &worker()).await, None);
    assert!(get(&store, &other).await.is_some());
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(_)));
    assert!(matches!(next(&mut watch).await, WatchEvent::Put(_)));
    match next(&mut watch).await {
        WatchEvent::Delete { key, mod_revision } => {
            assert_eq!(key, worker());
            assert!(mod_revision > revision);
        }
        event => panic!("{event:?}"),
    }
}

pub(crate) async fn a_dropped_lease_runs_out(store: Arc<dyn Store>) {
    let lease = store.grant_lease(TTL).await.unwrap();
    let id = lease.id();
    write(&store, put_leased(&worker(), "1", id)).await;
    drop(lease);
    gone(&store, &worker()).await;
    refused(&store, id).await;
}

pub(crate) async fn a_held_lease_does_not_run_out(store: Arc<dyn Store>) {
    let lease = store.grant_lease(TTL).await.unwrap();
    write(&store, put_leased(&worker(), "1", lease.id())).await;
    assert!(tokio::time::timeout(TTL * 3, lease.lost()).await.is_err());
    assert!(!lease.is_lost());
    assert!(get(&store, &worker()).await.is_some());
}

pub(crate) async fn an_unknown_lease_is_refused(store: Arc<dyn Store>) {
    refused(&store, LeaseId(0x1234_5678)).await;
    assert_eq!(get(&store, &worker()).await, None);
}

/// A worker that registers anew takes its key over to its new lease; the end of the former leaves it alone.
pub(crate) async fn a_key_taken_from_a_lease_outlives_it(store: Arc<dyn Store>) {
    let former = store.grant_lease(PATIENCE).await.unwrap();
    let present = store.grant_lease(PATIENCE).await.unwrap();
    write(&store, put_leased(&worker(), "1", former.id())).await;
    write(&store, put_leased(&worker(), "2", present.id())).await;
    former.revoke().await.unwrap();
    assert_eq!(get(&store, &worker()).await.unwrap().lease, Some(present.id()));

    write(&store, put(&worker(), "3")).await;
    present.revoke().await.unwrap();
    assert_eq!(get(&store, &worker()).await.unwrap().lease, None);
}

#[cfg(feature = "etcd")]
/// A lease that somebody else ended is lost, long before its time.
pub(crate) async fn a_lease_ended_by_somebody_else_is_lost(
    store: Arc<dyn Store>,
    end: impl AsyncFnOnce(LeaseId),
) {
    let lease = store.grant_lease(Duration::from_secs(6)).await.unwrap();
    write(&store, put_leased(&worker(), "1", lease.id())).await;
    end(lease.id()).await;
    tokio::time::timeout(PATIENCE, lease.lost()).await.expect("told");
    assert!(lease.is_lost());
    assert_eq!(get(&store, &worker()).await, None);
    refused(&store, lease.id()).await;
}

async fn refused(store: &Arc<dyn Store>, lease: LeaseId) {
    let result = store
        .commit(transaction([], [put_leased(&worker(), "1", lease)]))
        .await;
    assert!(
        matches!(result, Err(CommitError::Store(StoreError::LeaseGone(id))) if id == lease),
        "{result:?}"
    );
}
