//! `ctl rollout …`.

use super::pick::{only, only_rollout};
use crate::{
    config::{self, Abort, Connection, Create, Get, Promote, RolloutVerb, Set},
    confirm::{confirm, is_jump},
    connect::Admin,
    console::Console,
    converge::{Change, Goal, Outcome},
    error::CtlError,
    output::{Format, View, emit, emit_next},
    view::{self, RolloutLine, Rollouts, share},
};
use penstock_plan::Ppm;
use penstock_proto::v1::{
    AbortRolloutRequest, CreateRolloutRequest, GetRolloutRequest, ListPublishedRequest, ListRolloutsRequest,
    PromoteRolloutRequest, Rollout, RolloutStatus, SetRolloutRequest, WatchRolloutRequest,
};
use penstock_telemetry::{OpenTelemetrySpanExt as _, semconv::attribute};
use serde::Serialize;
use tokio::time::Instant;
use tonic::{Code, Status};

/// The whole traffic, in parts per million.
const WHOLE: u32 = 1_000_000;
/// How often a change is tried again when only the controller has written the rollout in between.
const ATTEMPTS: usize = 4;

pub(crate) async fn run(
    verb: RolloutVerb,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let admin = Admin::connect(connection).await?;
    let mut command = Command {
        admin,
        output,
        console,
    };
    match verb {
        RolloutVerb::Create(args) => command.create(args).await,
        RolloutVerb::Get(args) => command.get(args).await,
        RolloutVerb::List => command.list().await,
        RolloutVerb::Set(args) => command.set(args).await,
        RolloutVerb::Promote(args) => command.promote(args).await,
        RolloutVerb::Abort(args) => command.abort(args).await,
    }
}

struct Command<'a> {
    admin: Admin,
    output: Format,
    console: &'a mut Console,
}

