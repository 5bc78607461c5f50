//! `ctl rollout …`.

mod amend;
mod manifest;
mod report;
mod share;
mod simulate;

use super::pick::{only, only_rollout};
use crate::{
    config::{self, Connection, RolloutVerb},
    connect::Admin,
    console::Console,
    converge::{Change, Goal, Outcome},
    error::CtlError,
    output::{Format, emit},
};
use penstock_plan::Ppm;
use penstock_proto::v1::{
    GetRolloutRequest, ListPublishedRequest, ListRolloutsRequest, Rollout, RolloutStatus,
};
use penstock_telemetry::{OpenTelemetrySpanExt as _, semconv::attribute};
use tokio::time::Instant;

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
    let admin = match &verb {
        // Nobody needs to be asked.
        RolloutVerb::Lint(args) => return manifest::check(args, output, console),
        RolloutVerb::Simulate(args) => {
            return simulate::run(args.clone(), connection, output, console).await;
        }
        RolloutVerb::Wait(_) => Admin::connect(&connection.patient()).await?,
        _ => Admin::connect(connection).await?,
    };
    let mut command = Command {
        admin,
        output,
        console,
    };
    match verb {
        RolloutVerb::Create(args) => command.create(args).await,
        RolloutVerb::Apply(args) => command.apply(args).await,
        RolloutVerb::Get(args) => command.get(args).await,
        RolloutVerb::List(args) => command.list(args.watch).await,
        RolloutVerb::Set(args) => command.set(args).await,
        RolloutVerb::Step(args) => command.step(args).await,
        RolloutVerb::Pause(args) => command.amend(amend::Amendment::Pause, args).await,
        RolloutVerb::Resume(args) => command.amend(amend::Amendment::Resume, args).await,
        RolloutVerb::Approve(args) => command.amend(amend::Amendment::Approve, args).await,
        RolloutVerb::Promote(args) => command.promote(args).await,
        RolloutVerb::Abort(args) => command.abort(args).await,
        RolloutVerb::Retry(args) => command.amend(amend::Amendment::Retry, args).await,
        RolloutVerb::Undo(args) => command.undo(args).await,
        RolloutVerb::History(args) => command.history(args).await,
        RolloutVerb::Explain(args) => command.explain(args.model).await,
        RolloutVerb::Diff(args) => command.diff(args).await,
        RolloutVerb::Lint(_) | RolloutVerb::Simulate(_) => Ok(()),
        RolloutVerb::Wait(args) => command.wait(args.model, connection.limit).await,
    }
}

struct Command<'a> {
    admin: Admin,
    output: Format,
    console: &'a mut Console,
}

impl Command<'_> {
    /// Waits until the change has arrived, unless told not to, and says what came of it.
    async fn finish(
        &mut self,
        goal: Goal,
        written: Rollout,
        started: Instant,
        change: &config::Change,
    ) -> Result<(), CtlError> {
        let outcome = self.arrived(goal, written, started, change).await?;
        emit(self.console, self.output, &outcome)
    }

    /// Waits until the change has arrived, unless told not to.
    async fn arrived(
        &mut self,
        goal: Goal,
        written: Rollout,
        started: Instant,
        change: &config::Change,
    ) -> Result<Outcome, CtlError> {
        let span = tracing::Span::current();
        span.set_attribute(attribute::ROLLOUT_UID, written.uid.clone());
        span.set_attribute(
            attribute::GENERATION,
            i64::try_from(written.generation).unwrap_or(i64::MAX),
        );
        span.set_attribute(attribute::CANARY_PPM, i64::from(written.canary_ppm));
        if change.no_wait {
            return Ok(Outcome::written(goal, &written));
        }
        let limit = self.admin.timeout;
        Change {
            goal,
            written,
            started,
        }
        .wait(&mut self.admin, self.console, limit)
        .await
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

/// A share that a server told; one above the whole counts as the whole.
fn ppm(share: u32) -> Ppm {
    Ppm::new(share.min(WHOLE)).unwrap_or_default()
}

fn name_span(model: &str) {
    tracing::Span::current().set_attribute(attribute::MODEL, model.to_owned());
}
