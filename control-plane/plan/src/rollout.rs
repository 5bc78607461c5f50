//! A rollout and what operators may do to it.
//!
//! Every plan is a new value with the old one as its parent; nothing is changed in place. Whoever writes one
//! compares the store's revision of the parent, so that of two operators one wins and the other is told.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Manifest, Ppm, Step, Sticky};

mod changes;

/// Where a rollout stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Written, nothing routed yet: it waits for its window.
    Pending,
    /// Workers load and warm the canary; nothing is routed to it yet.
    Warming,
    /// Written; live gateways have not all acknowledged the share yet.
    Converging,
    /// The step's share is acknowledged and its hold runs.
    Soaking,
    /// The hold is over, the evidence does not suffice yet.
    Judging,
    /// The last step's share is acknowledged and watched for a while before the canary becomes stable.
    Baking,
    /// The share stays until something else happens: see [`Pause`].
    Paused,
    /// The canary gets everything and becomes stable when every live gateway has acknowledged.
    Promoting,
    /// The canary is stable; the old revision's last requests end.
    Draining,
    /// The canary is stable.
    Succeeded,
    /// Stable gets everything; gateways have not all acknowledged yet.
    Aborting,
    /// Stable serves, everywhere.
    RolledBack,
}

/// Why a rollout is paused, and where it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Why.
    pub why: PauseReason,
    /// The phase that it left.
    pub from: Phase,
}

/// Why a rollout is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// An operator said so, or set the share by hand.
    Manual,
    /// The samples do not suffice and the plan says to pause then.
    Insufficient,
    /// The next step needs an operator's agreement.
    Approval,
    /// A gateway refused the plan; it goes on when all have acknowledged after all.
    Nacked,
    /// The calendar window is closed; it goes on when that opens.
    Window,
    /// A metric whose action is to pause has failed.
    Verdict,
}

/// One plan of a rollout; the value of its key in the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// Chosen at creation; the salt of the bucket, so that each rollout tries other users first.
    pub uid: String,
    /// Name of the model.
    pub model: String,
    /// The revision that served before.
    pub stable: String,
    /// The revision being tried.
    pub canary: String,
    /// The canary's share of the keys.
    pub share: Ppm,
    /// Where it stands.
    pub phase: Phase,
    /// Counts the plans of this rollout, from 1; grows whenever the route changes.
    pub generation: u64,
    /// The plan that this one replaced.
    pub parent: Option<u64>,
    /// What keeps a user on one side.
    pub sticky: Sticky,
    /// Aborted revisions of this model, this rollout's own among them once it is aborted.
    #[serde(default)]
    pub revoked: Vec<String>,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// When this plan was written, likewise.
    pub updated_ms: u64,
    /// Who wrote this plan.
    #[serde(default)]
    pub actor: String,
    /// Why.
    #[serde(default)]
    pub reason: String,
    /// W3C trace context of the change, so that every gateway's swap joins its trace.
    #[serde(default)]
    pub traceparent: String,
    /// What was applied; for a rollout set by hand, a plan without steps.
    #[serde(default)]
    pub plan: Manifest,
    /// Index of the present step, from 0; of no meaning without steps.
    #[serde(default)]
    pub step: usize,
    /// Counts the tries, from 1.
    #[serde(default = "one")]
    pub attempt: u32,
    /// Counts the shares of this try, from 0: observations of one trial are never added to another's.
    #[serde(default)]
    pub trial: u32,
    /// Set in [`Phase::Paused`].
    #[serde(default)]
    pub pause: Option<Pause>,
    /// When the present phase began, in milliseconds since the Unix epoch.
    #[serde(default)]
    pub phase_since_ms: u64,
    /// Part of the present step's hold that was over before a pause, in milliseconds.
    #[serde(default)]
    pub held_ms: u64,
    /// When each step began, in milliseconds since the Unix epoch.
    #[serde(default)]
    pub step_began_ms: Vec<u64>,
    /// An operator has agreed to go on from the present step.
    #[serde(default)]
    pub approved: bool,
    /// The trial in which an operator went on in spite of a metric that asks for a pause.
    #[serde(default)]
    pub excused: Option<u32>,
    /// An operator set the present share: it stays until they resume, even where a step has the same share.
    #[serde(default)]
    pub by_hand: bool,
    /// What made it roll back or pause, in words.
    #[serde(default)]
    pub cause: String,
    /// The rollout that starts when this one is over.
    #[serde(default)]
    pub next: Option<Box<Queued>>,
}

