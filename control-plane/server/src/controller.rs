//! The reconcile loop: keeps the world up to date, publishes snapshots and takes the next phase.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_plan::{
    Phase, Rollout, Snapshot,
    planner::{self, Decision, Inventory},
};
use penstock_store::{CommitError, Key, Operation, Precondition, Prefix, Store, StoreError, Transaction};
use penstock_telemetry::instruments::ControlPlaneMetrics;
use tokio::sync::watch;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::{
    audit::{self, Record},
    gateways::Gateways,
    leader::Leadership,
    notify::Notifier,
    now_ms,
    observed::Observed,
    world::{State, Stored, World},
};

/// Liveness changes by silence alone, so somebody has to look.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What gateways say within this time is looked at together.
pub(crate) const GATHER: Duration = Duration::from_millis(5);
/// Counts are written down this often, for whoever leads next.
const SAVE_EVERY: Duration = Duration::from_secs(5);
/// Pause after the store did not answer.
const RETRY: Duration = Duration::from_millis(300);
/// Snapshots kept for people who look back.
const KEPT_EPOCHS: usize = 64;

/// Everything that reconciling needs.
pub(crate) struct Controller {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) world: Arc<World>,
    pub(crate) gateways: Arc<Gateways>,
    pub(crate) observed: Arc<Observed>,
    pub(crate) leadership: Leadership,
    pub(crate) speaks: watch::Sender<bool>,
    /// Revision at which this process last became the leader.
    pub(crate) last_term: Option<u64>,
    /// When counts were last written down.
    pub(crate) saved: Instant,
    pub(crate) notifier: Notifier,
    pub(crate) metrics: ControlPlaneMetrics,
}

/// Why a write of the controller did not happen.
type Outcome = Result<(), CommitError>;

// === impl Controller ===

impl Controller {
    /// Follows the store until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut said = false;
        while !stop.is_cancelled() {
            tokio::select! {
                () = stop.cancelled() => return,
                result = self.follow() => match result {
                    Ok(()) => said = false,
                    Err(error) if !std::mem::replace(&mut said, true) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "the store does not answer; serving from memory");
                    }
                    Err(_) => {}
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Lists, then watches; returns when the watch ends.
    async fn follow(&mut self) -> Result<(), StoreError> {
        let listing = self.store.list(Prefix::All).await?;
        let from = listing.revision + 1;
        self.world.load(listing);
        self.restore();
        let mut events = self.store.watch(Prefix::All, from).await?;
        let mut changes = self.world.changes();
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            self.stand();
            self.reconcile().await;
            tokio::select! {
                event = events.next() => match event {
                    Some(event) => self.world.apply(event),
                    None => return Ok(()),
                },
                // Acknowledgements come this way, by the thousand: those of a moment are looked at together.
                _ = changes.changed() => tokio::time::sleep(GATHER).await,
                _ = self.leadership.changed() => {}
                _ = look.tick() => {}
            }
            // Whatever came together is reconciled together.
            while let Some(Some(event)) = futures_util::FutureExt::now_or_never(events.next()) {
                self.world.apply(event);
            }
            changes.mark_unchanged();
        }
    }

    /// Decides whether this control plane speaks to gateways.
    fn stand(&mut self) {
        let term = *self.leadership.borrow();
        self.last_term = term.or(self.last_term);
        let (known, leader) = {
            let state = self.world.state();
            (
                state.revision,
                state.leader.as_ref().map(|leader| leader.mod_revision),
            )
        };
        let replaced = leader.is_some_and(|leader| self.last_term.is_none_or(|last| leader > last));
        // Whatever earlier leaders wrote lies before this term, so that no epoch of theirs is taken for a stranger's.
        let leads = term.is_some_and(|term| known >= term);
        let spoke = *self.speaks.borrow();
        if spoke && replaced {
            tracing::info!("another control plane leads; gateways are sent there");
            self.speaks.send_replace(false);
        } else if !spoke && leads && !replaced {
            self.gateways.listen(now_ms());
            self.speaks.send_replace(true);
        }
    }

