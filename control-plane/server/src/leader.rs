//! Leadership: one control plane at a time writes, under a lease.

use std::{sync::Arc, time::Duration};

use penstock_store::{CommitError, Key, Lease, Operation, Precondition, Store, StoreError, Transaction};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A leader that is gone is replaced after this time.
const LEASE_TTL: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(300);

/// Longest that a caller is kept waiting for an election: a control plane is asked as soon as it listens.
pub(crate) const ELECTION_TIMEOUT: Duration = Duration::from_secs(2);

/// Revision at which this process wrote the leader's key; `None` while it does not lead. Every write of a leader
/// has this as a precondition, so that one that was replaced without noticing changes nothing.
pub(crate) type Leadership = watch::Receiver<Option<u64>>;

/// Whether this control plane speaks to gateways: from the moment when it leads and knows everything that was
/// written before, until it knows that another leads. A store that does not answer ends its leadership, and so
/// every change, but not what it tells gateways from memory.
pub(crate) type Speaking = watch::Receiver<bool>;

/// Runs for leader until `stop`, and again whenever the lease is lost.
pub(crate) async fn campaign(
    store: Arc<dyn Store>,
    address: String,
    leads: watch::Sender<Option<u64>>,
    stop: CancellationToken,
) {
    let mut said = false;
    while !stop.is_cancelled() {
        match attempt(&*store, &address).await {
            Ok(Some((lease, revision))) => {
                tracing::info!(address, "this control plane leads");
                leads.send_replace(Some(revision));
                said = false;
                tokio::select! {
                    () = lease.lost() => tracing::warn!("leadership is lost with its lease"),
                    () = stop.cancelled() => {
                        leads.send_replace(None);
                        // It runs out by itself if the store does not answer.
                        let _ = tokio::time::timeout(Duration::from_secs(2), lease.revoke()).await;
                        return;
                    }
                }
                leads.send_replace(None);
            }
            Ok(None) => said = false,
            // One line per outage.
            Err(error) if !std::mem::replace(&mut said, true) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot run for leader");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = stop.cancelled() => {}
        }
    }
}

/// `None` while another leads.
async fn attempt(store: &dyn Store, address: &str) -> Result<Option<(Lease, u64)>, StoreError> {
    if store.get(&Key::Leader).await?.is_some() {
        return Ok(None);
    }
    let lease = store.grant_lease(LEASE_TTL).await?;
    let transaction = Transaction {
        preconditions: vec![Precondition::Absent(Key::Leader)],
        operations: vec![Operation::Put {
            key: Key::Leader,
            value: address.as_bytes().to_vec().into(),
            lease: Some(lease.id()),
        }],
    };
    match store.commit(transaction).await {
        Ok(revision) => Ok(Some((lease, revision))),
        Err(CommitError::Conflict { .. }) => {
            lease.revoke().await?;
            Ok(None)
        }
        Err(CommitError::Store(error)) => Err(error),
        Err(error) => Err(StoreError::Failed(error.to_string())),
    }
}
