//! Leases: a key lives as long as its owner says so.

use std::{fmt, future::Future, pin::Pin};

use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::StoreError;

/// Number of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// Ends a lease at once.
pub(crate) type Revoke =
    Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send>> + Send + Sync>;

/// A lease that is kept alive in the background until it is dropped or revoked.
///
/// Dropping it does not revoke it: it runs out after its time, as when the owner dies.
#[must_use = "a lease that is dropped runs out"]
pub struct Lease {
    id: LeaseId,
    lost: CancellationToken,
    keep_alive: AbortHandle,
    revoke: Option<Revoke>,
}

// === impl LeaseId ===

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

// === impl Lease ===

impl Lease {
    pub(crate) fn new(id: LeaseId, lost: CancellationToken, keep_alive: AbortHandle, revoke: Revoke) -> Self {
        Self {
            id,
            lost,
            keep_alive,
            revoke: Some(revoke),
        }
    }

    /// Its number, for [`Operation::Put`](crate::Operation::Put).
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// Completes when the lease has run out or was revoked by somebody else.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Whether it has.
    pub fn is_lost(&self) -> bool {
        self.lost.is_cancelled()
    }

    /// Ends it, and its keys with it.
    ///
    /// # Errors
    /// The store did not answer; the lease then runs out by itself.
    pub async fn revoke(mut self) -> Result<(), StoreError> {
        self.keep_alive.abort();
        match self.revoke.take() {
            Some(revoke) => revoke().await,
            None => Ok(()),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keep_alive.abort();
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("id", &self.id)
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}
