//! A plan in virtual time: what happens when, and what would be noticed.
//!
//! The planner that runs in the control plane decides here too, in a world of gateways that acknowledge, workers that
//! become ready and requests that are drawn by lot from a seed. Time jumps from one event to the next, so that two
//! weeks take milliseconds.

use std::fmt;

use crate::{Manifest, Phase, Span};

mod odds;
mod world;

pub use odds::StepOdds;
use world::World;

/// What a simulation takes for granted.
#[derive(Debug, Clone, PartialEq)]
pub struct Assumptions {
    /// Requests a second of the model.
    pub requests_per_second: f64,
    /// Share of stable's requests that fail.
    pub stable_error_rate: f64,
    /// Share of the canary's.
    pub canary_error_rate: f64,
    /// Gateways that acknowledge.
    pub gateways: u32,
    /// From when the canary is wanted to when workers serve it.
    pub worker_ready_after: Span,
    /// From when a plan is published to when gateways have acknowledged it.
    pub acknowledge_after: Span,
    /// When approvals come.
    pub approvals: Approve,
    /// When the plan is applied, in milliseconds since the Unix epoch; windows follow the calendar.
    pub start_ms: u64,
    /// A rollout that is still under way after so long is left there.
    pub horizon: Span,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// When approvals come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Approve {
    /// As soon as they are asked for.
    AtOnce,
    /// After some time.
    After(Span),
    /// Not at all.
    Never,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// Each transition: milliseconds since the start, and what it was.
    pub events: Vec<(u64, String)>,
    /// Where it ended.
    pub outcome: Phase,
    /// Milliseconds from the start to the last event.
    pub took_ms: u64,
    /// How soon each step would show a worse canary.
    pub steps: Vec<StepOdds>,
    /// Odds that a canary that is as good as stable is rolled back all the same.
    pub false_abort: f64,
    /// Most that they may be: the plan's α.
    pub alpha: f64,
}

/// Simulates a plan.
pub fn simulate(plan: &Manifest, assumptions: &Assumptions) -> Simulation {
    let mut world = World::new(assumptions.clone());
    world.apply(plan.clone());
    world.run_until(assumptions.horizon.as_ms());
    let outcome = world.rollout().map_or(Phase::Pending, |rollout| rollout.phase);
    let events = world.into_events();
    Simulation {
        took_ms: events.last().map_or(0, |(at, _)| *at),
        events,
        outcome,
        steps: odds::steps(plan, assumptions),
        false_abort: odds::false_abort(plan, assumptions),
        alpha: plan.analysis.alpha,
    }
}

/// A moment of virtual time as `d3 04:00`: days, hours and minutes since the start.
pub fn moment(ms: u64) -> String {
    let minutes = ms / 60_000;
    format!("d{} {:02}:{:02}", minutes / 1440, minutes / 60 % 24, minutes % 60)
}

// === impl Assumptions ===

/// 20 requests a second, an error in 200, and a canary that is no worse.
impl Default for Assumptions {
    fn default() -> Self {
        Self {
            requests_per_second: 20.0,
            stable_error_rate: 0.005,
            canary_error_rate: 0.005,
            gateways: 2,
            worker_ready_after: Span::from_secs(60),
            acknowledge_after: Span::from_secs(1),
            approvals: Approve::AtOnce,
            start_ms: 0,
            horizon: Span::from_secs(60 * 86_400),
            seed: 1,
        }
    }
}

// === impl Simulation ===

impl fmt::Display for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, event) in &self.events {
            writeln!(f, "{:<10} {event}", moment(*at))?;
        }
        if !self.steps.is_empty() {
            writeln!(f, "\ntime until a worse canary is noticed, in the median:")?;
        }
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        write!(
            f,
            "\na canary as good as stable is rolled back with a probability of {:.1} %; the plan allows {} %",
            self.false_abort * 100.0,
            self.alpha * 100.0
        )
    }
}

#[cfg(test)]
mod tests;