    /// Takes up what another leader had counted; of each gateway's boot the newer report counts.
    fn restore(&self) {
        let ledgers: Vec<_> = {
            let state = self.world.state();
            state
                .observations
                .values()
                .map(|stored| stored.value.clone())
                .collect()
        };
        ledgers
            .into_iter()
            .for_each(|ledger| self.observed.restore(ledger));
    }

    async fn reconcile(&mut self) {
        self.measure();
        let Some(term) = *self.leadership.borrow() else {
            return;
        };
        if let Err(error) = self.publish(term).await {
            log("publish a snapshot", &error);
            return;
        }
        let rollouts: Vec<Stored<Rollout>> = self.world.state().rollouts.values().cloned().collect();
        for rollout in rollouts {
            self.observed.point(&rollout.value, now_ms());
            self.notifier.look(&rollout.value);
            if let Err(error) = self.advance(term, rollout).await {
                log("take the next phase", &error);
            }
        }
        if self.saved.elapsed() >= SAVE_EVERY {
            self.saved = Instant::now();
            self.save(term).await;
        }
        self.audit_overrides(term).await;
    }

    /// Writes counts down, so that a control plane that takes over judges on.
    async fn save(&self, term: u64) {
        let rollouts: Vec<Rollout> = {
            let state = self.world.state();
            state
                .rollouts
                .values()
                .map(|stored| stored.value.clone())
                .collect()
        };
        for rollout in rollouts {
            let Some(ledger) = self.observed.unsaved(&rollout) else {
                continue;
            };
            let value = serde_json::to_vec(&ledger).expect("counts are plain data with string keys");
            let transaction = Transaction {
                preconditions: vec![fence(term)],
                operations: vec![Operation::Put {
                    key: Key::Observations(rollout.model.clone()),
                    value: value.into(),
                    lease: None,
                }],
            };
            if let Err(error) = self.store.commit(transaction).await {
                self.observed.still_unsaved(&rollout.model);
                log("write counts down", &error);
            }
        }
    }

    /// Records what operators did to gateways directly while no control plane could be asked.
    async fn audit_overrides(&self, term: u64) {
        for (gateway, record) in self.observed.overrides() {
            let operation = audit::override_record(&gateway, &record);
            let key = operation.key().clone();
            let transaction = Transaction {
                preconditions: vec![fence(term), Precondition::Absent(key)],
                operations: vec![operation],
            };
            match self.store.commit(transaction).await {
                // Written already, by this leader or by one before it.
                Ok(_)
                | Err(CommitError::Conflict {
                    key: Key::Audit { .. },
                }) => {}
                Err(error) => {
                    self.observed.override_again((gateway, record));
                    log("audit an override", &error);
                }
            }
        }
    }

    /// Writes the next snapshot if routes have changed.
    async fn publish(&self, term: u64) -> Outcome {
        let (snapshot, pointer, old) = {
            let state = self.world.state();
            let routes = state.wanted_routes();
            let newest = state.newest_snapshot();
            let (epoch, floor) = (newest.map_or(0, |newest| newest.epoch), self.world.floor());
            let same = newest.map_or(routes.is_empty(), |newest| newest.routes == routes);
            if same && epoch >= floor.saturating_add(u64::from(floor > 0)) {
                return Ok(());
            }
            let epoch = epoch.max(floor) + 1;
            (
                Snapshot { epoch, routes },
                state.pointer_revision,
                stale_epochs(&state),
            )
        };
        if let Err(error) = snapshot.validate() {
            tracing::error!(%error, "the next snapshot is not valid; gateways keep the last one");
            return Ok(());
        }
        let pointer = match pointer {
            Some(revision) => Precondition::ModRevision(Key::SnapshotPointer, revision),
            None => Precondition::Absent(Key::SnapshotPointer),
        };
        let value = serde_json::to_vec(&snapshot).expect("a snapshot is plain data with string keys");
        let mut operations = vec![
            Operation::Put {
                key: Key::Snapshot(snapshot.epoch),
                value: value.into(),
                lease: None,
            },
            Operation::Put {
                key: Key::SnapshotPointer,
                value: snapshot.epoch.to_string().into_bytes().into(),
                lease: None,
            },
        ];
        operations.extend(
            old.into_iter()
                .map(|epoch| Operation::Delete(Key::Snapshot(epoch))),
        );
        let revision = self
            .store
            .commit(Transaction {
                preconditions: vec![fence(term), pointer],
                operations,
            })
            .await?;
        tracing::info!(epoch = snapshot.epoch, revision, "snapshot published");
        Ok(())
    }