/// A rollout that waits for the one before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Queued {
    /// Its uid.
    pub uid: String,
    /// What was applied.
    pub plan: Manifest,
    /// Who applied it.
    pub actor: String,
    /// Why.
    pub reason: String,
}

const fn one() -> u32 {
    1
}

/// Who changes a plan, when and why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Who.
    pub actor: String,
    /// Why; may be empty.
    pub reason: String,
    /// When, in milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// W3C trace context, or empty.
    pub traceparent: String,
}

/// What a new rollout needs.
#[derive(Debug, Clone, PartialEq)]
pub struct CreateRollout {
    /// Fresh and unique.
    pub uid: String,
    /// Name of the model.
    pub model: String,
    /// The revision that serves now.
    pub stable: String,
    /// The revision to try.
    pub canary: String,
    /// First share, where the plan has no steps.
    pub share: Ppm,
    /// The plan.
    pub plan: Manifest,
}

/// Why a rollout cannot be changed so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RolloutError {
    /// Another rollout of the model is under way.
    #[error("model {model} has a rollout already ({phase}); promote or abort it first")]
    Active {
        /// The model.
        model: String,
        /// Where that rollout stands.
        phase: Phase,
    },
    /// Stable and canary are one revision.
    #[error("stable and canary are both {0:?}; a rollout needs two revisions")]
    SameRevision(String),
    /// The plan has no such step.
    #[error("the rollout of {model} has no step {step}; its steps are 0 to {last}")]
    NoStep {
        /// The model.
        model: String,
        /// What was asked for.
        step: usize,
        /// Index of the last step.
        last: usize,
    },
    /// The rollout is set by hand.
    #[error("the rollout of {model} has no steps; set its share, or apply a plan with steps")]
    Stepless {
        /// The model.
        model: String,
    },
    /// Another revision serves since the last rollout, and would lose all its traffic at once.
    #[error(
        "{serving:?} serves {model} now: a rollout cannot start from {stable:?}; leave stable out or name {serving:?}"
    )]
    NotServing {
        /// The model.
        model: String,
        /// What was named as stable.
        stable: String,
        /// What serves.
        serving: String,
    },
    /// The phase forbids the change.
    #[error("the rollout of {model} is {phase}: {change} is not possible; {remedy}")]
    Phase {
        /// The model.
        model: String,
        /// Where it stands.
        phase: Phase,
        /// What was asked for.
        change: &'static str,
        /// What to do instead.
        remedy: &'static str,
    },
    /// The abort was meant for another rollout.
    #[error("the rollout of {model} is {found}, not {expected}; nothing was aborted")]
    OtherUid {
        /// The model.
        model: String,
        /// What was meant.
        expected: String,
        /// What is there.
        found: String,
    },
}

// === impl Phase ===

impl Phase {
    /// As it stands in tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Warming => "warming",
            Self::Converging => "converging",
            Self::Soaking => "soaking",
            Self::Judging => "judging",
            Self::Baking => "baking",
            Self::Paused => "paused",
            Self::Promoting => "promoting",
            Self::Draining => "draining",
            Self::Succeeded => "succeeded",
            Self::Aborting => "aborting",
            Self::RolledBack => "rolled_back",
        }
    }

    /// Nothing more happens to a rollout in this phase; a new one may be created.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::RolledBack)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

// === impl PauseReason ===

impl PauseReason {
    /// As it stands in tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Insufficient => "insufficient",
            Self::Approval => "approval",
            Self::Nacked => "nacked",
            Self::Window => "window",
            Self::Verdict => "verdict",
        }
    }
}

