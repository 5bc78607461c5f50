//! A store that need not be there when the worker starts.

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use penstock_store::{
    CommitError, Entry, Key, Lease, Listing, Prefix, Store, StoreError, Transaction, WatchStream,
};
use tokio::sync::OnceCell;

/// Connects to a store.
pub type ConnectFn =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Arc<dyn Store>, StoreError>> + Send>> + Send + Sync>;

/// Connects at the first call that succeeds in it; until then every call fails and can be made again. A worker
/// serves without a store, so it has no reason to end where there is none yet.
pub struct LateStore {
    connect: ConnectFn,
    connected: OnceCell<Arc<dyn Store>>,
}

// === impl LateStore ===

impl LateStore {
    /// A store that `connect` will reach.
    pub fn new(connect: ConnectFn) -> Self {
        Self {
            connect,
            connected: OnceCell::new(),
        }
    }

    async fn store(&self) -> Result<&dyn Store, StoreError> {
        let store = self.connected.get_or_try_init(|| (self.connect)()).await?;
        Ok(&**store)
    }
}

impl fmt::Debug for LateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = self.connected.get();
        f.debug_struct("LateStore")
            .field("connected", &connected)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for LateStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.store().await?.get(key).await
    }

    async fn list(&self, prefix: Prefix) -> Result<Listing, StoreError> {
        self.store().await?.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        self.store().await?.commit(transaction).await
    }

    async fn watch(&self, prefix: Prefix, from_revision: u64) -> Result<WatchStream, StoreError> {
        self.store().await?.watch(prefix, from_revision).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.store().await?.grant_lease(ttl).await
    }

    async fn health(&self) -> Result<(), StoreError> {
        self.store().await?.health().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use penstock_store::embedded::EmbeddedStore;

    use super::*;

    #[tokio::test]
    async fn calls_fail_until_the_store_is_there_and_reach_it_from_then_on() {
        let attempts = Arc::new(AtomicU32::new(0));
        let count = attempts.clone();
        let late = LateStore::new(Box::new(move || {
            let attempt = count.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                if attempt == 0 {
                    return Err(StoreError::Unavailable("not yet".into()));
                }
                let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
                Ok(store)
            })
        }));
        assert!(late.health().await.unwrap_err().is_retryable());
        late.health().await.unwrap();
        assert_eq!(late.get(&Key::Leader).await.unwrap(), None);
        assert_eq!(attempts.load(Ordering::Relaxed), 2);
    }
}