impl Command<'_> {
    async fn create(&mut self, args: Create) -> Result<(), CtlError> {
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
        if change.dry_run {
            return self.tell(Plan {
                change: "create",
                from: Ppm::default(),
                to: canary_share,
                stable: stable.unwrap_or_default(),
                canary,
                model,
                store_revision: 0,
            });
        }
        confirm(
            self.console,
            &model,
            &canary,
            (Ppm::default(), canary_share),
            consent.yes,
        )?;
        let started = Instant::now();
        let request = CreateRolloutRequest {
            model,
            stable: stable.unwrap_or_default(),
            canary,
            canary_ppm: Some(canary_share.get()),
            sticky: None,
            reason: change.reason.clone(),
            actor: change.actor.clone(),
            ..CreateRolloutRequest::default()
        };
        let reply = self.admin.rpc.create_rollout(request).await;
        let written = reply.map_err(|status| self.admin.failed(status))?.into_inner();
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

    async fn get(&mut self, args: Get) -> Result<(), CtlError> {
        let status = self.find(args.model).await?;
        if !args.watch {
            return emit(self.console, self.output, &view::Rollout::from(status));
        }
        let model = status.rollout.unwrap_or_default().model;
        let reply = self.admin.rpc.watch_rollout(WatchRolloutRequest { model }).await;
        let mut stream = reply.map_err(|status| self.admin.failed(status))?.into_inner();
        while let Some(status) = stream
            .message()
            .await
            .map_err(|status| self.admin.failed(status))?
        {
            emit_next(self.console, self.output, &RolloutLine(status.into()))?;
        }
        Err(self.admin.failed(Status::unavailable("it ended the watch")))
    }

    async fn list(&mut self) -> Result<(), CtlError> {
        let rollouts = self.all().await?.into_iter().map(view::Rollout::from).collect();
        emit(self.console, self.output, &Rollouts { rollouts })
    }

    async fn set(&mut self, args: Set) -> Result<(), CtlError> {
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

    async fn promote(&mut self, args: Promote) -> Result<(), CtlError> {
        let Promote {
            model,
            change,
            consent,
            expect,
        } = args;
        self.change(model, Write::Promote, change, consent.yes, expect.expect_revision)
            .await
    }

    async fn abort(&mut self, args: Abort) -> Result<(), CtlError> {
        let Abort { model, change } = args;
        let rollout = self.rollout(model).await?;
        if change.dry_run {
            return self.tell(Plan::of("abort", &rollout, Ppm::default()));
        }
        let started = Instant::now();
        let request = AbortRolloutRequest {
            model: rollout.model,
            uid: rollout.uid,
            reason: change.reason.clone(),
            actor: change.actor.clone(),
            ..AbortRolloutRequest::default()
        };
        let reply = self.admin.rpc.abort_rollout(request).await;
        let written = reply.map_err(|status| self.admin.failed(status))?.into_inner();
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
            return Err(moved_on(&rollout, expected));
        }
        let plan = Plan::of(write.verb(), &rollout, write.share());
        if change.dry_run {
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
                Err(status) if status.code() != Code::Aborted || expect.is_some() || attempt == ATTEMPTS => {
                    return Err(self.admin.failed(status));
                }
                Err(status) => status,
            };
            let fresh = self.rollout(Some(seen.model.clone())).await?;
            if fresh.uid != seen.uid || fresh.canary_ppm != seen.canary_ppm {
                return Err(moved_on(&fresh, seen.store_revision));
            }
            if fresh.store_revision == seen.store_revision {
                return Err(self.admin.failed(status));
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
                    ..SetRolloutRequest::default()
                };
                self.admin.rpc.set_rollout(request).await
            }
            Write::Promote => {
                let request = PromoteRolloutRequest {
                    model,
                    expect_revision,
                    reason,
                    actor,
                    ..PromoteRolloutRequest::default()
                };
                self.admin.rpc.promote_rollout(request).await
            }
        };
        reply.map(tonic::Response::into_inner)
    }

    /// Waits until the change has arrived, unless told not to, and says what came of it.
    async fn finish(
        &mut self,
        goal: Goal,
        written: Rollout,
        started: Instant,
        change: &config::Change,
    ) -> Result<(), CtlError> {
        let span = tracing::Span::current();
        span.set_attribute(attribute::ROLLOUT_UID, written.uid.clone());
        span.set_attribute(
            attribute::GENERATION,
            i64::try_from(written.generation).unwrap_or(i64::MAX),
        );
        span.set_attribute(attribute::CANARY_PPM, i64::from(written.canary_ppm));
        let outcome = if change.no_wait {
            Outcome::written(goal, &written)
        } else {
            let limit = self.admin.timeout;
            Change {
                goal,
                written,
                started,
            }
            .wait(&mut self.admin, self.console, limit)
            .await?
        };
        emit(self.console, self.output, &outcome)
    }

    fn tell(&mut self, plan: Plan) -> Result<(), CtlError> {
        emit(self.console, self.output, &plan)
    }

    async fn rollout(&mut self, model: Option<String>) -> Result<Rollout, CtlError> {
        let status = self.find(model).await?;
        status
            .rollout
            .ok_or_else(|| self.admin.nonsense("a status without its rollout"))
    }

    /// The rollout of `model`, or the only one there is.
    async fn find(&mut self, model: Option<String>) -> Result<RolloutStatus, CtlError> {
        let status = match model {
            Some(model) => {
                let reply = self.admin.rpc.get_rollout(GetRolloutRequest { model }).await;
                reply.map_err(|status| self.admin.failed(status))?.into_inner()
            }
            None => only_rollout(self.all().await?)?,
        };
        if let Some(rollout) = &status.rollout {
            name_span(&rollout.model);
        }
        Ok(status)
    }

    async fn all(&mut self) -> Result<Vec<RolloutStatus>, CtlError> {
        let reply = self.admin.rpc.list_rollouts(ListRolloutsRequest {}).await;
        Ok(reply
            .map_err(|status| self.admin.failed(status))?
            .into_inner()
            .rollouts)
    }

    async fn only_model(&mut self) -> Result<String, CtlError> {
        let reply = self.admin.rpc.list_models(ListPublishedRequest {}).await;
        let models = reply
            .map_err(|status| self.admin.failed(status))?
            .into_inner()
            .models;
        let names: Vec<_> = models.into_iter().map(|model| model.name).collect();
        only("model", "start a worker that serves one", names)
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
        let asks = self.change != "abort" && is_jump(from.get(), to.get());
        let asks = if asks {
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

/// A share that a server told; one above the whole counts as the whole.
fn ppm(share: u32) -> Ppm {
    Ppm::new(share.min(WHOLE)).unwrap_or_default()
}

fn name_span(model: &str) {
    tracing::Span::current().set_attribute(attribute::MODEL, model.to_owned());
}

fn moved_on(rollout: &Rollout, expected: u64) -> CtlError {
    let who = if rollout.actor.is_empty() {
        String::new()
    } else {
        format!(", last changed by {}", rollout.actor)
    };
    CtlError::Conflict(format!(
        "the rollout of {} is at revision {} by now, not at {expected}: {} at {}{who}; look at it with `ctl \
         rollout get`, then try again",
        rollout.model,
        rollout.store_revision,
        view::phase(rollout.phase()),
        share(rollout.canary_ppm)
    ))
}
