//! How a rollout stands, why, what happened to it, and waiting for its end.

use super::Command;
use crate::{
    config::{self, Get, History},
    console::Console,
    error::CtlError,
    live,
    output::{Format, View as _, emit, emit_next, time},
    view::{self, Audit, Explanation, RolloutLine, Rollouts},
};
use penstock_proto::v1::{ListAuditRequest, Phase, Rollout, RolloutStatus, WatchRolloutRequest};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Status;

/// Pause before a watch is taken up again, and between two looks at a list.
const RETRY: Duration = Duration::from_millis(500);

impl Command<'_> {
    pub(super) async fn get(&mut self, args: Get) -> Result<(), CtlError> {
        let status = self.find(args.model).await?;
        if !args.watch {
            return emit(self.console, self.output, &view::Rollout::from(status));
        }
        let model = status.rollout.unwrap_or_default().model;
        if self.is_live() {
            return live::run(&mut self.admin, Some(&model), &config::actor()).await;
        }
        let reply = self.admin.rpc.watch_rollout(WatchRolloutRequest { model }).await;
        let mut stream = reply.map_err(|status| self.admin.failed(status))?.into_inner();
        let mut last = None;
        while let Some(status) = stream
            .message()
            .await
            .map_err(|status| self.admin.failed(status))?
        {
            self.tell_change(&mut last, status)?;
        }
        Err(self.admin.failed(Status::unavailable("it ended the watch")))
    }

    /// Writes a line where the rollout says something new: counts change every second and are none.
    fn tell_change(&mut self, last: &mut Option<String>, status: RolloutStatus) -> Result<(), CtlError> {
        let line = RolloutLine(status.into());
        let news = Some(line.news());
        if *last == news {
            return Ok(());
        }
        *last = news;
        emit_next(self.console, self.output, &line)
    }

    pub(super) async fn list(&mut self, watch: bool) -> Result<(), CtlError> {
        if watch && self.is_live() {
            return live::run(&mut self.admin, None, &config::actor()).await;
        }
        if watch {
            return self.watch_all().await;
        }
        let rollouts = self.all().await?.into_iter().map(view::Rollout::from).collect();
        emit(self.console, self.output, &Rollouts { rollouts })
    }

    /// A live view is for a reader at a terminal.
    fn is_live(&self) -> bool {
        self.output == Format::Table && self.console.is_screen()
    }

    async fn watch_all(&mut self) -> Result<(), CtlError> {
        let mut last = std::collections::BTreeMap::new();
        loop {
            for status in self.all().await? {
                let model = status
                    .rollout
                    .as_ref()
                    .map(|r| r.model.clone())
                    .unwrap_or_default();
                self.tell_change(last.entry(model).or_default(), status)?;
            }
            sleep(RETRY).await;
        }
    }

    pub(super) async fn explain(&mut self, model: Option<String>) -> Result<(), CtlError> {
        let status = self.find(model).await?;
        let explanation = Explanation::new(status, Explanation::clock());
        emit(self.console, self.output, &explanation)
    }

    pub(super) async fn history(&mut self, args: History) -> Result<(), CtlError> {
        let model = match args.model {
            Some(model) => model,
            None => self.rollout(None).await?.model,
        };
        let limit = args.limit;
        let reply = self.admin.rpc.list_audit(ListAuditRequest { model, limit }).await;
        let reply = reply.map_err(|status| self.admin.failed(status))?.into_inner();
        emit(self.console, self.output, &Audit::from(reply))
    }

    pub(super) async fn wait(
        &mut self,
        model: Option<String>,
        limit: Option<Duration>,
    ) -> Result<(), CtlError> {
        let rollout = self.rollout(model).await?;
        let (model, uid) = (rollout.model, rollout.uid);
        let mut last = None;
        let Some(limit) = limit else {
            let ended = self.follow_to_the_end(&model, &uid, &mut last).await?;
            return self.ended(ended, &uid);
        };
        let until = Instant::now() + limit;
        match timeout_at(until, self.follow_to_the_end(&model, &uid, &mut last)).await {
            Ok(ended) => {
                let ended = ended?;
                self.ended(ended, &uid)
            }
            Err(_) => Err(CtlError::NotConverged(format!(
                "the rollout of {model} is neither over nor paused after {}: {}",
                time(limit),
                last.as_deref().unwrap_or("nothing was heard of it").trim_end()
            ))),
        }
    }

    /// The status with which a rollout is over or paused.
    async fn follow_to_the_end(
        &mut self,
        model: &str,
        uid: &str,
        last: &mut Option<String>,
    ) -> Result<RolloutStatus, CtlError> {
        loop {
            let request = WatchRolloutRequest {
                model: model.to_owned(),
            };
            let lost = match self.admin.rpc.watch_rollout(request).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    loop {
                        match stream.message().await {
                            Ok(Some(status)) if stands(&status, uid) => return Ok(status),
                            Ok(Some(status)) => note(self.console, last, status),
                            Ok(None) => break Status::unavailable("the watch ended"),
                            Err(status) => break status,
                        }
                    }
                }
                Err(status) => status,
            };
            // A control plane that restarts does not end a rollout.
            if !crate::converge::is_passing(&lost) {
                return Err(self.admin.failed(lost));
            }
            sleep(RETRY).await;
        }
    }

    fn ended(&mut self, status: RolloutStatus, uid: &str) -> Result<(), CtlError> {
        let phase = status.rollout.as_ref().map(Rollout::phase);
        let line = RolloutLine(status.into());
        emit(self.console, self.output, &line)?;
        let view::Rollout {
            model,
            canary,
            stable,
            share,
            cause,
            uid: found,
            ..
        } = &line.0;
        if found != uid {
            return Err(CtlError::Conflict(format!(
                "another rollout of {model}, to {canary}, took the place of the one waited for: see `ctl rollout \
                 history`"
            )));
        }
        let cause = if cause.is_empty() {
            String::new()
        } else {
            format!(": {cause}")
        };
        match phase {
            Some(Phase::Succeeded) => Ok(()),
            Some(Phase::RolledBack | Phase::Aborting) => Err(CtlError::RolledBack(format!(
                "the rollout of {model} went back from {canary} to {stable}{cause}"
            ))),
            _ => Err(CtlError::Waiting(format!(
                "the rollout of {model} is paused at {share}{}; {}",
                if cause.is_empty() && !line.0.pause.is_empty() {
                    format!(" ({})", line.0.pause)
                } else {
                    cause
                },
                remedy(line.0.pause)
            ))),
        }
    }
}

/// What an operator can do about a pause.
fn remedy(pause: &str) -> &'static str {
    if pause == view::pause(penstock_proto::v1::PauseReason::Approval) {
        "go on with `ctl rollout approve`, or stop it with `ctl rollout abort`"
    } else {
        "see `ctl rollout explain`, go on with `ctl rollout resume` or stop it with `ctl rollout abort`"
    }
}

/// Whether the rollout is over or waits for somebody, or another one stands in its place.
fn stands(status: &RolloutStatus, uid: &str) -> bool {
    let Some(rollout) = &status.rollout else {
        return false;
    };
    let phase = rollout.phase();
    rollout.uid != uid || matches!(phase, Phase::Succeeded | Phase::RolledBack | Phase::Paused)
}

fn note(console: &mut Console, last: &mut Option<String>, status: RolloutStatus) {
    let line = RolloutLine(status.into());
    let news = Some(line.news());
    if *last != news {
        console.progress(line.table().trim_end());
        *last = news;
    }
}
