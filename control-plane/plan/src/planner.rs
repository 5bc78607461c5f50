//! What happens next to a rollout: a pure function of the plan and of what is known about the gateways.

use penstock_analysis::Verdict;

use crate::{
    Action, Change, Observations, OnInsufficient, PauseReason, Phase, Ppm, Rollout,
    judge::{MetricVerdict, failure, judge, passes, passes_or_excused},
    window,
};

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
    /// Workers that serve the canary now.
    pub canary_ready: u32,
    /// What the others are doing, in words, e.g. that they load it.
    pub not_ready: String,
    /// Requests that run on the old revision, as far as gateways know.
    pub old_in_flight: u64,
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
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Write this plan in place of the present one.
    Write(Box<Rollout>),
    /// Nothing to do; why, in words.
    Wait(String),
}

/// Name under which the controller changes plans by itself.
pub const CONTROLLER: &str = "controller";

/// Decides what happens next. `now_ms` is in milliseconds since the Unix epoch.
///
/// No step is taken before every live gateway has acknowledged the plan; a lost gateway holds nothing up, since
/// it cannot be reached anyway and is brought up to date by its next Hello. An abort is held to more: `RolledBack`
/// promises that no live gateway sends anything to the canary, so a control plane that has just started first
/// gives gateways the time to come back. A verdict that fails aborts in every phase in which the canary has traffic;
/// one that is inconclusive never promotes.
pub fn decide(
    rollout: &Rollout,
    inventory: &Inventory,
    observations: &Observations,
    now_ms: u64,
) -> Decision {
    let planner = Planner {
        rollout,
        inventory,
        convergence: converge(inventory),
        now_ms,
    };
    if rollout.routes_canary() && rollout.phase != Phase::Promoting {
        let verdicts = judge(rollout, observations);
        if let Some(decision) = planner.accused(&verdicts) {
            return decision;
        }
        return planner.under_way(&verdicts);
    }
    planner.at_the_edges()
}

/// The time at which the present hold is over at the earliest, in milliseconds since the Unix epoch.
pub fn hold_ends_ms(rollout: &Rollout) -> Option<u64> {
    let step = rollout.current_step()?;
    let holding = matches!(rollout.phase, Phase::Soaking | Phase::Baking);
    holding.then(|| rollout.phase_since_ms + step.stays().as_ms().saturating_sub(rollout.held_ms))
}

/// One decision's material.
struct Planner<'a> {
    rollout: &'a Rollout,
    inventory: &'a Inventory,
    convergence: Convergence,
    now_ms: u64,
}

// === impl Planner ===

