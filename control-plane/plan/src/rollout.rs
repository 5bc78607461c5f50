//! A rollout and what operators may do to it.
//!
//! Every plan is a new value with the old one as its parent; nothing is changed in place. Whoever writes one
//! compares the store's revision of the parent, so that of two operators one wins and the other is told.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Ppm, Sticky};

/// Where a rollout stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Written; live gateways have not all acknowledged the share yet.
    Converging,
    /// Acknowledged by every live gateway; the share stays until an operator changes it.
    Paused,
    /// The canary gets everything and becomes stable when every live gateway has acknowledged.
    Promoting,
    /// The canary is stable.
    Succeeded,
    /// Stable gets everything; gateways have not all acknowledged yet.
    Aborting,
    /// Stable serves, everywhere.
    RolledBack,
}

/// One plan of a rollout; the value of its key in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateRollout {
    /// Fresh and unique.
    pub uid: String,
    /// Name of the model.
    pub model: String,
    /// The revision that serves now.
    pub stable: String,
    /// The revision to try.
    pub canary: String,
    /// First share.
    pub share: Ppm,
    /// What keeps a user on one side.
    pub sticky: Sticky,
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
            Self::Converging => "converging",
            Self::Paused => "paused",
            Self::Promoting => "promoting",
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
        // A revision that is tried again is no longer revoked.
        let mut revoked = previous
            .map(|previous| previous.revoked.clone())
            .unwrap_or_default();
        revoked.retain(|name| *name != new.canary && *name != new.stable);
        Ok(Self {
            uid: new.uid,
            model: new.model,
            stable: new.stable,
            canary: new.canary,
            share: new.share,
            phase: Phase::Converging,
            generation: 1,
            parent: None,
            sticky: new.sticky,
            revoked,
            created_ms: change.now_ms,
            updated_ms: change.now_ms,
            actor: change.actor,
            reason: change.reason,
            traceparent: change.traceparent,
        })
    }

    /// The canary's share becomes `share`.
    ///
    /// # Errors
    /// The rollout is being promoted or aborted, or is over.
    pub fn set(&self, share: Ppm, change: Change) -> Result<Self, RolloutError> {
        self.needs(&[Phase::Converging, Phase::Paused], "setting a share")?;
        Ok(Self {
            share,
            ..self.replanned(Phase::Converging, change)
        })
    }

    /// The canary gets everything, and becomes stable once that is acknowledged.
    ///
    /// # Errors
    /// The rollout is being promoted or aborted, or is over.
    pub fn promote(&self, change: Change) -> Result<Self, RolloutError> {
        self.needs(&[Phase::Converging, Phase::Paused], "promoting")?;
        Ok(Self {
            share: Ppm::ALL,
            ..self.replanned(Phase::Promoting, change)
        })
    }

    /// Stable gets everything; share and pins go together. `uid` empty aborts whichever rollout is there.
    ///
    /// Aborting what is being aborted or is rolled back changes nothing and is no error.
    ///
    /// # Errors
    /// The rollout is another one, or has succeeded.
    pub fn abort(&self, uid: &str, change: Change) -> Result<Self, RolloutError> {
        if !uid.is_empty() && uid != self.uid {
            let (expected, found) = (uid.to_owned(), self.uid.clone());
            return Err(RolloutError::OtherUid {
                model: self.model.clone(),
                expected,
                found,
            });
        }
        match self.phase {
            Phase::Aborting | Phase::RolledBack => Ok(self.clone()),
            Phase::Succeeded => self.needs(&[], "aborting").map(|()| self.clone()),
            Phase::Converging | Phase::Paused | Phase::Promoting => {
                let mut next = Self {
                    share: Ppm::ZERO,
                    ..self.replanned(Phase::Aborting, change)
                };
                next.revoked.push(self.canary.clone());
                Ok(next)
            }
        }
    }

    /// The revision that serves what no canary gets.
    pub fn serving_stable(&self) -> &str {
        match self.phase {
            Phase::Succeeded => &self.canary,
            _ => &self.stable,
        }
    }

    /// The same plan in a later phase; the route is the same, so the generation is too.
    pub(crate) fn in_phase(&self, phase: Phase) -> Self {
        Self {
            phase,
            ..self.clone()
        }
    }

    /// The next plan.
    pub(crate) fn replanned(&self, phase: Phase, change: Change) -> Self {
        Self {
            phase,
            generation: self.generation + 1,
            parent: Some(self.generation),
            updated_ms: change.now_ms,
            actor: change.actor,
            reason: change.reason,
            traceparent: change.traceparent,
            ..self.clone()
        }
    }

    fn needs(&self, phases: &[Phase], change: &'static str) -> Result<(), RolloutError> {
        if phases.contains(&self.phase) {
            return Ok(());
        }
        let remedy = match self.phase {
            Phase::Promoting => "wait until it has succeeded, or abort it",
            Phase::Aborting => "wait until it is rolled back",
            _ => "it is over; create a new rollout",
        };
        Err(RolloutError::Phase {
            model: self.model.clone(),
            phase: self.phase,
            change,
            remedy,
        })
    }
}

#[cfg(test)]
mod tests;
