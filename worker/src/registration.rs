//! The worker's entry in the store, kept there under a lease.

use std::{sync::Arc, time::Duration};

use penstock_plan::{PublishedRevision, ServedRevision, WorkerRecord};
use penstock_store::{CommitError, Key, Lease, Operation, Precondition, Store, StoreError, Transaction};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    catalogue::{Catalogue, Served},
    readiness::Readiness,
};

/// Life of the lease without a sign of life: so long a dead worker is listed.
const LEASE_TTL: Duration = Duration::from_secs(10);
/// Time that the store gets for registering or deregistering.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause before another try, drawn from 0 to this much (full jitter), doubling up to the limit.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why a worker cannot be registered, now or ever.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    /// Every revision that it serves is published with another digest.
    #[error("nothing is left to serve: {}", reasons.join("; "))]
    NothingLeft {
        /// Why each revision was refused.
        reasons: Vec<String>,
    },
}

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Fatal(#[from] RegistrationError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error("{0} vanished while it was read")]
    Vanished(Key),
    #[error("{key} cannot be read: {error}")]
    Unreadable { key: String, error: serde_json::Error },
    #[error("the store did not answer within {STORE_TIMEOUT:?}")]
    Timeout,
}

/// Keeps the worker registered.
pub(crate) struct Registration {
    pub(crate) store: Arc<dyn Store>,
    /// Everything but the revisions and the state of draining.
    pub(crate) record: WorkerRecord,
    pub(crate) catalogue: Catalogue,
    pub(crate) readiness: watch::Receiver<Readiness>,
}

