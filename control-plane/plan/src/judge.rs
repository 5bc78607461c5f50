//! Verdicts: what the observations say on each metric of the plan.

use penstock_analysis::{Counts, Evidence, Verdict, attribution, bounds, exceedance, verdict};

use crate::{Action, Limit, Manifest, Metric, Observations, Ppm, Rollout, Signal, Stratify};

/// The verdict on one metric.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricVerdict {
    /// Its name.
    pub metric: String,
    /// The rule in words.
    pub rule: String,
    /// The verdict.
    pub verdict: Verdict,
    /// What follows when it fails.
    pub action: Action,
    /// Requests and bad events of the canary.
    pub canary: Counts,
    /// Those of stable.
    pub stable: Counts,
    /// The canary's rate of bad events, or its number.
    pub canary_rate: Option<f64>,
    /// Stable's.
    pub stable_rate: Option<f64>,
    /// Always-valid bounds of the canary's rate.
    pub bounds: Option<(f64, f64)>,
    /// Natural logarithm of the e-value against the canary.
    pub log_evidence: f64,
    /// Where the evidence makes it fail.
    pub log_threshold: f64,
    /// Requests of the canary without which it does not pass.
    pub min_samples: u64,
    /// What would change the verdict, in words.
    pub would_change: String,
}

/// Fewest samples that any metric is passed on.
const FEWEST: f64 = 30.0;
/// Most samples that are asked for where the plan says nothing.
const MOST: f64 = 100_000.0;
/// Samples for a comparison with stable where the plan says nothing.
const COMPARISON: u64 = 200;

/// Judges every metric of the plan.
///
/// The plan's α is for the whole rollout: it is divided among metrics, rules and trials (Bonferroni), so that all
/// of them together accuse an innocent canary with a probability of α at most.
pub fn judge(rollout: &Rollout, observations: &Observations) -> Vec<MetricVerdict> {
    let alpha = alpha_per_test(rollout);
    let metrics = rollout.plan.analysis.metrics.iter();
    metrics
        .map(|metric| judge_one(rollout, metric, observations, alpha))
        .collect()
}

/// The level of each single test.
pub fn alpha_per_test(rollout: &Rollout) -> f64 {
    planned_alpha(&rollout.plan, rollout.trial)
}

/// The level of each single test in a trial of a plan, from 0.
pub fn planned_alpha(plan: &Manifest, trial: u32) -> f64 {
    let rules = |metric: &Metric| match metric.name.is_counted() {
        true => usize::from(metric.max_rate().is_some()) + usize::from(metric.max_ratio.is_some()),
        false => 0,
    };
    let tests: usize = plan.analysis.metrics.iter().map(rules).sum();
    plan.analysis.alpha * trial_weight(plan.steps.len(), trial as usize) / tests.max(1) as f64
}

/// The part of α that a trial gets. A ladder's steps share alike; trials beyond it, which operators add by setting
/// shares, get 1/(k+1)(k+2) of one more part, which adds up to 1 however many there are.
fn trial_weight(steps: usize, trial: usize) -> f64 {
    let part = 1.0 / (steps as f64 + 1.0);
    match trial.checked_sub(steps) {
        None => part,
        Some(k) => part / ((k as f64 + 1.0) * (k as f64 + 2.0)),
    }
}

/// The failure that decides, if any: aborts before pauses.
pub fn failure(verdicts: &[MetricVerdict]) -> Option<&MetricVerdict> {
    let with = |action| {
        verdicts
            .iter()
            .find(move |metric| metric.verdict == Verdict::Fail && metric.action == action)
    };
    with(Action::Abort).or_else(|| with(Action::Pause))
}

/// Whether every metric that has a say has passed.
pub fn passes(verdicts: &[MetricVerdict]) -> bool {
    verdicts.iter().all(passed)
}

/// Whether every metric that has a say has passed, or has failed and asks for a pause that an operator has ended.
pub fn passes_or_excused(verdicts: &[MetricVerdict]) -> bool {
    let excused = |metric: &MetricVerdict| metric.verdict == Verdict::Fail && metric.action == Action::Pause;
    verdicts.iter().all(|metric| passed(metric) || excused(metric))
}

fn passed(metric: &MetricVerdict) -> bool {
    metric.verdict == Verdict::Pass || metric.action == Action::Warn
}

