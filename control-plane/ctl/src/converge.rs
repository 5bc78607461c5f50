//! Waiting until a written change has reached every live gateway.

use crate::{
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{View, time},
    view::{Nack, percent, phase, share, step},
};
use penstock_proto::v1::{Phase, Rollout, RolloutStatus, WatchRolloutRequest};
use serde::Serialize;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status};

/// Pause before the watch is taken up again after the control plane went away.
const RETRY: Duration = Duration::from_millis(200);

/// What a change wants to become of the rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    /// This share, in parts per million, at every gateway.
    Share(u32),
    Promoted,
    RolledBack,
    Paused,
    /// Whatever the plan makes of it, once gateways have acknowledged the share of its present step.
    Followed,
}

/// What became of a change.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    model: String,
    uid: String,
    stable: String,
    canary: String,
    share: String,
    canary_ppm: u32,
    phase: &'static str,
    /// Counted from 0, of how many.
    step: u32,
    steps: u32,
    generation: u64,
    store_revision: u64,
    /// The canary's share of the keys as counted, in [0, 1].
    key_share: Option<f64>,
    /// 0 where it was not waited for.
    epoch: u64,
    live_gateways: u32,
    acknowledged: u32,
    /// From the call to the last gateway's acknowledgement, as this command saw it; absent where it did not
    /// wait.
    acknowledged_ms: Option<u64>,
    #[serde(skip)]
    goal: Goal,
}

impl Outcome {
    /// A change that is written and not waited for.
    pub(crate) fn written(goal: Goal, rollout: &Rollout) -> Self {
        Self {
            model: rollout.model.clone(),
            uid: rollout.uid.clone(),
            stable: rollout.stable.clone(),
            canary: rollout.canary.clone(),
            share: share(rollout.canary_ppm),
            canary_ppm: rollout.canary_ppm,
            phase: phase(rollout.phase()),
            step: rollout.step,
            steps: rollout.steps,
            generation: rollout.generation,
            store_revision: rollout.store_revision,
            key_share: None,
            epoch: 0,
            live_gateways: 0,
            acknowledged: 0,
            acknowledged_ms: None,
            goal,
        }
    }

    fn converged(goal: Goal, status: &RolloutStatus, rollout: &Rollout, after: Duration) -> Self {
        Self {
            key_share: status.key_share,
            epoch: status.epoch,
            live_gateways: status.live_gateways,
            acknowledged: status.acknowledged,
            acknowledged_ms: Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
            ..Self::written(goal, rollout)
        }
    }
}

impl View for Outcome {
    fn table(&self) -> String {
        let Self {
            model,
            stable,
            canary,
            share,
            generation,
            epoch,
            acknowledged,
            live_gateways,
            ..
        } = self;
        let acks = match self.acknowledged_ms {
            Some(ms) => format!(
                "epoch {epoch}; {acknowledged}/{live_gateways} acknowledged in {}",
                time(Duration::from_millis(ms))
            ),
            None => format!("generation {generation} is written; not waited for gateways"),
        };
        match self.goal {
            Goal::Share(_) => format!("{share} desired; {}{acks}\n", self.keys()),
            // A promoted rollout's canary is what serves, however the server names it afterwards.
            Goal::Promoted => format!("{model}: {canary} promoted; {acks}\n"),
            Goal::RolledBack => format!("{model}: rolled back to {stable}; {acks}\n"),
            Goal::Paused => format!("{model}: paused at {share}; {acks}\n"),
            Goal::Followed => {
                let step = step(self.step, self.steps);
                format!(
                    "{model}: {stable} → {canary} at {share}, {}{step}; {acks}\n",
                    self.phase
                )
            }
        }
    }
}

impl Outcome {
    fn keys(&self) -> String {
        self.key_share
            .map_or_else(String::new, |keys| format!("{} of keys; ", percent(keys)))
    }
}

/// A change that is on its way to the gateways.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) goal: Goal,
    /// The rollout as the change left it.
    pub(crate) written: Rollout,
    /// When the change was asked for.
    pub(crate) started: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    Done,
    RolledBack,
    /// Somebody changed the rollout again.
    Superseded,
}

impl Change {
    fn judge(&self, status: &RolloutStatus) -> Progress {
        let Some(rollout) = &status.rollout else {
            return Progress::Waiting;
        };
        if rollout.uid != self.written.uid {
            return Progress::Superseded;
        }
        // A follower or a late watch may still tell of the time before the change.
        if rollout.generation < self.written.generation {
            return Progress::Waiting;
        }
        match (self.goal, rollout.phase()) {
            // Success is a plan of its own, with the canary as stable: it too is to arrive everywhere.
            (Goal::Promoted, Phase::Draining | Phase::Succeeded) if acknowledged(status) => Progress::Done,
            (Goal::RolledBack, Phase::RolledBack) => Progress::Done,
            (Goal::RolledBack, _) => Progress::Waiting,
            (_, Phase::Aborting | Phase::RolledBack) => Progress::RolledBack,
            (Goal::Paused, Phase::Paused) if acknowledged(status) => Progress::Done,
            // Nothing is routed yet, so that there is nothing to acknowledge.
            (Goal::Followed, Phase::Pending | Phase::Warming) => Progress::Done,
            (Goal::Followed, Phase::Converging | Phase::Promoting) => Progress::Waiting,
            (Goal::Followed, _) if acknowledged(status) => Progress::Done,
            (Goal::Share(_), Phase::Promoting | Phase::Draining | Phase::Succeeded) => Progress::Superseded,
            (Goal::Share(ppm), _) if rollout.canary_ppm != ppm => Progress::Superseded,
            (Goal::Share(_), Phase::Paused | Phase::Soaking | Phase::Judging | Phase::Baking)
                if acknowledged(status) =>
            {
                Progress::Done
            }
            _ => Progress::Waiting,
        }
    }

