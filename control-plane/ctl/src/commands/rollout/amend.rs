//! Steps, pauses, approvals, another try, and the way back after a promotion.

use super::{Command, ppm};
use crate::{
    config::{self, Amend, Step, Undo},
    confirm::{affirmed, confirm},
    conflict::{Asked, Seen, moved_on},
    converge::{Goal, Outcome},
    error::CtlError,
    output::emit,
};
use penstock_plan::Ppm;
use penstock_proto::v1::{ChangeRolloutRequest, Rollout, StepRolloutRequest};
use tokio::time::Instant;
use tonic::{Code, Status};

/// A change that says nothing but its name, or a step.
#[derive(Debug, Clone, Copy)]
pub(super) enum Amendment {
    Pause,
    Resume,
    Approve,
    Retry,
    Undo,
    /// To this step, from 0; none is the next.
    Step(Option<u32>),
}

impl Amendment {
    fn verb(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Approve => "approve",
            Self::Retry => "retry",
            Self::Undo => "undo",
            Self::Step(_) => "step",
        }
    }

    fn goal(self) -> Goal {
        match self {
            Self::Pause => Goal::Paused,
            _ => Goal::Followed,
        }
    }
}

impl Command<'_> {
    /// Pauses, resumes, approves or retries.
    pub(super) async fn amend(&mut self, amendment: Amendment, args: Amend) -> Result<(), CtlError> {
        let seen = self.rollout(args.model).await?;
        self.carry_out(amendment, seen, args.change, args.expect.expect_revision)
            .await
    }

    pub(super) async fn step(&mut self, args: Step) -> Result<(), CtlError> {
        let status = self.find(args.model).await?;
        let steps = status.steps.clone();
        let seen = status
            .rollout
            .ok_or_else(|| self.admin.nonsense("a status without its rollout"))?;
        let index = args.step.map(|step| step - 1);
        let next = || {
            steps
                .iter()
                .map(|step| step.canary_ppm)
                .find(|ppm| *ppm > seen.canary_ppm)
        };
        let target = match index {
            Some(index) => steps
                .get(usize::try_from(index).unwrap_or(usize::MAX))
                .map(|s| s.canary_ppm),
            None => next(),
        };
        // A step that is not there is the server's to refuse.
        let target = target.unwrap_or(seen.canary_ppm);
        if !args.change.dry_run {
            let jump = (ppm(seen.canary_ppm), ppm(target));
            confirm(self.console, &seen.model, &seen.canary, jump, args.consent.yes)?;
        }
        let amendment = Amendment::Step(index);
        self.carry_out(amendment, seen, args.change, args.expect.expect_revision)
            .await
    }

    pub(super) async fn undo(&mut self, args: Undo) -> Result<(), CtlError> {
        let seen = self.rollout(args.model).await?;
        if !args.change.dry_run && !args.consent.yes {
            let Rollout {
                model,
                stable,
                canary,
                ..
            } = &seen;
            affirmed(
                self.console,
                &format!("Send all traffic of {model} from {canary} back to {stable}?"),
                || {
                    format!(
                        "undo sends all traffic of {model} from {canary} back to {stable}: say -y to do it"
                    )
                },
            )?;
        }
        self.carry_out(Amendment::Undo, seen, args.change, args.expect.expect_revision)
            .await
    }

    async fn carry_out(
        &mut self,
        amendment: Amendment,
        seen: Rollout,
        change: config::Change,
        expect: Option<u64>,
    ) -> Result<(), CtlError> {
        let asked = Asked {
            what: amendment.verb(),
            share: None::<Ppm>,
            manifest: None,
        };
        if let Some(expected) = expect.filter(|expected| *expected != seen.store_revision) {
            return Err(moved_on(self.console, &Seen::unknown(expected), &seen, &asked));
        }
        let started = Instant::now();
        let request = ChangeRolloutRequest {
            model: seen.model.clone(),
            uid: seen.uid.clone(),
            expect_revision: expect,
            reason: change.reason.clone(),
            actor: change.actor.clone(),
            dry_run: change.dry_run,
        };
        let written = match self.ask(amendment, request).await {
            Ok(written) => written,
            Err(status) if status.code() == Code::Aborted => {
                let now = self.rollout(Some(seen.model.clone())).await?;
                return Err(moved_on(self.console, &Seen::known(&seen), &now, &asked));
            }
            Err(status) => return Err(self.admin.failed(status)),
        };
        if change.dry_run {
            self.console
                .progress("a dry run: this is what would be written, and nothing is");
            return emit(
                self.console,
                self.output,
                &Outcome::written(amendment.goal(), &written),
            );
        }
        self.finish(amendment.goal(), written, started, &change).await
    }

    async fn ask(&mut self, amendment: Amendment, request: ChangeRolloutRequest) -> Result<Rollout, Status> {
        let rpc = &mut self.admin.rpc;
        let reply = match amendment {
            Amendment::Pause => rpc.pause_rollout(request).await,
            Amendment::Resume => rpc.resume_rollout(request).await,
            Amendment::Approve => rpc.approve_rollout(request).await,
            Amendment::Retry => rpc.retry_rollout(request).await,
            Amendment::Undo => rpc.undo_rollout(request).await,
            Amendment::Step(step) => {
                let change = Some(request);
                rpc.step_rollout(StepRolloutRequest { change, step }).await
            }
        };
        reply.map(tonic::Response::into_inner)
    }
}