fn judge_one(rollout: &Rollout, metric: &Metric, observations: &Observations, alpha: f64) -> MetricVerdict {
    match &metric.name {
        Signal::OutOfMemory => count(metric, observations.out_of_memory),
        Signal::Restarts => count(metric, observations.restarts),
        Signal::Prometheus(_) => sampled(metric, observations),
        _ => tested(rollout, metric, observations, alpha),
    }
}

/// A metric that is tested on counts.
fn tested(rollout: &Rollout, metric: &Metric, observations: &Observations, alpha: f64) -> MetricVerdict {
    let name = metric.name.to_string();
    let (canary, stable) = (
        observations.canary.counts(&name),
        observations.stable.counts(&name),
    );
    let evidence = |more_requests: u64, more_bad: u64| {
        let mut observations = observations.clone();
        if more_requests > 0 {
            // To the gateway and the stratum that have the most, where most requests would come.
            let boots = observations.boots.iter_mut().map(|[_, canary]| canary);
            let fullest = boots.max_by_key(|canary| canary.requests);
            for tally in fullest.into_iter().chain([&mut observations.canary]) {
                let strata = tally.metrics.entry(name.clone()).or_default();
                if let Some(counts) = strata.iter_mut().max_by_key(|counts| counts.n) {
                    counts.n += more_requests;
                    counts.bad += more_bad;
                }
            }
        }
        strongest(metric, &observations)
    };
    let min_samples = min_samples(rollout, metric, alpha);
    let now = evidence(0, 0);
    let compared = observations.strata(&name, false);
    let comparable = compared
        .iter()
        .any(|stratum| stratum.canary.n > 0 && stratum.stable.n > 0);
    // A canary that gets everything leaves nothing to compare it with: the steps before were for that.
    let stable_missing = metric.max_ratio.is_some() && !comparable && rollout.share < Ppm::ALL;
    let verdict = match verdict(&now, alpha, canary.n, min_samples) {
        Verdict::Pass if stable_missing => Verdict::Insufficient,
        verdict => verdict,
    };
    let would_change = match verdict {
        Verdict::Fail => "it stays failed in this trial; abort, or retry with a better canary".to_owned(),
        Verdict::Insufficient if canary.n < min_samples => {
            format!("needs {} more requests of the canary", min_samples - canary.n)
        }
        Verdict::Insufficient => "needs requests of stable to compare with".to_owned(),
        Verdict::Pass => would_fail(alpha, |bad| evidence(100, bad)),
    };
    MetricVerdict {
        canary_rate: now.canary_rate,
        stable_rate: rate(stable),
        bounds: bounds(canary, alpha),
        log_evidence: now.log_e,
        log_threshold: -alpha.ln(),
        min_samples,
        ..bare(metric, verdict, canary, stable, would_change)
    }
}

/// The stronger evidence of the metric's rules; each has its own part of α.
fn strongest(metric: &Metric, observations: &Observations) -> Evidence {
    let name = metric.name.to_string();
    let stratified = metric.stratify == Some(Stratify::CachedRatio);
    let absolute = metric
        .max_rate()
        .map(|limit| exceedance(observations.canary.counts(&name), limit));
    let relative = metric
        .max_ratio
        .map(|ratio| attribution(&observations.strata(&name, stratified), ratio));
    [absolute, relative]
        .into_iter()
        .flatten()
        .max_by(|a, b| a.log_e.total_cmp(&b.log_e))
        .unwrap_or_default()
}

/// How many of the next 100 requests would have to be bad for the verdict to fail.
fn would_fail(alpha: f64, after: impl Fn(u64) -> Evidence) -> String {
    let fails = |bad: u64| after(bad).log_e >= -alpha.ln();
    if !fails(100) {
        return "no 100 requests would change it".to_owned();
    }
    let (mut low, mut high) = (0, 100);
    while high - low > 1 {
        let middle = u64::midpoint(low, high);
        if fails(middle) {
            high = middle
        } else {
            low = middle
        }
    }
    format!("fails if {high} of the canary's next 100 are bad")
}

/// Samples before anything passes: what the plan says, else as many as the test needs on average to see a rate
/// five times the limit.
fn min_samples(rollout: &Rollout, metric: &Metric, alpha: f64) -> u64 {
    let step = rollout.current_step().and_then(|step| step.min_samples);
    metric
        .min_samples
        .or(step)
        .unwrap_or_else(|| default_samples(metric, alpha))
}

