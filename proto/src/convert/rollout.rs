//! Rollouts as operators see them.

use penstock_plan::{PauseReason, Phase, Rollout};

use super::ConvertError;
use crate::v1;

/// A rollout as operators see it, written at `store_revision`; `message` says in words where it stands.
///
/// There is no way back: the wire leaves out what only the control plane needs (the aborted revisions and the
/// change's trace context), and nobody but the control plane makes plans.
pub fn rollout(rollout: &Rollout, store_revision: u64, message: impl Into<String>) -> v1::Rollout {
    v1::Rollout {
        uid: rollout.uid.clone(),
        model: rollout.model.clone(),
        stable: rollout.stable.clone(),
        canary: rollout.canary.clone(),
        canary_ppm: rollout.share.get(),
        phase: v1::Phase::from(rollout.phase).into(),
        generation: rollout.generation,
        store_revision,
        sticky: Some((&rollout.sticky).into()),
        created_ms: rollout.created_ms,
        updated_ms: rollout.updated_ms,
        actor: rollout.actor.clone(),
        reason: rollout.reason.clone(),
        message: message.into(),
        manifest: serde_norway::to_string(&rollout.plan).unwrap_or_default(),
        step: count(rollout.step),
        steps: count(rollout.plan.steps.len()),
        attempt: rollout.attempt,
        pause: rollout
            .pause
            .map_or(v1::PauseReason::Unspecified, |pause| pause.why.into())
            .into(),
        phase_since_ms: rollout.phase_since_ms,
        cause: rollout.cause.clone(),
        queued: rollout
            .next
            .as_ref()
            .map(|next| next.plan.canary.revision.clone())
            .unwrap_or_default(),
    }
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl From<PauseReason> for v1::PauseReason {
    fn from(why: PauseReason) -> Self {
        match why {
            PauseReason::Manual => Self::Manual,
            PauseReason::Insufficient => Self::Insufficient,
            PauseReason::Approval => Self::Approval,
            PauseReason::Nacked => Self::Nacked,
            PauseReason::Window => Self::Window,
            PauseReason::Verdict => Self::Verdict,
        }
    }
}

impl From<Phase> for v1::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Pending => Self::Pending,
            Phase::Warming => Self::Warming,
            Phase::Converging => Self::Converging,
            Phase::Soaking => Self::Soaking,
            Phase::Judging => Self::Judging,
            Phase::Baking => Self::Baking,
            Phase::Paused => Self::Paused,
            Phase::Promoting => Self::Promoting,
            Phase::Draining => Self::Draining,
            Phase::Succeeded => Self::Succeeded,
            Phase::Aborting => Self::Aborting,
            Phase::RolledBack => Self::RolledBack,
        }
    }
}

impl TryFrom<v1::Phase> for Phase {
    type Error = ConvertError;

    fn try_from(wire: v1::Phase) -> Result<Self, ConvertError> {
        match wire {
            v1::Phase::Unspecified => Err(ConvertError::new("phase", "it is missing")),
            v1::Phase::Pending => Ok(Self::Pending),
            v1::Phase::Warming => Ok(Self::Warming),
            v1::Phase::Converging => Ok(Self::Converging),
            v1::Phase::Soaking => Ok(Self::Soaking),
            v1::Phase::Judging => Ok(Self::Judging),
            v1::Phase::Baking => Ok(Self::Baking),
            v1::Phase::Paused => Ok(Self::Paused),
            v1::Phase::Promoting => Ok(Self::Promoting),
            v1::Phase::Draining => Ok(Self::Draining),
            v1::Phase::Succeeded => Ok(Self::Succeeded),
            v1::Phase::Aborting => Ok(Self::Aborting),
            v1::Phase::RolledBack => Ok(Self::RolledBack),
        }
    }
}
