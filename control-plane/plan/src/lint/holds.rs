//! Holds: within each of them, a canary that is clearly worse can be told from one that is not.

use std::collections::BTreeMap;

use penstock_analysis::power::{Scenario, Test, detect};

use super::{LintContext, Report, Severity};
use crate::{Action, Manifest, Metric, Step, judge::planned_alpha};

/// Stable's rate of bad events where a plan gives no limit to take it from.
const USUAL_RATE: f64 = 0.005;
/// How many times worse the canary is that a hold must be able to show.
const WORSE: f64 = 5.0;
/// Requests a second where nobody knows: more than most models get.
const BUSY: f64 = 1000.0;
/// Requests of the canary after which a simulated test is given up.
const HORIZON: u64 = 10_000_000;
/// Simulated runs: the median of so many is within a tenth of the true one.
const RUNS: u32 = 100;

/// How many requests of the canary a metric's rule takes to fail one that is so much worse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sight {
    /// The rule.
    pub(crate) test: Test,
    /// Stable's rate of bad events.
    pub(crate) stable_rate: f64,
    /// The canary's.
    pub(crate) canary_rate: f64,
}

pub(super) fn check(plan: &Manifest, context: &LintContext, report: &mut Report<'_>) {
    let known = context
        .requests_per_second
        .filter(|rate| rate.is_finite() && *rate > 0.0);
    let rate = known.unwrap_or(BUSY);
    let mut cache = BTreeMap::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let share = step.canary.0.fraction();
        let per_second = rate * share;
        let found = quickest(plan, index, step, known.map(|_| WORSE), &mut cache);
        let Some((metric, needed)) = found.filter(|_| per_second > 0.0) else {
            continue;
        };
        let seen = per_second * step.stays().get().as_secs_f64();
        if seen >= needed as f64 {
            continue;
        }
        let would_do = span(needed as f64 / per_second);
        let (metric, stays) = (&metric.name, step.stays());
        let message = match known {
            Some(rate) => format!(
                "{} requests/s at {}: a fivefold jump of {metric} takes about {would_do}, and the step stays {stays}; \
                 hold it for {would_do} or longer",
                (rate * 100.0).round() / 100.0,
                step.canary
            ),
            None => format!(
                "even at {BUSY} requests/s and with every request of the canary bad, {metric} takes about {would_do}, \
                 and the step stays {stays}; hold it longer",
            ),
        };
        let field = if step.bake.is_some() { "bake" } else { "hold" };
        // Whoever says how many samples do has decided what is to be seen.
        let severity = match known {
            Some(_) if step.min_samples.is_some() => Severity::Warning,
            _ => Severity::Error,
        };
        report.add(
            severity,
            format!("steps[{index}].{field}"),
            "hold-too-short",
            message,
        );
    }
}

/// The metric that shows first that the canary is worse, and after how many of its requests in the median: `worse`
/// times as bad as what is usual, or bad in every request. None where no metric of the plan could.
fn quickest<'a>(
    plan: &'a Manifest,
    index: usize,
    step: &Step,
    worse: Option<f64>,
    cache: &mut BTreeMap<String, Option<u64>>,
) -> Option<(&'a Metric, u64)> {
    let alpha = planned_alpha(plan, u32::try_from(index).unwrap_or(u32::MAX));
    if !(alpha > 0.0 && alpha < 1.0) {
        return None;
    }
    let share = step.canary.0.fraction();
    let acting = plan
        .analysis
        .metrics
        .iter()
        .filter(|metric| metric.action != Action::Warn);
    let mut needed: Vec<(&Metric, u64)> = Vec::new();
    for metric in acting {
        for sight in sights(metric, share, worse) {
            let key = format!("{sight:?} {share} {alpha}");
            let median = *cache
                .entry(key)
                .or_insert_with(|| median(sight, share, alpha, HORIZON));
            needed.extend(median.map(|median| (metric, median)));
        }
    }
    needed.into_iter().min_by_key(|(_, median)| *median)
}

/// The rules of a metric that can speak at a share of the traffic, and a worse canary for each.
pub(crate) fn sights(metric: &Metric, share: f64, worse: Option<f64>) -> Vec<Sight> {
    if !metric.name.is_counted() {
        return Vec::new();
    }
    let absolute = metric
        .max_rate()
        .filter(|limit| (0.0..1.0).contains(limit))
        .map(|limit| (Test::Exceedance(limit), limit / 2.0, 1.0));
    let relative = metric
        .max_ratio
        .filter(|ratio| ratio.is_finite() && *ratio > 0.0 && share < 1.0)
        .map(|ratio| (Test::Attribution(ratio), USUAL_RATE, ratio));
    let sight = |(test, usual, allowed): (Test, f64, f64)| {
        let stable_rate = if usual > 0.0 { usual } else { USUAL_RATE };
        let canary_rate = worse.map_or(1.0, |worse| (stable_rate * worse.max(2.0 * allowed)).min(1.0));
        Sight {
            test,
            stable_rate,
            canary_rate,
        }
    };
    absolute.into_iter().chain(relative).map(sight).collect()
}

/// Requests of the canary until half of the runs have failed it.
pub(crate) fn median(sight: Sight, share: f64, alpha: f64, horizon: u64) -> Option<u64> {
    let scenario = Scenario {
        test: sight.test,
        stable_rate: sight.stable_rate,
        canary_rate: sight.canary_rate,
        canary_share: share,
        alpha,
        horizon,
        runs: RUNS,
        seed: 1,
    };
    detect(&scenario).median
}

/// A time span in the unit that people would say it in.
pub(crate) fn span(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 90.0 => format!("{} s", seconds.ceil()),
        seconds if seconds < 5400.0 => format!("{} min", (seconds / 60.0).ceil()),
        seconds if seconds < 172_800.0 => format!("{} h", (seconds / 3600.0).ceil()),
        seconds => format!("{} d", (seconds / 86_400.0).ceil()),
    }
}
