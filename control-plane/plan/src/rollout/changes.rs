//! What operators may do to a rollout.

use super::{Change, CreateRollout, Pause, PauseReason, Phase, Queued, Rollout, RolloutError};
use crate::{Manifest, OnNew, Ppm};

/// Phases in which the canary's share is an operator's to change.
const OPEN: [Phase; 7] = [
    Phase::Pending,
    Phase::Warming,
    Phase::Converging,
    Phase::Soaking,
    Phase::Judging,
    Phase::Baking,
    Phase::Paused,
];

// === impl Rollout ===

impl Rollout {
    /// The canary's share becomes `share`. A rollout with steps is left paused there: `resume` goes on at the next
    /// higher step.
    ///
    /// # Errors
    /// The rollout is being promoted or aborted, or is over.
    pub fn set(&self, share: Ppm, change: Change) -> Result<Self, RolloutError> {
        self.needs(&OPEN, "setting a share")?;
        Ok(Self {
            share,
            by_hand: true,
            ..self.next_trial(change)
        })
    }

    /// Goes to the step at `index`, or to the next one.
    ///
    /// # Errors
    /// There is no such step, or the rollout is being promoted or aborted, or is over.
    pub fn step_to(&self, index: Option<usize>, change: Change) -> Result<Self, RolloutError> {
        self.needs(&OPEN, "taking a step")?;
        let model = self.model.clone();
        let Some(last) = self.plan.steps.len().checked_sub(1) else {
            return Err(RolloutError::Stepless { model });
        };
        let step = index.unwrap_or_else(|| self.next_higher_step().unwrap_or(last));
        let Some(target) = self.plan.steps.get(step) else {
            return Err(RolloutError::NoStep { model, step, last });
        };
        Ok(self.at_step(step, target.canary.0, change))
    }

    /// The canary gets everything, and becomes stable once that is acknowledged.
    ///
    /// # Errors
    /// The rollout is being promoted or aborted, or is over.
    pub fn promote(&self, change: Change) -> Result<Self, RolloutError> {
        self.needs(&OPEN, "promoting")?;
        Ok(Self {
            share: Ppm::ALL,
            trial: self.trial + 1,
            ..self.replanned(Phase::Promoting, change)
        })
    }

    /// Stays where it is until it is resumed.
    ///
    /// # Errors
    /// It is paused by an operator already, is being promoted or aborted, or is over.
    pub fn pause(&self, change: &Change) -> Result<Self, RolloutError> {
        self.needs(&OPEN, "pausing")?;
        let from = match self.pause {
            Some(Pause {
                why: PauseReason::Manual,
                ..
            }) => return Ok(self.clone()),
            Some(pause) => pause.from,
            None => self.phase,
        };
        Ok(Self {
            actor: change.actor.clone(),
            reason: change.reason.clone(),
            updated_ms: change.now_ms,
            ..self.paused(PauseReason::Manual, from, change.now_ms)
        })
    }

    /// Goes on from a pause: with a share set by hand at the next higher step, else where it was.
    ///
    /// # Errors
    /// It is not paused, waits for an approval, or has no steps to go on with.
    pub fn resume(&self, change: Change) -> Result<Self, RolloutError> {
        self.needs(&[Phase::Paused], "resuming")?;
        let Some(pause) = self.pause else {
            return Err(RolloutError::Stepless {
                model: self.model.clone(),
            });
        };
        if pause.why == PauseReason::Approval {
            return Err(RolloutError::Phase {
                model: self.model.clone(),
                phase: self.phase,
                change: "resuming",
                remedy: "it waits for an approval: approve it",
            });
        }
        if matches!(pause.from, Phase::Pending | Phase::Warming) {
            return Ok(self.in_phase(pause.from, change.now_ms));
        }
        let excused = (pause.why == PauseReason::Verdict)
            .then_some(self.trial)
            .or(self.excused);
        let on_step = self
            .current_step()
            .is_some_and(|step| step.canary.0 == self.share && !self.by_hand);
        match self.next_higher_step() {
            _ if on_step => Ok(Self {
                actor: change.actor,
                reason: change.reason,
                updated_ms: change.now_ms,
                cause: String::new(),
                excused,
                ..self.in_phase(pause.from, change.now_ms)
            }),
            Some(step) => Ok(self.at_step(step, self.plan.steps[step].canary.0, change)),
            None if self.plan.steps.is_empty() => Err(RolloutError::Stepless {
                model: self.model.clone(),
            }),
            None => self.step_to(None, change),
        }
    }

