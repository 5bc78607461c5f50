//! Creating a rollout, setting its share, promoting and aborting.

use super::{ATTEMPTS, Command, WHOLE, name_span, ppm};
use crate::{
    config::{self, Abort, Create, Promote, Set},
    confirm::{asks, confirm},
    conflict::{Asked, Seen, moved_on},
    converge::Goal,
    error::CtlError,
    output::{View, emit},
};
use penstock_plan::Ppm;
use penstock_proto::v1::{
    AbortRolloutRequest, CreateRolloutRequest, PromoteRolloutRequest, Rollout, SetRolloutRequest,
};
use serde::Serialize;
use tokio::time::Instant;
use tonic::{Code, Status};

impl Command<'_> {
    pub(super) async fn create(&mut self, args: Create) -> Result<(), CtlError> {
        let Create {
            model,
            stable,
            canary,
            canary_share,
            change,
            consent,
        } = args;
        let model = match model {
            Some(model) => model,
            None => self.only_model().await?,
        };
        name_span(&model);
        if !change.dry_run {
            let jump = (Ppm::default(), canary_share);
            confirm(self.console, &model, &canary, jump, consent.yes)?;
        }
        let started = Instant::now();
        let request = CreateRolloutRequest {
            model,
            stable: stable.unwrap_or_default(),
            canary,
            canary_ppm: Some(canary_share.get()),
            sticky: None,
            reason: change.reason.clone(),
            actor: change.actor.clone(),
            dry_run: change.dry_run,
        };
        let reply = self.admin.rpc.create_rollout(request).await;
        let written = reply.map_err(|status| self.admin.failed(status))?.into_inner();
        if change.dry_run {
            let planned = Plan::of("create", &written, canary_share);
            return self.tell(Plan {
                from: Ppm::default(),
                ..planned
            });
        }
        let Rollout {
            model,
            stable,
            canary,
            ..
        } = &written;
        self.console.progress(&format!(
            "rollout of {model} created: stable {stable}, canary {canary}"
        ));
        self.finish(Goal::Share(canary_share.get()), written, started, &change)
            .await
    }

    pub(super) async fn set(&mut self, args: Set) -> Result<(), CtlError> {
        let Set {
            model,
            canary,
            change,
            consent,
            expect,
        } = args;
        let write = Write::Share(canary);
        self.change(model, write, change, consent.yes, expect.expect_revision)
            .await
    }

    pub(super) async fn promote(&mut self, args: Promote) -> Result<(), CtlError> {
        let Promote {
            model,
            change,
            consent,
            expect,
        } = args;
        self.change(model, Write::Promote, change, consent.yes, expect.expect_revision)
            .await
    }

    pub(super) async fn abort(&mut self, args: Abort) -> Result<(), CtlError> {
        let Abort { model, change, .. } = args;
        let rollout = self.rollout(model).await?;
        let started = Instant::now();
        let request = AbortRolloutRequest {
            model: rollout.model.clone(),
            uid: rollout.uid.clone(),
            reason: change.reason.clone(),
            actor: change.actor.clone(),
            dry_run: change.dry_run,
        };
        let reply = self.admin.rpc.abort_rollout(request).await;
        let written = reply.map_err(|status| self.admin.failed(status))?.into_inner();
        if change.dry_run {
            return self.tell(Plan::of("abort", &rollout, Ppm::default()));
        }
        self.finish(Goal::RolledBack, written, started, &change).await
    }

    /// Sets a share or promotes: the changes that ask first and that compare and swap.
    async fn change(
        &mut self,
        model: Option<String>,
        write: Write,
        change: config::Change,
        yes: bool,
        expect: Option<u64>,
    ) -> Result<(), CtlError> {
        let rollout = self.rollout(model).await?;
        if let Some(expected) = expect.filter(|expected| *expected != rollout.store_revision) {
            return Err(moved_on(
                self.console,
                &Seen::unknown(expected),
                &rollout,
                &write.asked(),
            ));
        }
        let plan = Plan::of(write.verb(), &rollout, write.share());
        if change.dry_run {
            let checked = self.send(write, &rollout, &change, expect).await;
            checked.map_err(|status| self.admin.failed(status))?;
            return self.tell(plan);
        }
        confirm(
            self.console,
            &rollout.model,
            &rollout.canary,
            (plan.from, plan.to),
            yes,
        )?;
        let started = Instant::now();
        let written = self.write(write, rollout, &change, expect).await?;
        self.finish(write.goal(), written, started, &change).await
    }

    /// Writes only over the rollout that the operator saw. Where the operator named no revision, a write of
    /// the controller in between (it moves phases, not shares) is no conflict.
    async fn write(
        &mut self,
        write: Write,
        mut seen: Rollout,
        change: &config::Change,
        expect: Option<u64>,
    ) -> Result<Rollout, CtlError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let status = match self.send(write, &seen, change, expect).await {
                Ok(written) => return Ok(written),
                Err(status) if status.code() != Code::Aborted || attempt == ATTEMPTS => {
                    return Err(self.admin.failed(status));
                }
                Err(status) => status,
            };
            let fresh = self.rollout(Some(seen.model.clone())).await?;
            if fresh.store_revision == seen.store_revision {
                return Err(self.admin.failed(status));
            }
            if expect.is_some() || fresh.uid != seen.uid || fresh.canary_ppm != seen.canary_ppm {
                return Err(moved_on(
                    self.console,
                    &Seen::known(&seen),
                    &fresh,
                    &write.asked(),
                ));
            }
            seen = fresh;
        }
    }

    async fn send(
        &mut self,
        write: Write,
        seen: &Rollout,
        change: &config::Change,
        expect: Option<u64>,
    ) -> Result<Rollout, Status> {
        let model = seen.model.clone();
        let expect_revision = expect.or(Some(seen.store_revision));
        let (reason, actor) = (change.reason.clone(), change.actor.clone());
        let reply = match write {
            Write::Share(share) => {
                let canary_ppm = share.get();
                let request = SetRolloutRequest {
                    model,
                    canary_ppm,
                    expect_revision,
                    reason,
                    actor,
                    dry_run: change.dry_run,
                };
                self.admin.rpc.set_rollout(request).await
            }
            Write::Promote => {
                let request = PromoteRolloutRequest {
                    model,
                    expect_revision,
                    reason,
                    actor,
                    dry_run: change.dry_run,
                };
                self.admin.rpc.promote_rollout(request).await
            }
        };
        reply.map(tonic::Response::into_inner)
    }

    fn tell(&mut self, plan: Plan) -> Result<(), CtlError> {
        emit(self.console, self.output, &plan)
    }
}

