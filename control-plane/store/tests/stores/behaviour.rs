//! Reads and transactions.

use std::sync::Arc;

use penstock_store::{CommitError, Key, Operation, Precondition, Prefix, Store, StoreError};

use crate::support::{conflict, get, key, put, transaction, write};

pub(crate) async fn a_conflict_names_its_key(store: Arc<dyn Store>) {
    let (a, b, c) = (key("a"), key("b"), key("c"));
    let first = write(&store, put(&a, "1")).await;
    let second = write(&store, put(&b, "1")).await;

    let absent = [
        Precondition::ModRevision(a.clone(), first),
        Precondition::Absent(b.clone()),
    ];
    let result = store.commit(transaction(absent, [put(&a, "2")])).await;
    assert_eq!(conflict(result), b);

    let exists = [
        Precondition::Exists(a.clone()),
        Precondition::Absent(c.clone()),
        Precondition::Exists(c.clone()),
    ];
    let result = store.commit(transaction(exists, [put(&a, "2")])).await;
    assert_eq!(conflict(result), c);

    let stale = [
        Precondition::ModRevision(b.clone(), second),
        Precondition::ModRevision(a.clone(), second),
    ];
    let result = store.commit(transaction(stale, [put(&b, "2")])).await;
    assert_eq!(conflict(result), a);

    let good = [
        Precondition::ModRevision(a.clone(), first),
        Precondition::Exists(b.clone()),
        Precondition::Absent(c.clone()),
    ];
    let third = store.commit(transaction(good, [put(&c, "1")])).await.unwrap();
    assert!(third > second);
}

pub(crate) async fn a_revision_of_zero_is_no_absence(store: Arc<dyn Store>) {
    let a = key("a");
    let zero = [Precondition::ModRevision(a.clone(), 0)];
    let result = store.commit(transaction(zero, [put(&a, "1")])).await;
    assert_eq!(conflict(result), a);
    assert_eq!(get(&store, &a).await, None);
}

pub(crate) async fn a_transaction_is_all_or_nothing(store: Arc<dyn Store>) {
    let (a, b, c) = (key("a"), key("b"), key("c"));
    write(&store, put(&c, "old")).await;

    let operations = [put(&a, "1"), put(&b, "1"), Operation::Delete(c.clone())];
    let refused = [Precondition::Absent(c.clone())];
    conflict(store.commit(transaction(refused, operations.clone())).await);
    assert_eq!(get(&store, &a).await, None);
    assert_eq!(get(&store, &b).await, None);
    assert!(get(&store, &c).await.is_some());

    let revision = store.commit(transaction([], operations)).await.unwrap();
    assert_eq!(get(&store, &a).await.unwrap().mod_revision, revision);
    assert_eq!(get(&store, &b).await.unwrap().mod_revision, revision);
    assert_eq!(get(&store, &c).await, None);
}

pub(crate) async fn a_key_is_changed_once_per_transaction(store: Arc<dyn Store>) {
    let a = key("a");
    let twice = transaction([], [put(&a, "1"), Operation::Delete(a.clone())]);
    let result = store.commit(twice).await;
    assert!(
        matches!(&result, Err(CommitError::Store(StoreError::Failed(reason))) if reason.contains("/penstock/rollouts/a")),
        "{result:?}"
    );
    assert_eq!(get(&store, &a).await, None);
}

pub(crate) async fn nothing_changed_is_no_revision(store: Arc<dyn Store>) {
    let before = write(&store, put(&key("a"), "1")).await;
    let nothing = transaction([], [Operation::Delete(key("absent"))]);
    assert_eq!(store.commit(nothing).await.unwrap(), before);
    assert_eq!(store.list(Prefix::All).await.unwrap().revision, before);
}

pub(crate) async fn revisions_tell_creation_from_change(store: Arc<dyn Store>) {
    let a = key("a");
    let created = write(&store, put(&a, "1")).await;
    let changed = write(&store, put(&a, "2")).await;
    let entry = get(&store, &a).await.unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision), (created, changed));
    assert_eq!((entry.value.as_ref(), entry.lease), (b"2".as_slice(), None));

    write(&store, Operation::Delete(a.clone())).await;
    let again = write(&store, put(&a, "3")).await;
    let entry = get(&store, &a).await.unwrap();
    assert_eq!((entry.create_revision, entry.mod_revision), (again, again));
    assert!(created < changed && changed < again);
}

pub(crate) async fn increments_by_compare_and_swap_lose_nothing(store: Arc<dyn Store>) {
    const TASKS: usize = 8;
    const EACH: usize = 10;
    let counter = key("counter");
    write(&store, put(&counter, "0")).await;
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (store, counter) = (store.clone(), counter.clone());
            tokio::spawn(async move {
                for _ in 0..EACH {
                    increment(&store, &counter).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let value = get(&store, &counter).await.unwrap().value;
    assert_eq!(value.as_ref(), (TASKS * EACH).to_string().as_bytes());
}

/// Tries until nobody came between.
async fn increment(store: &Arc<dyn Store>, counter: &Key) {
    loop {
        let entry = get(store, counter).await.unwrap();
        let value: usize = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
        let unchanged = [Precondition::ModRevision(counter.clone(), entry.mod_revision)];
        let next = [put(counter, (value + 1).to_string())];
        match store.commit(transaction(unchanged, next)).await {
            Ok(_) => return,
            Err(CommitError::Conflict { key }) => assert_eq!(key, *counter),
            Err(error) => panic!("{error}"),
        }
    }
}

pub(crate) async fn prefixes_are_apart(store: Arc<dyn Store>) {
    let keys = [
        Key::Leader,
        Key::Rollout("m/1".into()),
        Key::SnapshotPointer,
        Key::Snapshot(9),
        Key::Snapshot(10),
        Key::Worker("w".into()),
    ];
    for key in &keys {
        write(&store, put(key, key.to_string())).await;
    }
    let listed = async |prefix| {
        let listing = store.list(prefix).await.unwrap();
        listing.entries.into_iter().map(|e| e.key).collect::<Vec<_>>()
    };
    assert_eq!(
        listed(Prefix::Snapshots).await,
        [Key::Snapshot(9), Key::Snapshot(10)]
    );
    assert_eq!(listed(Prefix::Rollouts).await, [Key::Rollout("m/1".into())]);
    assert_eq!(listed(Prefix::Workers).await, [Key::Worker("w".into())]);
    assert_eq!(listed(Prefix::Models).await, []);
    let mut all: Vec<String> = keys.iter().map(Key::to_string).collect();
    all.sort();
    let texts: Vec<String> = listed(Prefix::All).await.iter().map(Key::to_string).collect();
    assert_eq!(texts, all);
}