impl Planner<'_> {
    /// Every live gateway has the plan in force, or the plan goes on without those that do not answer.
    fn converged(&self) -> bool {
        if self.inventory.published_epoch.is_none() {
            return false;
        }
        let patience = self.rollout.plan.unacknowledged.proceed_after;
        let given_up = patience.is_some_and(|patience| {
            self.convergence.refused.is_empty() && self.in_phase_ms() >= patience.as_ms()
        });
        self.convergence.pending.is_empty() || given_up
    }

    /// This control plane may not have heard yet of gateways that live.
    fn just_started(&self) -> bool {
        self.now_ms < self.inventory.listening_since_ms.saturating_add(LIVENESS_MS)
    }

    fn in_phase_ms(&self) -> u64 {
        self.now_ms.saturating_sub(self.rollout.phase_since_ms)
    }

    /// What a failed metric leads to.
    fn accused(&self, verdicts: &[MetricVerdict]) -> Option<Decision> {
        let failed = failure(verdicts)?;
        let paused = self.rollout.pause.map(|pause| pause.why);
        match failed.action {
            Action::Abort => Some(self.abort(failed.cause())),
            _ if paused.is_some() || self.excused() => None,
            _ => Some(write(Rollout {
                cause: failed.cause(),
                ..self.pause(PauseReason::Verdict)
            })),
        }
    }

    /// An operator has seen that a metric asks for a pause in this trial, and went on.
    fn excused(&self) -> bool {
        self.rollout.excused == Some(self.rollout.trial)
    }

    /// Nothing that is judged speaks against the next step.
    fn satisfied(&self, verdicts: &[MetricVerdict]) -> bool {
        match self.excused() {
            true => passes_or_excused(verdicts),
            false => passes(verdicts),
        }
    }

    /// Phases in which the canary has traffic.
    fn under_way(&self, verdicts: &[MetricVerdict]) -> Decision {
        let rollout = self.rollout;
        match rollout.phase {
            Phase::Converging => self.converging(),
            Phase::Soaking | Phase::Baking => match hold_ends_ms(rollout) {
                Some(end) if self.now_ms < end => {
                    wait(format!("holds for another {}", span(end - self.now_ms)))
                }
                _ => self.judged(verdicts),
            },
            Phase::Judging => self.judged(verdicts),
            _ => self.paused(verdicts),
        }
    }

    fn converging(&self) -> Decision {
        let rollout = self.rollout;
        if !self.convergence.refused.is_empty() {
            return write(Rollout {
                cause: self.refusal(),
                ..self.pause(PauseReason::Nacked)
            });
        }
        if !self.converged() {
            return wait(waiting(&self.convergence));
        }
        let on_step = rollout
            .current_step()
            .filter(|step| step.canary.0 == rollout.share && !rollout.by_hand);
        let next = match on_step {
            Some(step) if step.bake.is_some() => rollout.in_phase(Phase::Baking, self.now_ms),
            Some(_) => rollout.in_phase(Phase::Soaking, self.now_ms),
            None => rollout.paused(PauseReason::Manual, Phase::Converging, self.now_ms),
        };
        write(next)
    }

    /// The hold is over: the verdicts decide.
    fn judged(&self, verdicts: &[MetricVerdict]) -> Decision {
        if self.satisfied(verdicts) {
            return self.advance();
        }
        let missing = missing(verdicts);
        let analysis = &self.rollout.plan.analysis;
        match analysis.on_insufficient {
            OnInsufficient::Fail => self.abort(format!("the samples do not suffice: {missing}")),
            OnInsufficient::Pause => write(self.pause(PauseReason::Insufficient)),
            OnInsufficient::Extend if self.rollout.phase != Phase::Judging => {
                write(self.rollout.in_phase(Phase::Judging, self.now_ms))
            }
            OnInsufficient::Extend => {
                let hold = self.rollout.current_step().map_or(0, |step| step.stays().as_ms());
                let longest = (hold as f64 * analysis.extend_limit) as u64;
                if self.in_phase_ms() >= longest.max(1000) {
                    return write(self.pause(PauseReason::Insufficient));
                }
                wait(format!("the hold is over; {missing}"))
            }
        }
    }

    /// The step is passed: the next one, or the end.
    fn advance(&self) -> Decision {
        let rollout = self.rollout;
        let Some(step) = rollout.current_step() else {
            return write(self.pause(PauseReason::Manual));
        };
        if step.approval && !rollout.approved {
            return write(self.pause(PauseReason::Approval));
        }
        if !window::is_open(&rollout.plan.windows, self.now_ms) {
            return write(self.pause(PauseReason::Window));
        }
        match rollout.plan.steps.get(rollout.step + 1) {
            Some(next) => write(rollout.at_step(rollout.step + 1, next.canary.0, self.change())),
            None if rollout.share == Ppm::ALL => write(rollout.replanned(Phase::Draining, self.change())),
            None => write(self.pause(PauseReason::Manual)),
        }
    }

    fn paused(&self, verdicts: &[MetricVerdict]) -> Decision {
        let rollout = self.rollout;
        let Some(pause) = rollout.pause else {
            return wait("holds its share until an operator changes it".into());
        };
        if let Some(limit) = rollout.plan.pause_limit()
            && self.in_phase_ms() >= limit.as_ms()
        {
            let why = reason(pause.why);
            return self.abort(format!("it was paused ({why}) for longer than {limit}"));
        }
        let windows = &rollout.plan.windows;
        match pause.why {
            PauseReason::Nacked if self.convergence.pending.is_empty() && self.converged() => {
                write(Rollout {
                    cause: String::new(),
                    ..rollout.in_phase(pause.from, self.now_ms)
                })
            }
            PauseReason::Nacked => wait(self.refusal()),
            PauseReason::Window if window::is_open(windows, self.now_ms) => {
                write(rollout.in_phase(pause.from, self.now_ms))
            }
            PauseReason::Window => wait(self.until_open()),
            PauseReason::Insufficient if self.satisfied(verdicts) => {
                write(rollout.in_phase(pause.from, self.now_ms))
            }
            PauseReason::Insufficient => wait(format!("the samples do not suffice: {}", missing(verdicts))),
            PauseReason::Approval => wait("waits for an approval: `ctl rollout approve`".into()),
            PauseReason::Verdict => wait(format!("{}; resume it or abort it", rollout.cause)),
            PauseReason::Manual => wait("holds its share until an operator changes it".into()),
        }
    }

    /// Phases in which nothing is judged: before the canary has traffic, and when it is decided.
    fn at_the_edges(&self) -> Decision {
        let rollout = self.rollout;
        match rollout.phase {
            Phase::Pending if window::is_open(&rollout.plan.windows, self.now_ms) => {
                write(rollout.in_phase(Phase::Warming, self.now_ms))
            }
            Phase::Pending => wait(self.until_open()),
            Phase::Warming => self.warming(),
            Phase::Paused => self.paused(&[]),
            Phase::Succeeded | Phase::RolledBack => match rollout.successor(self.now_ms) {
                Some(next) => write(next),
                None if rollout.phase == Phase::Succeeded => wait(format!("{} is stable", rollout.canary)),
                None => wait(format!("{} serves", rollout.stable)),
            },
            _ if !self.convergence.refused.is_empty() => wait(self.refusal()),
            _ if !self.converged() => wait(waiting(&self.convergence)),
            // Workers give up the old revision next, so no gateway that is about to come back may still send to it.
            Phase::Aborting | Phase::Draining
                if self.just_started()
                    && (rollout.phase == Phase::Aborting || self.convergence.live == 0) =>
            {
                wait("waiting for gateways to come back after a start of the control plane".into())
            }
            Phase::Aborting => write(rollout.in_phase(Phase::RolledBack, self.now_ms)),
            // The route changes: the canary is stable from now on. The change stays the operator's.
            Phase::Promoting => {
                let change = Change {
                    actor: rollout.actor.clone(),
                    reason: rollout.reason.clone(),
                    now_ms: self.now_ms,
                    traceparent: rollout.traceparent.clone(),
                };
                write(rollout.replanned(Phase::Draining, change))
            }
            _ => self.draining(),
        }
    }

    fn warming(&self) -> Decision {
        let rollout = self.rollout;
        let (ready, needed) = (self.inventory.canary_ready, rollout.plan.canary.min_ready);
        if ready < needed {
            let canary = &rollout.canary;
            let why = match self.inventory.not_ready.as_str() {
                "" => String::new(),
                why => format!(": {why}"),
            };
            return wait(format!("{ready} of {needed} workers serve {canary}{why}"));
        }
        let share = rollout.current_step().map_or(rollout.share, |step| step.canary.0);
        write(rollout.at_step(rollout.step, share, self.change()))
    }

    fn draining(&self) -> Decision {
        let left = self.inventory.old_in_flight;
        if left > 0 && self.in_phase_ms() < self.rollout.plan.in_flight.max_drain.as_ms() {
            return wait(format!("{left} requests still run on {}", self.rollout.stable));
        }
        write(self.rollout.in_phase(Phase::Succeeded, self.now_ms))
    }

    fn pause(&self, why: PauseReason) -> Rollout {
        // An approval or a window is asked for when a step is over: then it is judged again.
        let from = match (why, self.rollout.phase) {
            (PauseReason::Nacked | PauseReason::Verdict, phase) => phase,
            _ => Phase::Judging,
        };
        let from = self.rollout.pause.map_or(from, |pause| pause.from);
        self.rollout.paused(why, from, self.now_ms)
    }

    fn abort(&self, cause: String) -> Decision {
        let change = Change {
            reason: cause.clone(),
            ..self.change()
        };
        write(self.rollout.aborting(cause, change))
    }

    fn change(&self) -> Change {
        Change {
            actor: CONTROLLER.into(),
            reason: String::new(),
            now_ms: self.now_ms,
            traceparent: String::new(),
        }
    }

    fn refusal(&self) -> String {
        match self.convergence.refused.first() {
            Some((node, reason)) => format!("{node} refused epoch {}: {reason}", self.convergence.epoch),
            None => waiting(&self.convergence),
        }
    }

    fn until_open(&self) -> String {
        match window::opens(&self.rollout.plan.windows, self.now_ms) {
            Some(at) => format!("the window opens in {}", span(at.saturating_sub(self.now_ms))),
            None => "no window opens within a week".into(),
        }
    }
}

fn missing(verdicts: &[MetricVerdict]) -> String {
    let insufficient = verdicts.iter().filter(|metric| metric.verdict != Verdict::Pass);
    let words: Vec<String> = insufficient
        .map(|metric| format!("{} {}", metric.metric, metric.would_change))
        .collect();
    words.join("; ")
}

fn reason(why: PauseReason) -> &'static str {
    why.as_str()
}

/// Whole seconds: nobody waits by the millisecond.
fn span(ms: u64) -> String {
    let (seconds, unit) = (ms.div_ceil(1000), 60);
    match (seconds / 3600, seconds / unit % unit, seconds % unit) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
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

const fn wait(why: String) -> Decision {
    Decision::Wait(why)
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