/// See [`min_samples`]: ln(1/α) over the information that one request gives.
pub fn default_samples(metric: &Metric, alpha: f64) -> u64 {
    let absolute = metric.max_rate().map(|limit| match limit {
        limit if limit <= 0.0 || limit >= 1.0 => FEWEST,
        limit => {
            let odds = 5.0 * limit / (1.0 - limit);
            let worse = odds / (1.0 + odds);
            let information =
                worse * (worse / limit).ln() + (1.0 - worse) * ((1.0 - worse) / (1.0 - limit)).ln();
            (-alpha.ln() / information).clamp(FEWEST, MOST)
        }
    });
    let relative = metric.max_ratio.map(|_| COMPARISON);
    // Both are positive and bounded.
    absolute
        .map_or(0, |samples| samples.ceil() as u64)
        .max(relative.unwrap_or_default())
}

/// A metric whose every event counts: fails above its maximum, passes else.
fn count(metric: &Metric, events: u64) -> MetricVerdict {
    let allowed = metric.max.map_or(0.0, number);
    let verdict = if events as f64 > allowed {
        Verdict::Fail
    } else {
        Verdict::Pass
    };
    let counts = Counts {
        n: events,
        bad: events,
    };
    let would_change = match verdict {
        Verdict::Pass => format!("fails above {allowed}"),
        _ => "it stays failed in this rollout".to_owned(),
    };
    bare(metric, verdict, counts, Counts::default(), would_change)
}

/// A number that a query gives: fails after so many values above the limit, passes on one that is not.
fn sampled(metric: &Metric, observations: &Observations) -> MetricVerdict {
    let name = metric.name.to_string();
    let sampled = observations.prometheus.get(&name).copied().unwrap_or_default();
    let needed = metric
        .prometheus
        .as_ref()
        .map_or(1, |query| query.failures.max(1));
    let (verdict, would_change) = match sampled.value {
        None => (Verdict::Insufficient, "the query gives no number".to_owned()),
        Some(_) if sampled.above >= needed => (Verdict::Fail, "a value within the limit".to_owned()),
        Some(value) if sampled.above > 0 => (
            Verdict::Insufficient,
            format!(
                "{value} is above the limit; fails after {} more such values",
                needed - sampled.above
            ),
        ),
        Some(_) => (
            Verdict::Pass,
            format!("fails after {needed} values above the limit"),
        ),
    };
    let counts = Counts {
        n: sampled.evaluations,
        bad: sampled.above.into(),
    };
    MetricVerdict {
        canary_rate: sampled.value,
        ..bare(metric, verdict, counts, Counts::default(), would_change)
    }
}

fn bare(
    metric: &Metric,
    verdict: Verdict,
    canary: Counts,
    stable: Counts,
    would_change: String,
) -> MetricVerdict {
    MetricVerdict {
        metric: metric.name.to_string(),
        rule: metric.rule(),
        verdict,
        action: metric.action,
        canary,
        stable,
        canary_rate: None,
        stable_rate: None,
        bounds: None,
        log_evidence: 0.0,
        log_threshold: 0.0,
        min_samples: 0,
        would_change,
    }
}

/// The bare number of a limit, whatever its unit.
pub fn number(limit: Limit) -> f64 {
    match limit {
        Limit::Share(value) | Limit::Seconds(value) | Limit::Number(value) => value,
    }
}

fn rate(counts: Counts) -> Option<f64> {
    (counts.n > 0).then(|| counts.bad as f64 / counts.n as f64)
}

// === impl MetricVerdict ===

impl MetricVerdict {
    /// The failure in one line, as a cause.
    pub fn cause(&self) -> String {
        let percent =
            |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{:.2} %", rate * 100.0));
        let Self {
            metric, rule, canary, ..
        } = self;
        if self.log_threshold == 0.0 {
            let value = self
                .canary_rate
                .map_or_else(|| canary.n.to_string(), |value| value.to_string());
            return format!("{metric} is {value}, {rule} is allowed");
        }
        format!(
            "{metric}: {} of the canary's {} requests are bad ({}, stable {}), {rule} is allowed",
            canary.bad,
            canary.n,
            percent(self.canary_rate),
            percent(self.stable_rate),
        )
    }
}

#[cfg(test)]
mod tests;
