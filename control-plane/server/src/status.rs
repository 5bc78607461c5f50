//! What operators are shown.

use std::cmp::Ordering;

use penstock_analysis::Verdict;
use penstock_plan::{
    Action, Phase, Rollout,
    judge::{MetricVerdict, judge},
    planner::{self, Decision},
};
use penstock_proto::{convert, v1};

use crate::{
    controller::inventory,
    gateways::{GatewayState, Gateways},
    now_ms,
    observed::Observed,
    world::{State, Stored},
};

/// A rollout with how far gateways have come and what was observed.
pub(crate) fn rollout(
    state: &State,
    gateways: &Gateways,
    observed: &Observed,
    stored: &Stored<Rollout>,
) -> v1::RolloutStatus {
    let rollout = &stored.value;
    let inventory = inventory(state, gateways, observed, rollout);
    let convergence = planner::converge(&inventory);
    let observations = observed.of(rollout);
    let message = match planner::decide(rollout, &inventory, &observations, now_ms()) {
        Decision::Wait(message) => message,
        Decision::Write(next) => format!("about to be {}", next.phase),
    };
    let nacks = gateways.all().into_iter().filter_map(|(_, gateway)| gateway.nack);
    let sides = observed.sides(rollout);
    let (request_share, token_share) = observations.shares();
    let key_share = Observed::key_share(&sides);
    let [stable_stats, canary_stats] = sides;
    v1::RolloutStatus {
        epoch: convergence.epoch,
        live_gateways: count(convergence.live),
        acknowledged: count(convergence.acknowledged),
        pending: convergence.pending,
        nacks: nacks
            .filter(|nack| convergence.epoch > 0 && nack.epoch >= convergence.epoch)
            .collect(),
        stable_endpoints: count(state.endpoints_of(&rollout.model, rollout.serving_stable())),
        canary_endpoints: count(state.endpoints_of(&rollout.model, &rollout.canary)),
        steps: steps(rollout),
        metrics: judge(rollout, &observations).iter().map(verdict).collect(),
        stable_stats: Some(stable_stats),
        canary_stats: Some(canary_stats),
        key_share,
        request_share,
        token_share,
        next_ms: planner::hold_ends_ms(rollout).unwrap_or_default(),
        points: observed.points(rollout),
        abort_ms: match rollout.phase {
            Phase::RolledBack => rollout.phase_since_ms.saturating_sub(rollout.updated_ms),
            _ => 0,
        },
        rollout: Some(convert::rollout(rollout, stored.mod_revision, message)),
    }
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn steps(rollout: &Rollout) -> Vec<v1::StepStatus> {
    let started = !matches!(rollout.phase, Phase::Pending | Phase::Warming);
    let over = matches!(
        rollout.phase,
        Phase::Draining | Phase::Succeeded | Phase::Promoting
    );
    let step = |(index, step): (usize, &penstock_plan::Step)| v1::StepStatus {
        canary_ppm: step.canary.0.get(),
        hold_ms: step.stays().as_ms(),
        min_samples: step.min_samples.unwrap_or_default(),
        approval: step.approval,
        bake: step.bake.is_some(),
        state: match index.cmp(&rollout.step) {
            _ if over => "done",
            Ordering::Less => "done",
            Ordering::Equal if started => "current",
            _ => "ahead",
        }
        .to_owned(),
        began_ms: rollout.step_began_ms.get(index).copied().unwrap_or_default(),
    };
    rollout.plan.steps.iter().enumerate().map(step).collect()
}

fn verdict(metric: &MetricVerdict) -> v1::MetricVerdict {
    let counts = |counts: penstock_analysis::Counts| v1::Counts {
        requests: counts.n,
        bad: counts.bad,
    };
    v1::MetricVerdict {
        metric: metric.metric.clone(),
        rule: metric.rule.clone(),
        verdict: match metric.verdict {
            Verdict::Pass => v1::Verdict::Pass,
            Verdict::Fail => v1::Verdict::Fail,
            Verdict::Insufficient => v1::Verdict::Insufficient,
        }
        .into(),
        action: match metric.action {
            Action::Abort => "abort",
            Action::Pause => "pause",
            Action::Warn => "warn",
        }
        .to_owned(),
        canary: Some(counts(metric.canary)),
        stable: Some(counts(metric.stable)),
        canary_rate: metric.canary_rate,
        stable_rate: metric.stable_rate,
        lower: metric.bounds.map(|(low, _)| low),
        upper: metric.bounds.map(|(_, high)| high),
        log_evidence: metric.log_evidence,
        log_threshold: metric.log_threshold,
        would_change: metric.would_change.clone(),
        min_samples: metric.min_samples,
    }
}

/// A gateway.
pub(crate) fn gateway(node: String, gateway: GatewayState) -> v1::Gateway {
    v1::Gateway {
        node,
        live: gateway.is_live(),
        silent_ms: u64::try_from(gateway.silent().as_millis()).unwrap_or(u64::MAX),
        boot_id: gateway.boot_id,
        region: gateway.region,
        ops_address: gateway.ops_address,
        acknowledged_epoch: gateway.acknowledged_epoch,
        nack: gateway.nack,
    }
}

/// Every worker, with what is not routed to.
pub(crate) fn workers(state: &State) -> Vec<v1::Worker> {
    let worker = |record: &penstock_plan::WorkerRecord| v1::Worker {
        refused: record
            .revisions
            .iter()
            .filter_map(|served| state.refusal(served))
            .collect(),
        ..v1::Worker::from(record)
    };
    state.workers.values().map(worker).collect()
}

/// Every published revision and its role.
pub(crate) fn models(state: &State, observed: &Observed) -> Vec<v1::PublishedModel> {
    let routes = state.newest_snapshot().map(|snapshot| &snapshot.routes);
    let model = |(name, revisions): (String, Vec<penstock_plan::PublishedRevision>)| {
        let route = routes.and_then(|routes| routes.get(&name));
        let role = |revision: &str| match route {
            Some(route) if route.stable.name == revision => "stable",
            Some(route) if route.canary.as_ref().is_some_and(|c| c.revision.name == revision) => "canary",
            Some(route) if route.revoked.iter().any(|revoked| revoked == revision) => "revoked",
            _ => "",
        };
        let revisions = revisions.into_iter().map(|published| v1::PublishedRevision {
            workers: count(state.endpoints_of(&name, &published.revision)),
            role: if published.retired {
                "retired"
            } else {
                role(&published.revision)
            }
            .to_owned(),
            placements: observed.placements(&name, &published.revision),
            name: published.revision,
            digest: published.digest,
            source: published.source,
        });
        v1::PublishedModel {
            revisions: revisions.collect(),
            requests_per_second: observed.requests_per_second(&name, now_ms()),
            name: name.clone(),
        }
    };
    state.published().into_iter().map(model).collect()
}