    /// Waits until every live gateway has acknowledged and the control plane has settled.
    pub(crate) async fn wait(
        &self,
        admin: &mut Admin,
        console: &mut Console,
        limit: Duration,
    ) -> Result<Outcome, CtlError> {
        let mut seen = Seen::default();
        match timeout_at(self.started + limit, self.follow(admin, console, &mut seen)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(CtlError::NotConverged(self.unfinished(&seen, limit))),
        }
    }

    async fn follow(
        &self,
        admin: &mut Admin,
        console: &mut Console,
        seen: &mut Seen,
    ) -> Result<Outcome, CtlError> {
        loop {
            let request = WatchRolloutRequest {
                model: self.written.model.clone(),
            };
            let lost = match admin.rpc.watch_rollout(request).await {
                Ok(stream) => match self.read(stream.into_inner(), console, seen).await? {
                    Ok(outcome) => return Ok(outcome),
                    Err(lost) => lost,
                },
                Err(status) => status,
            };
            // The change is written: a control plane that restarts meanwhile does not undo it.
            if !is_passing(&lost) {
                return Err(admin.failed(lost));
            }
            if !std::mem::replace(&mut seen.told_lost, true) {
                console
                    .progress("the control plane went away; the change is written; waiting for its return");
            }
            sleep(RETRY).await;
        }
    }

    /// Reads one watch to the end of the wait, or to the status that it broke with.
    async fn read(
        &self,
        mut stream: tonic::Streaming<RolloutStatus>,
        console: &mut Console,
        seen: &mut Seen,
    ) -> Result<Result<Outcome, Status>, CtlError> {
        loop {
            let status = match stream.message().await {
                Ok(Some(status)) => status,
                Ok(None) => return Ok(Err(Status::unavailable("the watch ended"))),
                Err(status) => return Ok(Err(status)),
            };
            seen.told_lost = false;
            seen.note(&status, self, console);
            match self.judge(&status) {
                Progress::Waiting => seen.last = Some(status),
                Progress::Done => {
                    let rollout = status.rollout.as_ref().unwrap_or(&self.written);
                    let after = seen.acknowledged_after.unwrap_or_else(|| self.started.elapsed());
                    return Ok(Ok(Outcome::converged(self.goal, &status, rollout, after)));
                }
                Progress::RolledBack => return Err(CtlError::RolledBack(ended(&status, "was rolled back"))),
                Progress::Superseded => {
                    return Err(CtlError::Conflict(ended(&status, "was changed again meanwhile")));
                }
            }
        }
    }

    fn unfinished(&self, seen: &Seen, limit: Duration) -> String {
        let model = &self.written.model;
        let limit = time(limit);
        let Some(status) = &seen.last else {
            return format!("the change of {model} is written, but nothing was heard of it within {limit}");
        };
        let mut waits: Vec<String> = status
            .nacks
            .iter()
            .map(|nack| Nack::from(nack.clone()).line())
            .collect();
        let silent = status
            .pending
            .iter()
            .filter(|name| !status.nacks.iter().any(|n| n.gateway == **name));
        waits.extend(silent.map(|name| format!("{name} has not answered")));
        if waits.is_empty() {
            let message = status
                .rollout
                .as_ref()
                .map(|r| r.message.as_str())
                .unwrap_or_default();
            waits.push(
                if message.is_empty() {
                    "the control plane has not settled"
                } else {
                    message
                }
                .to_owned(),
            );
        }
        format!(
            "the change of {model} is written, but only {}/{} gateways acknowledged epoch {} within {limit}: {}; \
             follow it with `ctl rollout get -w`, or take it back with `ctl rollout abort`",
            status.acknowledged,
            status.live_gateways,
            status.epoch,
            waits.join("; ")
        )
    }
}

/// What was seen while waiting.
#[derive(Debug, Default)]
struct Seen {
    last: Option<RolloutStatus>,
    acknowledged_after: Option<Duration>,
    told_nacks: Vec<(String, u64)>,
    told_lost: bool,
}

impl Seen {
    fn note(&mut self, status: &RolloutStatus, change: &Change, console: &mut Console) {
        let current = status
            .rollout
            .as_ref()
            .is_some_and(|r| r.generation >= change.written.generation);
        if current && acknowledged(status) && self.acknowledged_after.is_none() {
            self.acknowledged_after = Some(change.started.elapsed());
            if status.live_gateways == 0 {
                console.progress("no gateway is live: the change waits for the first that connects");
            }
        }
        for nack in &status.nacks {
            let key = (nack.gateway.clone(), nack.epoch);
            if !self.told_nacks.contains(&key) {
                self.told_nacks.push(key);
                console.progress(&Nack::from(nack.clone()).line());
            }
        }
    }
}

fn acknowledged(status: &RolloutStatus) -> bool {
    status.epoch > 0 && status.pending.is_empty() && status.acknowledged >= status.live_gateways
}

pub(crate) fn is_passing(status: &Status) -> bool {
    // Unknown is what tonic makes of a connection that broke under a stream.
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
    )
}

fn ended(status: &RolloutStatus, how: &str) -> String {
    let rollout = status.rollout.clone().unwrap_or_default();
    let who = if rollout.actor.is_empty() {
        String::new()
    } else {
        format!(" by {}", rollout.actor)
    };
    let why = if rollout.reason.is_empty() {
        String::new()
    } else {
        format!(" ({})", rollout.reason)
    };
    format!(
        "the rollout of {} {how}{who}{why}: it is {} at {}, generation {}",
        rollout.model,
        phase(rollout.phase()),
        share(rollout.canary_ppm),
        rollout.generation
    )
}

#[cfg(test)]
mod tests;