impl fmt::Display for PauseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

// === impl Rollout ===

impl Rollout {
    /// A new rollout in place of `previous`, which must be over.
    ///
    /// # Errors
    /// Another rollout is under way, another revision serves, or stable and canary are one.
    pub fn create(new: CreateRollout, previous: Option<&Self>, change: Change) -> Result<Self, RolloutError> {
        if let Some(previous) = previous.filter(|previous| !previous.phase.is_final()) {
            return Err(RolloutError::Active {
                model: previous.model.clone(),
                phase: previous.phase,
            });
        }
        if new.stable == new.canary {
            return Err(RolloutError::SameRevision(new.canary));
        }
        if let Some(serving) = previous
            .map(Self::serving_stable)
            .filter(|serving| *serving != new.stable)
        {
            let serving = serving.to_owned();
            return Err(RolloutError::NotServing {
                model: new.model,
                stable: new.stable,
                serving,
            });
        }
        Ok(Self::fresh(new, previous, change))
    }

    fn fresh(new: CreateRollout, previous: Option<&Self>, change: Change) -> Self {
        // A revision that is tried again is no longer revoked.
        let mut revoked = previous
            .map(|previous| previous.revoked.clone())
            .unwrap_or_default();
        revoked.retain(|name| *name != new.canary && *name != new.stable);
        let stepped = !new.plan.steps.is_empty();
        Self {
            uid: new.uid,
            model: new.model,
            stable: new.stable,
            canary: new.canary,
            share: if stepped { Ppm::ZERO } else { new.share },
            // A share set by hand needs a canary that serves already; the steps of a plan wait for one.
            phase: if stepped {
                Phase::Pending
            } else {
                Phase::Converging
            },
            generation: 1,
            parent: None,
            sticky: (&new.plan.sticky).into(),
            revoked,
            created_ms: change.now_ms,
            updated_ms: change.now_ms,
            actor: change.actor,
            reason: change.reason,
            traceparent: change.traceparent,
            plan: new.plan,
            step: 0,
            attempt: 1,
            trial: 0,
            pause: None,
            phase_since_ms: change.now_ms,
            held_ms: 0,
            step_began_ms: Vec::new(),
            approved: false,
            excused: None,
            by_hand: false,
            cause: String::new(),
            next: None,
        }
    }

    /// The revision that serves what no canary gets.
    pub fn serving_stable(&self) -> &str {
        match self.phase {
            Phase::Draining | Phase::Succeeded => &self.canary,
            _ => &self.stable,
        }
    }

    /// The present step, where the rollout has steps.
    pub fn current_step(&self) -> Option<&Step> {
        self.plan.steps.get(self.step)
    }

    /// Whether anything is routed to the canary.
    pub const fn routes_canary(&self) -> bool {
        match self.phase {
            Phase::Converging | Phase::Soaking | Phase::Judging | Phase::Baking | Phase::Promoting => true,
            Phase::Paused => !matches!(
                self.pause,
                Some(Pause {
                    from: Phase::Pending | Phase::Warming,
                    ..
                })
            ),
            Phase::Pending
            | Phase::Warming
            | Phase::Draining
            | Phase::Succeeded
            | Phase::Aborting
            | Phase::RolledBack => false,
        }
    }

    /// The same plan in a later phase; the route is the same, so the generation is too.
    pub(crate) fn in_phase(&self, phase: Phase, now_ms: u64) -> Self {
        Self {
            phase,
            phase_since_ms: now_ms,
            pause: None,
            ..self.clone()
        }
    }

    /// The next plan, which changes the route.
    pub(crate) fn replanned(&self, phase: Phase, change: Change) -> Self {
        Self {
            generation: self.generation + 1,
            parent: Some(self.generation),
            updated_ms: change.now_ms,
            actor: change.actor,
            reason: change.reason,
            traceparent: change.traceparent,
            ..self.in_phase(phase, change.now_ms)
        }
    }
}

#[cfg(test)]
mod tests;
