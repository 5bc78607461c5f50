//! What happens next to a rollout: a pure function of the plan and of what is known about the gateways.

use crate::{Change, Phase, Rollout};

/// One gateway as the control plane sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayView {
    /// Its name.
    pub node: String,
    /// Whether it said something lately.
    pub live: bool,
    /// Last epoch that it acknowledged.
    pub acknowledged_epoch: u64,
    /// Epoch that it refused last, with the reason, unless it acknowledged a later one.
    pub refused: Option<(u64, String)>,
}

/// What is known when a decision is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// First epoch that carries the rollout's generation; `None` until it is published.
    pub published_epoch: Option<u64>,
    /// Every gateway that ever connected.
    pub gateways: Vec<GatewayView>,
    /// When this control plane began to accept gateways, in milliseconds since the Unix epoch.
    pub listening_since_ms: u64,
}

/// How far live gateways have come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Convergence {
    /// Epoch to acknowledge; 0 until it is published.
    pub epoch: u64,
    /// Live gateways.
    pub live: usize,
    /// Those of them that have acknowledged it.
    pub acknowledged: usize,
    /// Names of those that have not.
    pub pending: Vec<String>,
    /// Names and reasons of those that refused it.
    pub refused: Vec<(String, String)>,
}

/// A gateway that says nothing for this long is lost. A control plane that started less than this
/// ago may not have heard of gateways that live.
pub const LIVENESS_MS: u64 = 15_000;

/// What happens next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Write this plan in place of the present one.
    Write(Box<Rollout>),
    /// Nothing to do; why, in words.
    Wait(String),
}

/// Decides what happens next. `now_ms` is in milliseconds since the Unix epoch.
///
/// No step is taken before every live gateway has acknowledged the plan; a lost gateway holds nothing up, since
/// it cannot be reached anyway and is brought up to date by its next Hello. An abort is held to more: `RolledBack`
/// promises that no live gateway sends anything to the canary, so a control plane that has just started first
/// gives gateways the time to come back.
pub fn decide(rollout: &Rollout, inventory: &Inventory, now_ms: u64) -> Decision {
    let convergence = converge(inventory);
    if let (Some((node, reason)), false) = (convergence.refused.first(), rollout.phase.is_final()) {
        return Decision::Wait(format!("{node} refused epoch {}: {reason}", convergence.epoch));
    }
    let converged = inventory.published_epoch.is_some() && convergence.pending.is_empty();
    match (rollout.phase, converged) {
        (Phase::Converging, true) => write(rollout.in_phase(Phase::Paused)),
        (Phase::Aborting, true) if now_ms < inventory.listening_since_ms.saturating_add(LIVENESS_MS) => {
            Decision::Wait("waiting for gateways to come back after a start of the control plane".into())
        }
        (Phase::Aborting, true) => write(rollout.in_phase(Phase::RolledBack)),
        // The route changes: the canary is stable from now on.
        (Phase::Promoting, true) => {
            let change = Change {
                actor: rollout.actor.clone(),
                reason: rollout.reason.clone(),
                now_ms,
                traceparent: rollout.traceparent.clone(),
            };
            write(rollout.replanned(Phase::Succeeded, change))
        }
        (Phase::Converging | Phase::Aborting | Phase::Promoting, false) => {
            Decision::Wait(waiting(&convergence))
        }
        (Phase::Paused, _) => Decision::Wait("holds its share until an operator changes it".into()),
        (Phase::Succeeded, _) => Decision::Wait(format!("{} is stable", rollout.canary)),
        (Phase::RolledBack, _) => Decision::Wait(format!("{} serves", rollout.stable)),
    }
}

/// How far live gateways have come with the published epoch.
pub fn converge(inventory: &Inventory) -> Convergence {
    let epoch = inventory.published_epoch.unwrap_or_default();
    let mut convergence = Convergence {
        epoch,
        ..Convergence::default()
    };
    for gateway in inventory.gateways.iter().filter(|gateway| gateway.live) {
        convergence.live += 1;
        if epoch > 0 && gateway.acknowledged_epoch >= epoch {
            convergence.acknowledged += 1;
            continue;
        }
        convergence.pending.push(gateway.node.clone());
        if let Some((refused, reason)) = &gateway.refused
            && epoch > 0
            && *refused >= epoch
        {
            convergence.refused.push((gateway.node.clone(), reason.clone()));
        }
    }
    convergence
}

fn write(rollout: Rollout) -> Decision {
    Decision::Write(Box::new(rollout))
}

fn waiting(convergence: &Convergence) -> String {
    if convergence.epoch == 0 {
        return "waiting for its snapshot to be published".into();
    }
    format!(
        "waiting for {} to acknowledge epoch {}",
        convergence.pending.join(", "),
        convergence.epoch
    )
}

#[cfg(test)]
mod tests;
