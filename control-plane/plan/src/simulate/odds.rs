//! How soon a step shows a worse canary, and how often an innocent one is rolled back.

use std::fmt;

use penstock_analysis::power::{Scenario, Test, detect};

use super::Assumptions;
use crate::{
    Action, Manifest, Metric, Share, Signal, Span, Step,
    judge::planned_alpha,
    lint::{Sight, median, span},
};

/// Requests of the canary after which a simulated test is given up.
const HORIZON: u64 = 1_000_000;
/// Likewise for an innocent canary, which most often is accused early or not at all.
const INNOCENT_HORIZON: u64 = 20_000;
/// Runs of an innocent canary.
const RUNS: u32 = 100;

/// How soon one step shows a worse canary.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOdds {
    /// The canary's share.
    pub share: Share,
    /// How long the step stays.
    pub stays: Span,
    /// Seconds until half of the canaries that are twice as bad are noticed; `None` where that may never be.
    pub twice_s: Option<f64>,
    /// Likewise for those that are five times as bad.
    pub five_times_s: Option<f64>,
}

/// The odds of each step.
pub(super) fn steps(plan: &Manifest, assumptions: &Assumptions) -> Vec<StepOdds> {
    let trials = plan.steps.iter().zip(0..);
    trials
        .map(|(step, trial)| StepOdds {
            share: step.canary,
            stays: step.stays(),
            twice_s: noticed_s(plan, step, trial, assumptions, 2.0),
            five_times_s: noticed_s(plan, step, trial, assumptions, 5.0),
        })
        .collect()
}

/// Seconds until the quickest metric has failed half of the canaries that are so much worse.
fn noticed_s(plan: &Manifest, step: &Step, trial: u32, assumptions: &Assumptions, worse: f64) -> Option<f64> {
    let share = step.canary.0.fraction();
    let per_second = assumptions.requests_per_second * share;
    let alpha = planned_alpha(plan, trial);
    let requests = acting(plan)
        .flat_map(|metric| sights(metric, share, assumptions))
        .map(|sight| Sight {
            canary_rate: (sight.stable_rate * worse).min(1.0),
            ..sight
        })
        .filter(may_be_seen)
        .filter_map(|sight| median(sight, share, alpha, HORIZON));
    let fewest = requests.min()?;
    (per_second > 0.0).then(|| fewest as f64 / per_second)
}

/// Odds that one of the tests rolls an innocent canary back before the plan is through.
pub(super) fn false_abort(plan: &Manifest, assumptions: &Assumptions) -> f64 {
    let mut innocent = 1.0;
    for (step, trial) in plan.steps.iter().zip(0..) {
        let share = step.canary.0.fraction();
        let requests = assumptions.requests_per_second * share * step.stays().get().as_secs_f64();
        for sight in acting(plan)
            .filter(|metric| metric.action == Action::Abort)
            .flat_map(|metric| sights(metric, share, assumptions))
        {
            let detection = detect(&Scenario {
                test: sight.test,
                stable_rate: sight.stable_rate,
                canary_rate: sight.stable_rate,
                canary_share: share,
                alpha: planned_alpha(plan, trial),
                horizon: (requests as u64).min(INNOCENT_HORIZON),
                runs: RUNS,
                seed: assumptions.seed,
            });
            innocent *= 1.0 - detection.detected;
        }
    }
    1.0 - innocent
}

fn acting(plan: &Manifest) -> impl Iterator<Item = &Metric> {
    let metrics = plan.analysis.metrics.iter();
    metrics.filter(|metric| metric.action != Action::Warn)
}

/// The rules of a metric that can speak at a share of the traffic, with stable's rate of bad events.
fn sights(metric: &Metric, share: f64, assumptions: &Assumptions) -> Vec<Sight> {
    let sights = crate::lint::sights(metric, share, None);
    let assumed = |sight: Sight| Sight {
        stable_rate: stable_rate(metric, assumptions),
        ..sight
    };
    sights.into_iter().map(assumed).collect()
}

/// Stable's rate of bad events: what is assumed for errors, and for other metrics half of what is allowed.
pub(super) fn stable_rate(metric: &Metric, assumptions: &Assumptions) -> f64 {
    match (&metric.name, metric.max_rate()) {
        (Signal::ErrorRate, _) | (_, None) => assumptions.stable_error_rate,
        (_, Some(limit)) => limit / 2.0,
    }
}

/// A canary within its bounds is never accused, however long one waits.
fn may_be_seen(sight: &Sight) -> bool {
    match sight.test {
        Test::Exceedance(limit) => sight.canary_rate > limit,
        Test::Attribution(ratio) => sight.canary_rate > sight.stable_rate * ratio,
    }
}

// === impl StepOdds ===

impl fmt::Display for StepOdds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = |seconds: Option<f64>| match seconds {
            Some(seconds) if seconds > self.stays.get().as_secs_f64() => {
                format!("{} (longer than the step)", span(seconds))
            }
            Some(seconds) => span(seconds),
            None => "within what the plan allows".to_owned(),
        };
        write!(
            f,
            "  {:>6} for {:<5} twice as bad: {}; five times: {}",
            self.share.to_string(),
            self.stays.to_string(),
            told(self.twice_s),
            told(self.five_times_s)
        )
    }
}