impl Registration {
    /// Registers, and registers again whenever the lease is lost, until `stop`; then takes the entry out.
    /// `attempted` is cancelled after the first attempt, whatever came of it: a worker serves without a store.
    pub(crate) async fn run(
        mut self,
        attempted: CancellationToken,
        stop: CancellationToken,
    ) -> Result<(), RegistrationError> {
        let mut pause = FIRST_PAUSE;
        let mut failures = 0_u32;
        while !stop.is_cancelled() {
            let attempt = tokio::select! {
                attempt = tokio::time::timeout(STORE_TIMEOUT, self.register()) => attempt,
                () = stop.cancelled() => break,
            };
            match attempt.unwrap_or(Err(AttemptError::Timeout)) {
                Ok(lease) => {
                    tracing::info!(id = self.record.id, address = self.record.address, "registered");
                    attempted.cancel();
                    (pause, failures) = (FIRST_PAUSE, 0);
                    self.hold(lease, &stop).await;
                }
                Err(AttemptError::Fatal(error)) => return Err(error),
                Err(error) => {
                    tell(&error, failures);
                    failures = failures.saturating_add(1);
                    attempted.cancel();
                    let jittered = pause.mul_f64(rand::random());
                    tokio::select! {
                        () = tokio::time::sleep(jittered) => {}
                        () = stop.cancelled() => break,
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        Ok(())
    }

    /// One attempt: publish what is new, refuse what differs, write the record.
    async fn register(&mut self) -> Result<Lease, AttemptError> {
        let mut reasons = Vec::new();
        for served in self.catalogue.all() {
            if let Some(reason) = self.publish(&served).await? {
                tracing::error!(revision = served.name(), reason, "revision refused");
                self.catalogue.remove(&served.model, &served.revision);
                reasons.push(reason);
            }
        }
        if self.catalogue.all().is_empty() {
            return Err(RegistrationError::NothingLeft { reasons }.into());
        }
        let lease = self.store.grant_lease(LEASE_TTL).await?;
        self.write(&lease).await?;
        Ok(lease)
    }

    /// Makes a revision known, unless it is already. Gives the reason if another checkpoint has its name.
    async fn publish(&self, served: &Served) -> Result<Option<String>, AttemptError> {
        let key = Key::Model {
            model: served.model.clone(),
            revision: served.revision.clone(),
        };
        let value = PublishedRevision {
            model: served.model.clone(),
            revision: served.revision.clone(),
            digest: served.digest.clone(),
            published_ms: crate::now_ms(),
            ..PublishedRevision::default()
        };
        if let Some(published) = self.published(&key).await? {
            return Ok(differs(served, &published));
        }
        let transaction = Transaction {
            preconditions: vec![Precondition::Absent(key.clone())],
            operations: vec![Operation::Put {
                key: key.clone(),
                value: json(&value),
                lease: None,
            }],
        };
        match self.store.commit(transaction).await {
            Ok(_) => {
                tracing::info!(
                    revision = served.name(),
                    digest = served.digest,
                    "revision published"
                );
                Ok(None)
            }
            // Another worker was first: its digest counts.
            Err(CommitError::Conflict { .. }) => {
                let published = self.published(&key).await?.ok_or(AttemptError::Vanished(key))?;
                Ok(differs(served, &published))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn published(&self, key: &Key) -> Result<Option<PublishedRevision>, AttemptError> {
        let Some(entry) = self.store.get(key).await? else {
            return Ok(None);
        };
        serde_json::from_slice(&entry.value)
            .map(Some)
            .map_err(|error| AttemptError::Unreadable {
                key: key.to_string(),
                error,
            })
    }

    /// Writes the record as of now under the lease.
    async fn write(&mut self, lease: &Lease) -> Result<(), AttemptError> {
        let revision = |served: &Arc<Served>| ServedRevision {
            model: served.model.clone(),
            revision: served.revision.clone(),
            digest: served.digest.clone(),
            context_length: u32::try_from(served.engine.context_length()).unwrap_or(u32::MAX),
        };
        self.record.revisions = self.catalogue.all().iter().map(revision).collect();
        self.record.draining = *self.readiness.borrow_and_update() == Readiness::Draining;
        let transaction = Transaction {
            preconditions: Vec::new(),
            operations: vec![Operation::Put {
                key: Key::Worker(self.record.id.clone()),
                value: json(&self.record),
                lease: Some(lease.id()),
            }],
        };
        self.store.commit(transaction).await?;
        Ok(())
    }

    /// Returns when the lease is lost, or, with the entry taken out, at `stop`.
    async fn hold(&mut self, lease: Lease, stop: &CancellationToken) {
        loop {
            tokio::select! {
                () = lease.lost() => {
                    tracing::warn!(id = self.record.id, "the lease is lost; registering again");
                    return;
                }
                () = stop.cancelled() => break,
                changed = self.readiness.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    // Told to drain through the operations port: the list says so, gateways go elsewhere.
                    let written = tokio::time::timeout(STORE_TIMEOUT, self.write(&lease)).await;
                    if let Err(error) = written.unwrap_or(Err(AttemptError::Timeout)) {
                        tracing::warn!(error = &error as &dyn std::error::Error, "cannot tell of draining");
                    }
                }
            }
        }
        match tokio::time::timeout(STORE_TIMEOUT, lease.revoke()).await {
            Ok(Ok(())) => tracing::info!(id = self.record.id, "deregistered"),
            Ok(Err(error)) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot deregister; the entry leaves with its lease"
            ),
            Err(_) => tracing::warn!("cannot deregister in time; the entry leaves with its lease"),
        }
    }
}

/// A store that is down is told of once, not at every try.
fn tell(error: &AttemptError, failures: u32) {
    let error: &dyn std::error::Error = error;
    match failures {
        0 => tracing::warn!(error, "cannot register; serving on and trying again"),
        _ => tracing::debug!(error, failures, "still cannot register"),
    }
}

fn differs(served: &Served, published: &PublishedRevision) -> Option<String> {
    (published.digest != served.digest).then(|| {
        format!(
            "{} is published with digest {}, this checkpoint has {}: give it another revision name",
            served.name(),
            published.digest,
            served.digest
        )
    })
}

fn json(value: &impl serde::Serialize) -> bytes::Bytes {
    serde_json::to_vec(value)
        .expect("records are plain data with string keys")
        .into()
}
