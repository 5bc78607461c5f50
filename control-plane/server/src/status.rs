//! What operators are shown.

use penstock_plan::{
    Observations, Rollout,
    planner::{self, Decision},
};
use penstock_proto::{convert, v1};

use crate::{
    gateways::{GatewayState, Gateways},
    now_ms,
    world::{State, Stored},
};

/// A rollout with how far gateways have come.
pub(crate) fn rollout(state: &State, gateways: &Gateways, stored: &Stored<Rollout>) -> v1::RolloutStatus {
    let rollout = &stored.value;
    let inventory = gateways.inventory(state.published_epoch(rollout));
    let convergence = planner::converge(&inventory);
    let message = match planner::decide(rollout, &inventory, &Observations::default(), now_ms()) {
        Decision::Wait(message) => message,
        Decision::Write(next) => format!("about to be {}", next.phase),
    };
    let nacks = gateways.all().into_iter().filter_map(|(_, gateway)| gateway.nack);
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
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
        rollout: Some(convert::rollout(rollout, stored.mod_revision, message)),
        ..v1::RolloutStatus::default()
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
pub(crate) fn models(state: &State) -> Vec<v1::PublishedModel> {
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
            workers: u32::try_from(state.endpoints_of(&name, &published.revision)).unwrap_or(u32::MAX),
            role: role(&published.revision).to_owned(),
            name: published.revision,
            digest: published.digest,
            ..v1::PublishedRevision::default()
        });
        v1::PublishedModel {
            revisions: revisions.collect(),
            name: name.clone(),
        }
    };
    state.published().into_iter().map(model).collect()
}
