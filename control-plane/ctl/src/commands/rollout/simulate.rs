//! Plans in virtual time.

use super::{Command, manifest};
use crate::{
    config::{Connection, Simulate},
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, View, emit},
};
use penstock_plan::{
    Manifest, parse,
    simulate::{Assumptions, Simulation, simulate},
};
use penstock_proto::v1::{ListGatewaysRequest, ListPublishedRequest};
use serde::Serialize;
use std::time::{SystemTime, UNIX_EPOCH};

/// Simulates a plan; the control plane is asked only for what the arguments leave open.
pub(super) async fn run(
    args: Simulate,
    connection: &Connection,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let plan = match &args.file {
        Some(file) => Some(checked(&manifest::shown(file), &manifest::read(file)?)?),
        None => None,
    };
    let start_ms = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut assumptions = Assumptions {
        stable_error_rate: args.error_rate.fraction(),
        canary_error_rate: args.canary_error_rate.unwrap_or(args.error_rate).fraction(),
        approvals: args.approvals,
        start_ms: start_ms.map_or(0, |since| since.as_millis() as u64),
        seed: args.seed,
        ..Assumptions::default()
    };
    let plan = match (plan, args.rate) {
        (Some(plan), Some(rate)) => {
            assumptions.requests_per_second = rate;
            plan
        }
        (plan, rate) => {
            let admin = Admin::connect(connection).await?;
            let mut command = Command {
                admin,
                output,
                console,
            };
            let plan = match plan {
                Some(plan) => plan,
                None => command.plan_in_force(args.model).await?,
            };
            assumptions.requests_per_second = match rate {
                Some(rate) => rate,
                None => command.present_rate(&plan.model).await?,
            };
            assumptions.gateways = command.live_gateways().await?;
            plan
        }
    };
    // Weeks of requests are drawn one by one; that stays off the threads that serve connections.
    let simulated = tokio::task::spawn_blocking(move || Simulated::new(&plan, &assumptions));
    let simulated = simulated
        .await
        .map_err(|error| CtlError::Usage(format!("the simulation broke off: {error}")))?;
    emit(console, output, &simulated)
}

impl Command<'_> {
    async fn plan_in_force(&mut self, model: Option<String>) -> Result<Manifest, CtlError> {
        let rollout = self.rollout(model).await?;
        checked(
            &format!("the plan in force of {}", rollout.model),
            &rollout.manifest,
        )
    }

    async fn present_rate(&mut self, model: &str) -> Result<f64, CtlError> {
        let reply = self.admin.rpc.list_models(ListPublishedRequest {}).await;
        let models = reply
            .map_err(|status| self.admin.failed(status))?
            .into_inner()
            .models;
        let rate = models
            .iter()
            .find(|published| published.name == model)
            .map_or(0.0, |published| published.requests_per_second);
        if rate > 0.0 {
            return Ok(rate);
        }
        Err(CtlError::Usage(format!(
            "no gateway counts requests for model `{model}` now: say how many to assume, e.g. --rate 20/s"
        )))
    }

    async fn live_gateways(&mut self) -> Result<u32, CtlError> {
        let reply = self.admin.rpc.list_gateways(ListGatewaysRequest {}).await;
        let gateways = reply
            .map_err(|status| self.admin.failed(status))?
            .into_inner()
            .gateways;
        let live = gateways.iter().filter(|gateway| gateway.live).count();
        Ok(u32::try_from(live).unwrap_or(u32::MAX).max(1))
    }
}

fn checked(path: &str, text: &str) -> Result<Manifest, CtlError> {
    parse::parse(text).map(|(plan, _)| plan).map_err(|findings| {
        let first = findings
            .first()
            .map(|found| format!("{path}:{}: {}: {}", found.line, found.path, found.message));
        CtlError::Usage(first.unwrap_or_else(|| format!("{path} is no manifest")))
    })
}

/// What came of a plan in virtual time.
#[derive(Debug, Serialize)]
struct Simulated {
    model: String,
    requests_per_second: f64,
    stable_error_rate: f64,
    canary_error_rate: f64,
    gateways: u32,
    outcome: String,
    took_s: f64,
    events: Vec<Event>,
    steps: Vec<Odds>,
    /// Odds that a canary as good as stable is rolled back.
    false_abort: f64,
    alpha: f64,
    #[serde(skip)]
    told: String,
}

#[derive(Debug, Serialize)]
struct Event {
    at_s: f64,
    event: String,
}

#[derive(Debug, Serialize)]
struct Odds {
    canary: String,
    stays_s: f64,
    /// Median seconds until a canary twice as bad is noticed; null where that may never be.
    twice_as_bad_s: Option<f64>,
    five_times_as_bad_s: Option<f64>,
}

impl Simulated {
    fn new(plan: &Manifest, assumptions: &Assumptions) -> Self {
        let simulation: Simulation = simulate(plan, assumptions);
        let seconds = |ms: u64| ms as f64 / 1000.0;
        let events = simulation.events.iter().map(|(at, event)| Event {
            at_s: seconds(*at),
            event: event.clone(),
        });
        let steps = simulation.steps.iter().map(|step| Odds {
            canary: step.share.to_string(),
            stays_s: step.stays.get().as_secs_f64(),
            twice_as_bad_s: step.twice_s,
            five_times_as_bad_s: step.five_times_s,
        });
        Self {
            model: plan.model.clone(),
            requests_per_second: assumptions.requests_per_second,
            stable_error_rate: assumptions.stable_error_rate,
            canary_error_rate: assumptions.canary_error_rate,
            gateways: assumptions.gateways,
            outcome: simulation.outcome.to_string(),
            took_s: seconds(simulation.took_ms),
            events: events.collect(),
            steps: steps.collect(),
            false_abort: simulation.false_abort,
            alpha: simulation.alpha,
            told: simulation.to_string(),
        }
    }
}

impl View for Simulated {
    fn table(&self) -> String {
        format!(
            "{} at {:.3} requests/s, errors {:.3} % on stable and {:.3} % on the canary, gateways: {}\n\n{}\n",
            self.model,
            self.requests_per_second,
            self.stable_error_rate * 100.0,
            self.canary_error_rate * 100.0,
            self.gateways,
            self.told
        )
    }
}