    /// Agrees to go on from the present step; before it is asked for, in advance.
    ///
    /// # Errors
    /// The rollout is being promoted or aborted, or is over.
    pub fn approve(&self, change: &Change) -> Result<Self, RolloutError> {
        self.needs(&OPEN, "approving")?;
        let waits = matches!(
            self.pause,
            Some(Pause {
                why: PauseReason::Approval,
                ..
            })
        );
        let next = match waits {
            true => self.in_phase(Phase::Judging, change.now_ms),
            false => self.clone(),
        };
        Ok(Self {
            approved: true,
            actor: change.actor.clone(),
            reason: change.reason.clone(),
            updated_ms: change.now_ms,
            ..next
        })
    }

    /// Stable gets everything; share, rules, pins and mirror go together. `uid` empty aborts whichever rollout is
    /// there.
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
            _ => {
                let cause = match change.reason.as_str() {
                    "" => "an operator aborted it".to_owned(),
                    reason => reason.to_owned(),
                };
                Ok(self.aborting(cause, change))
            }
        }
    }

    /// Tries a rolled-back rollout again from its first step; the salt stays, so the same users are asked.
    ///
    /// # Errors
    /// It is not rolled back.
    pub fn retry(&self, change: Change) -> Result<Self, RolloutError> {
        self.needs(&[Phase::RolledBack], "retrying")?;
        let stepped = !self.plan.steps.is_empty();
        let mut next = Self {
            share: Ppm::ZERO,
            attempt: self.attempt + 1,
            trial: 0,
            step: 0,
            held_ms: 0,
            approved: false,
            excused: None,
            by_hand: false,
            cause: String::new(),
            step_began_ms: Vec::new(),
            ..self.replanned(
                if stepped {
                    Phase::Pending
                } else {
                    Phase::Converging
                },
                change,
            )
        };
        next.revoked.retain(|name| *name != self.canary);
        Ok(next)
    }

    /// Goes back to the revision that served before this rollout succeeded, as a rollout of its own.
    ///
    /// # Errors
    /// It has not succeeded.
    pub fn undo(&self, uid: String, change: Change) -> Result<Self, RolloutError> {
        self.needs(&[Phase::Succeeded], "undoing")?;
        let new = CreateRollout {
            uid,
            model: self.model.clone(),
            stable: self.canary.clone(),
            canary: self.stable.clone(),
            share: Ppm::ZERO,
            plan: Manifest::manual(&self.model, &self.stable, &self.sticky),
        };
        Self::create(new, Some(self), change.clone())?.promote(change)
    }

    /// The same rollout under a changed plan, as `apply` does it: steps, rules and analysis are replaced, the share
    /// stays, and what comes next is looked for in the new steps.
    ///
    /// # Errors
    /// The rollout is being promoted or aborted, or is over.
    pub fn amend(&self, plan: Manifest, change: Change) -> Result<Self, RolloutError> {
        self.needs(&OPEN, "changing the plan")?;
        let mut next = Self {
            sticky: (&plan.sticky).into(),
            trial: self.trial + 1,
            ..self.replanned(self.phase, change)
        };
        // The route changes, so a step that was being held is acknowledged and held anew.
        if self.routes_canary() {
            next.phase = Phase::Converging;
        } else {
            next.pause = self.pause;
        }
        next.step = plan
            .steps
            .iter()
            .rposition(|step| step.canary.0 <= self.share)
            .unwrap_or(0);
        next.held_ms = 0;
        next.approved = false;
        next.plan = plan;
        Ok(next)
    }

    /// Takes in a rollout that was applied while this one is under way, as this one's plan says. Gives the plan to
    /// write and what was done.
    ///
    /// # Errors
    /// The plan says that a new rollout is refused.
    pub fn follow_by(&self, queued: Queued, change: Change) -> Result<(Self, &'static str), RolloutError> {
        let next = Some(Box::new(queued));
        match self.plan.on_new {
            OnNew::Reject => Err(RolloutError::Active {
                model: self.model.clone(),
                phase: self.phase,
            }),
            OnNew::Queue => Ok((Self { next, ..self.clone() }, "queued")),
            OnNew::Supersede if self.phase == Phase::Aborting => {
                Ok((Self { next, ..self.clone() }, "superseding"))
            }
            // Its canary is stable already, and stays that.
            OnNew::Supersede if self.phase == Phase::Draining => {
                Ok((Self { next, ..self.clone() }, "queued"))
            }
            OnNew::Supersede => {
                let aborting = self.aborting("superseded by another rollout".into(), change);
                Ok((Self { next, ..aborting }, "superseding"))
            }
        }
    }

    /// The queued rollout in place of this one, which is over; `None` where nothing waits.
    pub(crate) fn successor(&self, now_ms: u64) -> Option<Self> {
        let queued = self.next.as_deref().filter(|_| self.phase.is_final())?;
        let change = Change {
            actor: queued.actor.clone(),
            reason: queued.reason.clone(),
            now_ms,
            traceparent: String::new(),
        };
        let new = CreateRollout {
            uid: queued.uid.clone(),
            model: self.model.clone(),
            stable: self.serving_stable().to_owned(),
            canary: queued.plan.canary.revision.clone(),
            share: Ppm::ZERO,
            plan: queued.plan.clone(),
        };
        let bare = Self {
            next: None,
            ..self.clone()
        };
        // The queued canary may have become stable meanwhile: then nothing is left to do.
        Some(Self::create(new, Some(&bare), change).unwrap_or(bare))
    }

    pub(crate) fn aborting(&self, cause: String, change: Change) -> Self {
        let mut next = Self {
            share: Ppm::ZERO,
            cause,
            ..self.replanned(Phase::Aborting, change)
        };
        if !next.revoked.contains(&self.canary) {
            next.revoked.push(self.canary.clone());
        }
        next
    }

    pub(crate) fn paused(&self, why: PauseReason, from: Phase, now_ms: u64) -> Self {
        let holding = matches!(self.phase, Phase::Soaking | Phase::Baking);
        let held = if holding {
            now_ms.saturating_sub(self.phase_since_ms)
        } else {
            0
        };
        Self {
            held_ms: self.held_ms + held,
            pause: Some(Pause { why, from }),
            ..Self {
                pause: None,
                ..self.in_phase(Phase::Paused, now_ms)
            }
        }
    }

    /// The plan that puts the canary at a step.
    pub(crate) fn at_step(&self, step: usize, share: Ppm, change: Change) -> Self {
        let now_ms = change.now_ms;
        let mut next = Self {
            step,
            share,
            by_hand: false,
            cause: String::new(),
            ..self.next_trial(change)
        };
        next.step_began_ms.resize(step + 1, 0);
        next.step_began_ms[step] = now_ms;
        next
    }

    fn next_trial(&self, change: Change) -> Self {
        // The first share of a rollout is trial 0: nothing was observed before it.
        let first = matches!(self.phase, Phase::Pending | Phase::Warming);
        Self {
            trial: self.trial + u32::from(!first),
            held_ms: 0,
            approved: false,
            ..self.replanned(Phase::Converging, change)
        }
    }

    fn next_higher_step(&self) -> Option<usize> {
        self.plan.steps.iter().position(|step| step.canary.0 > self.share)
    }

    fn needs(&self, phases: &[Phase], change: &'static str) -> Result<(), RolloutError> {
        if phases.contains(&self.phase) {
            return Ok(());
        }
        let remedy = match self.phase {
            Phase::Promoting | Phase::Draining => "wait until it has succeeded, or abort it",
            Phase::Aborting => "wait until it is rolled back",
            Phase::Succeeded | Phase::RolledBack if change == "retrying" => {
                "only a rolled-back rollout is tried again"
            }
            Phase::Succeeded | Phase::RolledBack => "it is over; create a new rollout",
            _ => "wait, or abort it",
        };
        Err(RolloutError::Phase {
            model: self.model.clone(),
            phase: self.phase,
            change,
            remedy,
        })
    }
}
