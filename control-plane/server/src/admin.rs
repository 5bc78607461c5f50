//! The Admin service: every change is one compare-and-swap together with its audit record.

use std::{sync::Arc, time::Duration};

use penstock_plan::{Change, CreateRollout, Manifest, Ppm, Rollout, RolloutError, Sticky};
use penstock_proto::{convert, v1};
use penstock_store::{CommitError, Key, Precondition, Store, StoreError, Transaction};
use penstock_telemetry::{instruments::ControlPlaneMetrics, propagation};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Response, Status, metadata::MetadataMap};
use tracing::Instrument as _;

use crate::{
    audit::Record,
    controller::{GATHER, fence, put_rollout},
    gateways::Gateways,
    leader::{ELECTION_TIMEOUT, Leadership, Speaking},
    now_ms,
    observed::Observed,
    status,
    world::{Stored, World},
};

mod operate;
mod publish;
mod service;

/// A change that names no revision of the store is tried again after a lost race so many times.
const ATTEMPTS: usize = 5;
/// A status is looked at this often even if nothing is heard.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Longest that a change waits for its own echo from the store.
const KNOWN_WITHIN: Duration = Duration::from_secs(2);
/// Statuses on their way to one watcher.
const IN_FLIGHT: usize = 4;

/// The service.
#[derive(Clone)]
pub(crate) struct AdminService {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) world: Arc<World>,
    pub(crate) gateways: Arc<Gateways>,
    pub(crate) observed: Arc<Observed>,
    pub(crate) leadership: Leadership,
    pub(crate) speaks: Speaking,
    pub(crate) metrics: ControlPlaneMetrics,
    pub(crate) streams: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// Who asks for a change and why.
#[derive(Debug, Default)]
struct Who {
    actor: String,
    reason: String,
    /// Answers what would be written, and writes nothing.
    dry_run: bool,
}

// === impl AdminService ===

impl AdminService {
    /// Runs one change within its span and counts it.
    async fn call<T>(
        &self,
        operation: &'static str,
        metadata: &MetadataMap,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        let span = tracing::info_span!("admin", otel.name = %format!("penstock.v1.Admin/{operation}"), otel.kind = "server");
        propagation::set_parent_context(&span, propagation::extract_metadata(metadata));
        let result = work.instrument(span.clone()).await;
        if let Err(status) = &result {
            penstock_telemetry::set_error(
                &span,
                &format!("{:?}", status.code()),
                status.message().to_owned(),
            );
        }
        let outcome = result
            .as_ref()
            .map_or_else(|status| format!("{:?}", status.code()), |_| "ok".into());
        self.metrics.called(operation, &outcome);
        result.map(Response::new)
    }

    /// The model meant: the one named, or the only one that has a rollout.
    fn model(&self, named: &str) -> Result<String, Status> {
        if !named.is_empty() {
            return Ok(named.to_owned());
        }
        let state = self.world.state();
        let models: Vec<&String> = state.rollouts.keys().collect();
        match models.as_slice() {
            [model] => Ok((*model).clone()),
            [] => Err(Status::not_found(
                "there is no rollout; create one with `ctl rollout create`",
            )),
            many => {
                let names: Vec<&str> = many.iter().map(|name| name.as_str()).collect();
                Err(Status::invalid_argument(format!(
                    "name the model: {}",
                    names.join(", ")
                )))
            }
        }
    }

    /// A rollout as the store has it now, not as this process remembers it.
    async fn stored(&self, model: &str) -> Result<Option<Stored<Rollout>>, Status> {
        let entry = self
            .store
            .get(&Key::Rollout(model.to_owned()))
            .await
            .map_err(|error| unavailable(&error))?;
        let Some(entry) = entry else { return Ok(None) };
        let value = serde_json::from_slice(&entry.value)
            .map_err(|error| Status::data_loss(format!("the rollout of {model} cannot be read: {error}")))?;
        let (create_revision, mod_revision) = (entry.create_revision, entry.mod_revision);
        Ok(Some(Stored {
            value,
            create_revision,
            mod_revision,
        }))
    }

    /// Changes a rollout: read, replace, compare and swap; again after a lost race unless a revision is expected.
    async fn change(
        &self,
        operation: &'static str,
        model: &str,
        expected: Option<u64>,
        who: Who,
        replace: impl Fn(&Rollout, Change) -> Result<Rollout, Status>,
    ) -> Result<v1::Rollout, Status> {
        let model = self.model(model)?;
        for _ in 0..ATTEMPTS {
            let Some(before) = self.stored(&model).await? else {
                return Err(Status::not_found(format!("model {model} has no rollout")));
            };
            if let Some(expected) = expected.filter(|expected| *expected != before.mod_revision) {
                return Err(lost_race(&before, expected));
            }
            if operation != "AbortRollout" {
                who.reason_for(Some(&before.value))?;
            }
            let after = replace(&before.value, change(&who))?;
            if after == before.value || who.dry_run {
                return Ok(convert::rollout(&after, before.mod_revision, ""));
            }
            let record = Record {
                operation,
                before: Some(&before.value),
                after: &after,
            };
            let unchanged = Precondition::ModRevision(Key::Rollout(model.clone()), before.mod_revision);
            if let Some(revision) = self.commit(unchanged, &after, &record).await? {
                return Ok(convert::rollout(&after, revision, ""));
            }
        }
        Err(Status::aborted(format!(
            "the rollout of {model} keeps changing; look at it and try again"
        )))
    }

