//! Watches.

use std::{collections::BTreeMap, sync::Arc};

use penstock_store::{Entry, Key, Operation, Prefix, Store, WatchEvent};

use crate::support::{apply_until, key, next, put, transaction, write};

/// Writers write while a listing is taken; listing and watch together have everything once, in order.
pub(crate) async fn list_then_watch_has_no_gaps(store: Arc<dyn Store>) {
    const WRITERS: usize = 4;
    const EACH: usize = 40;
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                for turn in 0..EACH {
                    let key = key(&format!("{writer}-{}", turn % 5));
                    let operation = match turn % 7 {
                        6 => Operation::Delete(key),
                        _ => put(&key, turn.to_string()),
                    };
                    write(&store, operation).await;
                }
            })
        })
        .collect();
    // The listing falls somewhere among the writes.
    while store.list(Prefix::Rollouts).await.unwrap().entries.len() < 3 {
        tokio::task::yield_now().await;
    }
    let listing = store.list(Prefix::Rollouts).await.unwrap();
    let from = listing.revision + 1;
    let mut watch = store.watch(Prefix::Rollouts, from).await.unwrap();
    for writer in writers {
        writer.await.unwrap();
    }
    let last = key("last");
    write(&store, put(&last, "")).await;

    let mut state = by_key(listing.entries);
    let revisions = apply_until(&mut watch, &mut state, &last).await;
    assert!(
        revisions.iter().all(|revision| *revision >= from),
        "{revisions:?} from {from}"
    );
    assert!(
        revisions.windows(2).all(|pair| pair[0] < pair[1]),
        "out of order: {revisions:?}"
    );
    let truth = by_key(store.list(Prefix::Rollouts).await.unwrap().entries);
    assert_eq!(state, truth);
}

pub(crate) async fn a_watch_starts_in_the_past_or_in_the_future(store: Arc<dyn Store>) {
    let (a, b) = (key("a"), key("b"));
    let first = write(&store, put(&a, "1")).await;
    let second = write(&store, put(&a, "2")).await;
    let mut past = store.watch(Prefix::Rollouts, second).await.unwrap();
    let mut everything = store.watch(Prefix::Rollouts, 0).await.unwrap();
    let mut future = store.watch(Prefix::Rollouts, second + 2).await.unwrap();
    let third = write(&store, put(&b, "3")).await;
    let fourth = write(&store, Operation::Delete(a.clone())).await;

    assert_eq!(put_revision(next(&mut past).await), second);
    assert_eq!(put_revision(next(&mut past).await), third);
    let deleted = WatchEvent::Delete {
        key: a,
        mod_revision: fourth,
    };
    assert_eq!(next(&mut past).await, deleted);
    assert_eq!(put_revision(next(&mut everything).await), first);
    assert_eq!(next(&mut future).await, deleted);
}

pub(crate) async fn a_watch_sees_its_prefix_alone(store: Arc<dyn Store>) {
    let mut watch = store.watch(Prefix::Snapshots, 1).await.unwrap();
    write(&store, put(&Key::SnapshotPointer, "1")).await;
    write(&store, put(&key("a"), "1")).await;
    let revision = write(&store, put(&Key::Snapshot(1), "1")).await;
    assert_eq!(put_revision(next(&mut watch).await), revision);
}

pub(crate) async fn one_revision_comes_whole_and_in_order(store: Arc<dyn Store>) {
    let keys: Vec<Key> = (0..100).map(|i| key(&format!("{i:03}"))).collect();
    let mut watch = store.watch(Prefix::Rollouts, 1).await.unwrap();
    let all = keys.iter().map(|key| put(key, "1"));
    let revision = store.commit(transaction([], all)).await.unwrap();
    for key in &keys {
        match next(&mut watch).await {
            WatchEvent::Put(entry) => assert_eq!((&entry.key, entry.mod_revision), (key, revision)),
            other => panic!("{other:?}"),
        }
    }
}

/// A watch from before `revision`, which is compacted, starts with everything as it stands and goes on from there.
pub(crate) async fn a_watch_from_lost_history_starts_anew(
    store: Arc<dyn Store>,
    compact: impl AsyncFnOnce(u64),
) {
    let (a, b) = (key("a"), key("b"));
    write(&store, put(&a, "1")).await;
    write(&store, put(&a, "2")).await;
    let revision = write(&store, put(&b, "1")).await;
    compact(revision).await;

    let mut watch = store.watch(Prefix::Rollouts, 1).await.unwrap();
    match next(&mut watch).await {
        WatchEvent::Resync(listing) => {
            assert_eq!(listing.revision, revision);
            assert_eq!(listing, store.list(Prefix::Rollouts).await.unwrap());
        }
        other => panic!("a resync was expected, not {other:?}"),
    }
    let after = write(&store, put(&a, "3")).await;
    assert_eq!(put_revision(next(&mut watch).await), after);
}

fn put_revision(event: WatchEvent) -> u64 {
    match event {
        WatchEvent::Put(entry) => entry.mod_revision,
        other => panic!("a put was expected, not {other:?}"),
    }
}

pub(crate) fn by_key(entries: Vec<Entry>) -> BTreeMap<Key, Entry> {
    entries.into_iter().map(|e| (e.key.clone(), e)).collect()
}
