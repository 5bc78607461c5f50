//! A store that stops answering.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use penstock_client::AdminError;
use penstock_store::{
    CommitError, Entry, Key, Lease, Listing, Prefix, Store, StoreError, Transaction, WatchStream,
    embedded::EmbeddedStore,
};

use crate::harness::Running;

/// Answers nothing while it is down.
#[derive(Debug)]
struct Unreliable {
    inner: EmbeddedStore,
    down: AtomicBool,
}

impl Unreliable {
    fn answers(&self) -> Result<(), StoreError> {
        match self.down.load(Ordering::Acquire) {
            true => Err(StoreError::Unavailable("pulled the plug".into())),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Store for Unreliable {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.answers()?;
        self.inner.get(key).await
    }

    async fn list(&self, prefix: Prefix) -> Result<Listing, StoreError> {
        self.answers()?;
        self.inner.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        self.answers()?;
        self.inner.commit(transaction).await
    }

    async fn watch(&self, prefix: Prefix, from_revision: u64) -> Result<WatchStream, StoreError> {
        self.answers()?;
        self.inner.watch(prefix, from_revision).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.answers()?;
        self.inner.grant_lease(ttl).await
    }

    async fn health(&self) -> Result<(), StoreError> {
        self.answers()
    }
}

#[tokio::test]
async fn without_its_store_a_control_plane_reads_and_pushes_but_changes_nothing() {
    let store = Arc::new(Unreliable {
        inner: EmbeddedStore::in_memory(),
        down: AtomicBool::new(false),
    });
    let running = Running::fresh(store.clone()).await;
    let mut gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.set(50_000, None).await.unwrap();
    gateway.has_share(50_000).await;

    store.down.store(true, Ordering::Release);
    match running.set(60_000, None).await {
        Err(AdminError::Unavailable { message, .. }) => {
            assert!(message.contains("pulled the plug"), "{message}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(running.status().await.rollout.unwrap().canary_ppm, 50_000);
    assert!(gateway.view.borrow().connected);
    let mut late = running.gateway("g2");
    late.has_share(50_000).await;

    store.down.store(false, Ordering::Release);
    running.set(60_000, None).await.unwrap();
    gateway.has_share(60_000).await;
    late.has_share(60_000).await;
}