    /// Writes a plan with its record; `None` if the precondition does not hold.
    async fn commit(
        &self,
        precondition: Precondition,
        after: &Rollout,
        record: &Record<'_>,
    ) -> Result<Option<u64>, Status> {
        let term = self.term().await?;
        let transaction = Transaction {
            preconditions: vec![precondition, fence(term)],
            operations: vec![put_rollout(after), record.operation(now_ms())],
        };
        let span = tracing::info_span!(
            "store.commit",
            penstock.model = after.model,
            penstock.rollout.generation = after.generation
        );
        match self.store.commit(transaction).instrument(span).await {
            Ok(revision) => {
                self.known(revision).await;
                Ok(Some(revision))
            }
            Err(CommitError::Conflict { key: Key::Leader }) => Err(self.world.not_leading()),
            Err(CommitError::Conflict { .. }) => Ok(None),
            Err(CommitError::Store(error)) => Err(unavailable(&error)),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    /// Revision at which this control plane became the leader. The answer waits for an election that is under way.
    async fn term(&self) -> Result<u64, Status> {
        let mut leadership = self.leadership.clone();
        let now = *leadership.borrow();
        if now.is_some() || self.world.other_leader().is_some() {
            return now.ok_or_else(|| self.world.not_leading());
        }
        match tokio::time::timeout(ELECTION_TIMEOUT, leadership.wait_for(Option::is_some)).await {
            Ok(Ok(term)) => term.ok_or_else(|| self.world.not_leading()),
            _ => Err(self.world.not_leading()),
        }
    }

    /// Waits until this process has heard of what it wrote, so that whoever reads next sees it.
    async fn known(&self, revision: u64) {
        let mut changes = self.world.changes();
        let known =
            async { while self.world.state().revision < revision && changes.changed().await.is_ok() {} };
        // The write stands either way; a watch that lags is no reason to call it failed.
        let _ = tokio::time::timeout(KNOWN_WITHIN, known).await;
    }

    async fn create(&self, request: v1::CreateRolloutRequest) -> Result<v1::Rollout, Status> {
        let share = share(request.canary_ppm.unwrap_or_default())?;
        let sticky = match request.sticky {
            Some(sticky) => {
                Sticky::try_from(sticky).map_err(|error| Status::invalid_argument(error.to_string()))?
            }
            None => Sticky::default(),
        };
        let (model, stable) = self.revisions(&request.model, &request.stable, &request.canary)?;
        let previous = self.stored(&model).await?;
        let plan = Manifest::manual(&model, &request.canary, &sticky);
        let new = CreateRollout {
            uid: uuid::Uuid::now_v7().to_string(),
            model: model.clone(),
            stable,
            canary: request.canary,
            share,
            plan,
        };
        let who = Who {
            actor: request.actor,
            reason: request.reason,
            dry_run: request.dry_run,
        };
        let before = previous.as_ref().map(|stored| &stored.value);
        let after = Rollout::create(new, before, change(&who)).map_err(|error| refusal(&error))?;
        self.reachable(Ppm::ZERO, &after)?;
        if who.dry_run {
            return Ok(convert::rollout(
                &after,
                previous.as_ref().map_or(0, |stored| stored.mod_revision),
                "",
            ));
        }
        let record = Record {
            operation: "CreateRollout",
            before,
            after: &after,
        };
        let key = Key::Rollout(model.clone());
        let precondition = match &previous {
            Some(previous) => Precondition::ModRevision(key, previous.mod_revision),
            None => Precondition::Absent(key),
        };
        match self.commit(precondition, &after, &record).await? {
            Some(revision) => Ok(convert::rollout(&after, revision, "")),
            None => Err(Status::aborted(format!(
                "somebody else created a rollout of {model} just now"
            ))),
        }
    }

    /// Checks the names of a new rollout; returns the model and its stable revision.
    fn revisions(&self, model: &str, stable: &str, canary: &str) -> Result<(String, String), Status> {
        let state = self.world.state();
        let published = state.published();
        let known: Vec<&str> = published.keys().map(String::as_str).collect();
        let model = match (model, known.as_slice()) {
            ("", [only]) => (*only).to_owned(),
            ("", _) => {
                return Err(Status::invalid_argument(format!(
                    "name the model: {}",
                    known.join(", ")
                )));
            }
            (named, _) => named.to_owned(),
        };
        let Some(revisions) = published.get(&model) else {
            let known = if known.is_empty() {
                "none is served".into()
            } else {
                known.join(", ")
            };
            return Err(Status::not_found(format!(
                "there is no model {model:?}; known: {known}"
            )));
        };
        let check = |name: &str, side: &str| {
            if name.is_empty() {
                return Err(Status::invalid_argument(format!("name the {side} revision")));
            }
            if revisions.iter().any(|published| published.revision == name) {
                return Ok(());
            }
            let known: Vec<&str> = revisions
                .iter()
                .map(|published| published.revision.as_str())
                .collect();
            Err(Status::not_found(format!(
                "{model} has no revision {name:?}; it has {}",
                known.join(", ")
            )))
        };
        check(canary, "canary")?;
        let route = state
            .newest_snapshot()
            .and_then(|snapshot| snapshot.routes.get(&model));
        let stable = match (stable, route) {
            ("", Some(route)) => route.stable.name.clone(),
            (named, _) => named.to_owned(),
        };
        check(&stable, "stable")?;
        Ok((model, stable))
    }

    /// A share that rises above `before` needs somebody who serves the canary: make before break. Lowering one
    /// never waits for anybody.
    fn reachable(&self, before: Ppm, rollout: &Rollout) -> Result<(), Status> {
        let workers = self.world.state().endpoints_of(&rollout.model, &rollout.canary);
        if rollout.share <= before || workers > 0 {
            return Ok(());
        }
        let Rollout { model, canary, .. } = rollout;
        Err(Status::failed_precondition(format!(
            "no worker serves {model}@{canary} now; start one, or leave the share at {before}"
        )))
    }

    /// The status of one rollout.
    fn status(&self, model: &str) -> Result<v1::RolloutStatus, Status> {
        let state = self.world.state();
        match state.rollouts.get(model) {
            Some(stored) => Ok(status::rollout(&state, &self.gateways, &self.observed, stored)),
            None => Err(Status::not_found(format!("model {model} has no rollout"))),
        }
    }

    /// Reads need what the store said at least once.
    fn loaded(&self) -> Result<(), Status> {
        match self.world.state().loaded {
            true => Ok(()),
            false => Err(Status::unavailable("the store has not answered yet; try again")),
        }
    }

    /// How far gateways have come is known to the leader alone.
    fn knows_gateways(&self) -> Result<(), Status> {
        self.loaded()?;
        match *self.speaks.borrow() || self.world.other_leader().is_none() {
            true => Ok(()),
            false => Err(self.world.not_leading()),
        }
    }

    async fn watch(self, model: String, statuses: mpsc::Sender<Result<v1::RolloutStatus, Status>>) {
        let mut changes = self.world.changes();
        let mut last = None;
        loop {
            changes.mark_unchanged();
            let status = self.knows_gateways().and_then(|()| self.status(&model));
            let (gone, new) = (status.is_err(), status.as_ref().ok() != last.as_ref());
            last = status.as_ref().ok().cloned();
            if gone || new {
                let sent = statuses.send(status).await;
                if gone || sent.is_err() {
                    return;
                }
            }
            tokio::select! {
                changed = changes.changed() => match changed {
                    Ok(()) => tokio::time::sleep(GATHER).await,
                    Err(_) => return,
                },
                // A gateway is lost by silence alone.
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = statuses.closed() => return,
                () = self.stop.cancelled() => {
                    let _ = statuses.send(Err(Status::unavailable("the control plane shuts down"))).await;
                    return;
                }
            }
        }
    }
}

// === impl Who ===

impl Who {
    /// A plan may ask for reasons.
    fn reason_for(&self, rollout: Option<&Rollout>) -> Result<(), Status> {
        let required = rollout.is_some_and(|rollout| rollout.plan.require_reason);
        if required && self.reason.trim().is_empty() {
            let why = "reason: the plan asks for one with every change; say why with --reason";
            return Err(Status::invalid_argument(why));
        }
        Ok(())
    }
}

fn share(ppm: u32) -> Result<Ppm, Status> {
    Ppm::new(ppm).map_err(|error| Status::invalid_argument(format!("canary_ppm: {error}")))
}

fn change(who: &Who) -> Change {
    Change {
        actor: who.actor.clone(),
        reason: who.reason.clone(),
        now_ms: now_ms(),
        traceparent: propagation::current_traceparent().unwrap_or_default(),
    }
}

fn refusal(error: &RolloutError) -> Status {
    match error {
        RolloutError::Active { .. } => Status::already_exists(error.to_string()),
        RolloutError::SameRevision(_) => Status::invalid_argument(error.to_string()),
        RolloutError::OtherUid { .. } => Status::aborted(error.to_string()),
        _ => Status::failed_precondition(error.to_string()),
    }
}

fn lost_race(before: &Stored<Rollout>, expected: u64) -> Status {
    let Rollout {
        share, phase, actor, ..
    } = &before.value;
    let actor = if actor.is_empty() { "somebody" } else { actor };
    Status::aborted(format!(
        "expected store revision {expected}, found {}: {actor} left it {phase} at {share}",
        before.mod_revision
    ))
}

fn unavailable(error: &StoreError) -> Status {
    Status::unavailable(error.to_string())
}
