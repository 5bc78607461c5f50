//! The worker's entry in the store, kept there under a lease.

use std::{sync::Arc, time::Duration};

use penstock_plan::{PublishedRevision, ServedRevision, WorkerRecord};
use penstock_store::{CommitError, Key, Lease, Operation, Precondition, Store, StoreError, Transaction};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    catalogue::{Catalogue, Served},
    placement::{Board, RevisionName},
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
    /// Every revision that its command line names is published with another digest.
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
    #[error("{0} changed while it was read")]
    Changed(Key),
    #[error("{key} cannot be read: {error}")]
    Unreadable { key: String, error: serde_json::Error },
    #[error("the store did not answer within {STORE_TIMEOUT:?}")]
    Timeout,
}

/// Keeps the worker registered.
pub(crate) struct Registration {
    pub(crate) store: Arc<dyn Store>,
    /// Everything but the revisions, the device and the state of draining.
    pub(crate) record: WorkerRecord,
    pub(crate) catalogue: Catalogue,
    /// Is told what is refused.
    pub(crate) board: Board,
    /// What the command line names: a worker all of which is refused is a mistake of its operator's.
    pub(crate) own: Vec<RevisionName>,
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
        let mut changes = self.catalogue.changes();
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
                    if self.hold(&lease, &mut changes, &stop).await {
                        self.deregister(lease).await;
                        break;
                    }
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
        self.publish_all().await?;
        let lease = self.store.grant_lease(LEASE_TTL).await?;
        self.write(&lease).await?;
        Ok(lease)
    }

    /// Publishes what is new and takes out of the catalogue what differs from what is published.
    async fn publish_all(&self) -> Result<(), AttemptError> {
        let mut reasons = Vec::new();
        for served in self.catalogue.all() {
            let Some(reason) = self.publish(&served).await? else {
                continue;
            };
            let name = RevisionName::from(&*served);
            self.board.failed(&name, reason.clone());
            self.catalogue.remove(&served.model, &served.revision);
            if self.own.contains(&name) {
                reasons.push(reason);
            }
        }
        if !reasons.is_empty() && self.catalogue.is_empty() {
            return Err(RegistrationError::NothingLeft { reasons }.into());
        }
        Ok(())
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
        let (precondition, value) = match self.published(&key).await? {
            None => (Precondition::Absent(key.clone()), value),
            // An operator published it and left the digest to the first worker that has the checkpoint.
            Some((published, revision)) if published.digest.is_empty() => {
                let value = PublishedRevision {
                    digest: served.digest.clone(),
                    ..published
                };
                (Precondition::ModRevision(key.clone(), revision), value)
            }
            Some((published, _)) => return Ok(differs(served, &published)),
        };
        let transaction = Transaction {
            preconditions: vec![precondition],
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
            // Somebody else was first: the digest that is there counts. Where there is still none, as after
            // another change by an operator, the next attempt writes it.
            Err(CommitError::Conflict { .. }) => match self.published(&key).await? {
                Some((published, _)) if !published.digest.is_empty() => Ok(differs(served, &published)),
                _ => Err(AttemptError::Changed(key)),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// What is published under a key, and the store's revision of it.
    async fn published(&self, key: &Key) -> Result<Option<(PublishedRevision, u64)>, AttemptError> {
        let Some(entry) = self.store.get(key).await? else {
            return Ok(None);
        };
        serde_json::from_slice(&entry.value)
            .map(|published| Some((published, entry.mod_revision)))
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
        let all = self.catalogue.all();
        self.record.revisions = all.iter().map(revision).collect();
        if let Some(first) = all.first() {
            self.record.device.clone_from(&first.engine.runner().device);
        }
        // Who makes no progress gets nothing new until it does.
        self.record.draining = matches!(
            *self.readiness.borrow_and_update(),
            Readiness::Draining | Readiness::Stalled(_)
        );
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

    /// Keeps the record up to date until `stop`, then true; false when the lease is lost or the record cannot be
    /// written under it, so that the worker has to register again.
    async fn hold(
        &mut self,
        lease: &Lease,
        changes: &mut watch::Receiver<u64>,
        stop: &CancellationToken,
    ) -> bool {
        let mut failures = 0;
        loop {
            tokio::select! {
                () = lease.lost() => {
                    tracing::warn!(id = self.record.id, "the lease is lost; registering again");
                    return false;
                }
                () = stop.cancelled() => return true,
                // Revisions came or went.
                Ok(()) = changes.changed() => {}
                // Told to drain through the operations port, for one: gateways go elsewhere.
                Ok(()) = self.readiness.changed() => {}
            }
            let written = tokio::time::timeout(STORE_TIMEOUT, self.rewrite(lease)).await;
            let Err(error) = written.unwrap_or(Err(AttemptError::Timeout)) else {
                failures = 0;
                continue;
            };
            tell(&error, failures);
            failures += 1;
            // The record must not outlive what it says by more than a moment.
            tokio::select! {
                () = tokio::time::sleep(FIRST_PAUSE) => changes.mark_changed(),
                () = stop.cancelled() => return true,
            }
        }
    }

    async fn rewrite(&mut self, lease: &Lease) -> Result<(), AttemptError> {
        match self.publish_all().await {
            // A revision that was placed and refused is out of the catalogue; nobody is to end for it.
            Ok(()) | Err(AttemptError::Fatal(_)) => self.write(lease).await,
            Err(error) => Err(error),
        }
    }

    async fn deregister(&self, lease: Lease) {
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