    /// Writes what the planner decides.
    async fn advance(&self, term: u64, rollout: Stored<Rollout>) -> Outcome {
        let inventory = self.inventory(&rollout.value);
        let observations = self.observed.of(&rollout.value);
        let Decision::Write(next) = planner::decide(&rollout.value, &inventory, &observations, now_ms())
        else {
            return Ok(());
        };
        let (model, from, to) = (next.model.clone(), rollout.value.phase, next.phase);
        let record = Record {
            operation: "controller",
            before: Some(&rollout.value),
            after: &next,
        };
        let transaction = Transaction {
            preconditions: vec![
                fence(term),
                Precondition::ModRevision(Key::Rollout(model.clone()), rollout.mod_revision),
            ],
            operations: vec![put_rollout(&next), record.operation(now_ms())],
        };
        self.store.commit(transaction).await?;
        if matches!(from, Phase::Converging | Phase::Aborting | Phase::Promoting) {
            let since = now_ms().saturating_sub(rollout.value.updated_ms);
            self.metrics.converged(Duration::from_millis(since));
        }
        tracing::info!(model, %from, %to, "the rollout goes on");
        Ok(())
    }

    fn inventory(&self, rollout: &Rollout) -> Inventory {
        inventory(&self.world.state(), &self.gateways, &self.observed, rollout)
    }

    fn measure(&self) {
        let state = self.world.state();
        let epoch = state.newest_snapshot().map_or(0, |snapshot| snapshot.epoch);
        let views = self.gateways.views();
        let live: Vec<_> = views.iter().filter(|view| view.live).collect();
        self.metrics.published(epoch);
        self.metrics.gateways(
            live.len(),
            live.iter()
                .filter(|view| view.acknowledged_epoch >= epoch)
                .count(),
        );
        self.metrics.workers(state.workers.len());
        self.metrics.leader(self.leadership.borrow().is_some());
        for (model, rollout) in &state.rollouts {
            self.metrics.canary_share(model, rollout.value.share.get());
        }
    }
}

/// What the planner is told about a rollout's surroundings.
pub(crate) fn inventory(
    state: &State,
    gateways: &Gateways,
    observed: &Observed,
    rollout: &Rollout,
) -> Inventory {
    let ready = state.endpoints_of(&rollout.model, &rollout.canary);
    Inventory {
        canary_ready: u32::try_from(ready).unwrap_or(u32::MAX),
        not_ready: observed.not_ready(&rollout.model, &rollout.canary),
        old_in_flight: observed.in_flight(&rollout.model, &rollout.stable, now_ms()),
        ..gateways.inventory(state.published_epoch(rollout))
    }
}

/// The precondition of every write: whoever wrote the leader's key at this revision still leads.
pub(crate) fn fence(term: u64) -> Precondition {
    Precondition::ModRevision(Key::Leader, term)
}

/// The write of a plan.
pub(crate) fn put_rollout(rollout: &Rollout) -> Operation {
    let value = serde_json::to_vec(rollout).expect("a rollout is plain data with string keys");
    Operation::Put {
        key: Key::Rollout(rollout.model.clone()),
        value: value.into(),
        lease: None,
    }
}

fn stale_epochs(state: &State) -> Vec<u64> {
    let epochs: Vec<u64> = state.epochs().collect();
    let stale = (epochs.len() + 1).saturating_sub(KEPT_EPOCHS);
    epochs[..stale].to_vec()
}

/// A lost race is everyday: the watch brings what won, and the loop looks again.
fn log(what: &str, error: &CommitError) {
    match error {
        CommitError::Conflict { key } => tracing::debug!(%key, what, "somebody else was first"),
        error => tracing::warn!(
            error = error as &dyn std::error::Error,
            "cannot {what}; trying again"
        ),
    }
}
