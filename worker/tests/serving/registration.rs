//! The worker's entry in the store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use penstock_plan::{PublishedRevision, WorkerRecord};
use penstock_store::{
    CommitError, Entry, Key, Lease, Listing, Operation, Prefix, Store, StoreError, Transaction, WatchStream,
};
use worker::{Config, Readiness, RunError};

use crate::harness::{Running, config, eventually, generate, http, prompt, start, store, tokens, with};

async fn record(store: &Arc<dyn Store>, running: &Running) -> Option<WorkerRecord> {
    let key = Key::Worker(running.addresses.listen.to_string());
    let entry = store.get(&key).await.unwrap()?;
    assert!(entry.lease.is_some(), "the entry outlives its worker");
    Some(serde_json::from_slice(&entry.value).unwrap())
}

async fn publish(store: &Arc<dyn Store>, revision: &str, digest: &str) {
    let published = PublishedRevision {
        model: "demo".into(),
        revision: revision.into(),
        digest: digest.into(),
        published_ms: 1,
        ..PublishedRevision::default()
    };
    let put = Operation::Put {
        key: Key::Model {
            model: "demo".into(),
            revision: revision.into(),
        },
        value: serde_json::to_vec(&published).unwrap().into(),
        lease: None,
    };
    store
        .commit(Transaction {
            preconditions: vec![],
            operations: vec![put],
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_worker_that_serves_is_registered_and_leaves_before_it_ends() {
    let store = store();
    let running = start(config(store.clone(), &["demo@v1", "demo@v2"], Duration::ZERO)).await;
    let registered = record(&store, &running).await.unwrap();
    assert_eq!(registered.address, running.addresses.listen.to_string());
    assert_eq!(registered.ops_address, running.addresses.ops.to_string());
    assert_eq!(registered.runner, "fake");
    let names: Vec<&str> = registered
        .revisions
        .iter()
        .map(|revision| revision.revision.as_str())
        .collect();
    assert_eq!(names, ["v1", "v2"]);
    for revision in &registered.revisions {
        let key = Key::Model {
            model: "demo".into(),
            revision: revision.revision.clone(),
        };
        let entry = store.get(&key).await.unwrap().unwrap();
        let published: PublishedRevision = serde_json::from_slice(&entry.value).unwrap();
        assert_eq!(published.digest, revision.digest);
        assert!(entry.lease.is_none(), "what was published stays");
    }
    running.shutdown.cancel();
    running.ended.await.unwrap().unwrap();
    assert_eq!(
        store
            .get(&Key::Worker(running.addresses.listen.to_string()))
            .await
            .unwrap(),
        None
    );
}

#[tokio::test]
async fn draining_is_told_in_the_record() {
    let store = store();
    let running = start(config(store.clone(), &["demo@v1"], Duration::ZERO)).await;
    http(running.addresses.ops, "POST", "/drain").await;
    eventually("the record says so", || async {
        record(&store, &running)
            .await
            .is_some_and(|record| record.draining)
    })
    .await;
}

#[tokio::test]
async fn a_revision_with_another_digest_is_refused_and_the_others_serve() {
    let store = store();
    publish(&store, "v1", "ff").await;
    let mut running = start(config(store.clone(), &["demo@v1", "demo@v2"], Duration::ZERO)).await;
    let registered = record(&store, &running).await.unwrap();
    assert_eq!(registered.revisions.len(), 1);
    assert_eq!(registered.revisions[0].revision, "v2");
    let refused = with(prompt("x", tokens(1)), &[("x-model-version", "v1")]);
    let status = generate(&mut running.client, refused).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
}

#[tokio::test]
async fn a_worker_with_nothing_left_to_serve_ends_with_the_reason() {
    let store = store();
    publish(&store, "v1", "ff").await;
    let server = config(store, &["demo@v1"], Duration::ZERO).build().await.unwrap();
    let error = server.run(Default::default()).await.unwrap_err();
    assert!(matches!(error, RunError::Registration(_)), "{error}");
    assert!(
        error.to_string().contains("demo@v1 is published with digest ff"),
        "{error}"
    );
}

/// A store that can be switched off.
#[derive(Debug)]
struct Switched {
    inner: Arc<dyn Store>,
    down: AtomicBool,
}

impl Switched {
    fn up(&self) -> Result<&dyn Store, StoreError> {
        match self.down.load(Ordering::SeqCst) {
            true => Err(StoreError::Unavailable("switched off".into())),
            false => Ok(&*self.inner),
        }
    }
}

#[async_trait::async_trait]
impl Store for Switched {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.up()?.get(key).await
    }
    async fn list(&self, prefix: Prefix) -> Result<Listing, StoreError> {
        self.up()?.list(prefix).await
    }
    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        self.up()?.commit(transaction).await
    }
    async fn watch(&self, prefix: Prefix, from_revision: u64) -> Result<WatchStream, StoreError> {
        self.up()?.watch(prefix, from_revision).await
    }
    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.up()?.grant_lease(ttl).await
    }
    async fn health(&self) -> Result<(), StoreError> {
        self.up()?.health().await
    }
}

#[tokio::test]
async fn a_worker_serves_without_a_store_and_registers_when_it_is_back() {
    let switched = Arc::new(Switched {
        inner: store(),
        down: AtomicBool::new(true),
    });
    let mut running = start(config(switched.clone(), &["demo@v1"], Duration::ZERO)).await;
    let reply = generate(&mut running.client, with(prompt("x", tokens(3)), &[]))
        .await
        .unwrap();
    assert_eq!(reply.ids().len(), 3);
    assert!(record(&switched.inner, &running).await.is_none());
    switched.down.store(false, Ordering::SeqCst);
    eventually("it is registered", || async {
        record(&switched.inner, &running).await.is_some()
    })
    .await;
    // Down again at the end: the worker ends all the same, its entry leaves with the lease.
    switched.down.store(true, Ordering::SeqCst);
    running.shutdown.cancel();
    running.ended.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_worker_whose_engine_stands_still_leaves_rotation_until_it_goes_on() {
    let store = store();
    let slow = Config {
        watchdog_timeout: Duration::from_millis(200),
        ..config(store.clone(), &["demo@v1"], Duration::from_millis(2500))
    };
    let mut running = start(slow).await;
    let mut client = running.client.clone();
    let reply =
        tokio::spawn(async move { generate(&mut client, with(prompt("Hello", tokens(1)), &[])).await });
    let draining = |wanted| {
        let (store, running) = (&store, &running);
        move || async move { record(store, running).await.unwrap().draining == wanted }
    };
    eventually("it leaves", draining(true)).await;
    let (code, why) = http(running.addresses.listen, "GET", "/readyz").await;
    assert_eq!(code, 503);
    assert!(why.contains("demo@v1 completes no step"), "{why}");
    assert_eq!(reply.await.unwrap().unwrap().ids().len(), 1);
    eventually("it is back", draining(false)).await;
    running
        .readiness
        .wait_for(|state| *state == Readiness::Serving)
        .await
        .unwrap();
}