/// A change that compares and swaps.
#[derive(Debug, Clone, Copy)]
enum Write {
    Share(Ppm),
    Promote,
}

impl Write {
    fn verb(self) -> &'static str {
        match self {
            Self::Share(_) => "set",
            Self::Promote => "promote",
        }
    }

    /// The share that the canary ends up with.
    fn share(self) -> Ppm {
        match self {
            Self::Share(share) => share,
            Self::Promote => ppm(WHOLE),
        }
    }

    fn asked(self) -> Asked<'static> {
        Asked {
            what: self.verb(),
            share: Some(self.share()),
            manifest: None,
        }
    }

    fn goal(self) -> Goal {
        match self {
            Self::Share(share) => Goal::Share(share.get()),
            Self::Promote => Goal::Promoted,
        }
    }
}

/// What a change would do; the answer to `--dry-run`.
#[derive(Debug, Serialize)]
struct Plan {
    change: &'static str,
    model: String,
    stable: String,
    canary: String,
    #[serde(serialize_with = "as_ppm", rename = "from_ppm")]
    from: Ppm,
    #[serde(serialize_with = "as_ppm", rename = "to_ppm")]
    to: Ppm,
    store_revision: u64,
}

impl Plan {
    fn of(change: &'static str, rollout: &Rollout, to: Ppm) -> Self {
        Self {
            change,
            model: rollout.model.clone(),
            stable: rollout.stable.clone(),
            canary: rollout.canary.clone(),
            from: ppm(rollout.canary_ppm),
            to,
            store_revision: rollout.store_revision,
        }
    }
}

impl View for Plan {
    fn table(&self) -> String {
        let Self {
            change,
            model,
            canary,
            from,
            to,
            ..
        } = self;
        let would_ask = self.change != "abort" && asks(from.get(), to.get());
        let asks = if would_ask {
            "; it would ask first, or want -y"
        } else {
            ""
        };
        format!("{change} would move {canary} from {from} to {to} of {model}; nothing is written{asks}\n")
    }
}

fn as_ppm<S: serde::Serializer>(share: &Ppm, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u32(share.get())
}
