//! Where a rollout stands and why: its steps, its counts and what the evidence says.

use super::{Rollout, percent, shares, step};
use crate::output::{View, columns};
use penstock_proto::v1;
use serde::Serialize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Cells of a bar of evidence.
const BAR: usize = 20;

/// `rollout explain`.
#[derive(Debug, Serialize)]
pub(crate) struct Explanation {
    pub(crate) rollout: Rollout,
    pub(crate) steps: Vec<Step>,
    pub(crate) metrics: Vec<Metric>,
    stable: Side,
    canary: Side,
    abort_ms: u64,
    #[serde(skip)]
    now_ms: u64,
}

/// One step of the plan.
#[derive(Debug, Serialize)]
pub(crate) struct Step {
    pub(crate) share: String,
    canary_ppm: u32,
    hold_ms: u64,
    min_samples: u64,
    approval: bool,
    bake: bool,
    pub(crate) state: String,
    began_ms: u64,
}

/// What one metric says.
#[derive(Debug, Serialize)]
pub(crate) struct Metric {
    pub(crate) metric: String,
    pub(crate) rule: String,
    pub(crate) verdict: &'static str,
    pub(crate) action: String,
    canary_requests: u64,
    canary_bad: u64,
    stable_requests: u64,
    stable_bad: u64,
    pub(crate) canary_rate: Option<f64>,
    pub(crate) stable_rate: Option<f64>,
    /// The canary's rate to stable's; absent where stable has none.
    ratio: Option<f64>,
    /// Bounds of the canary's rate.
    lower: Option<f64>,
    upper: Option<f64>,
    /// Evidence against the canary as a share of what fails it.
    pub(crate) evidence: f64,
    min_samples: u64,
    pub(crate) would_change: String,
}

/// What one side did in the present trial.
#[derive(Debug, Default, Serialize)]
struct Side {
    requests: u64,
    errors: u64,
    timeouts: u64,
    cancelled: u64,
    output_tokens: u64,
    negative_feedback: u64,
    in_flight: u32,
}

impl From<v1::RevisionStats> for Side {
    fn from(stats: v1::RevisionStats) -> Self {
        Self {
            requests: stats.requests,
            errors: stats.errors,
            timeouts: stats.timeouts,
            cancelled: stats.cancelled,
            output_tokens: stats.output_tokens,
            negative_feedback: stats.negative_feedback,
            in_flight: stats.in_flight,
        }
    }
}

impl Step {
    /// How long it stays, e.g. `1h` or `bake 1h`.
    pub(crate) fn stays(&self) -> String {
        let hold = span(self.hold_ms);
        if self.bake { format!("bake {hold}") } else { hold }
    }
}

impl From<&v1::StepStatus> for Step {
    fn from(step: &v1::StepStatus) -> Self {
        Self {
            share: super::share(step.canary_ppm),
            canary_ppm: step.canary_ppm,
            hold_ms: step.hold_ms,
            min_samples: step.min_samples,
            approval: step.approval,
            bake: step.bake,
            state: step.state.clone(),
            began_ms: step.began_ms,
        }
    }
}

impl From<&v1::MetricVerdict> for Metric {
    fn from(metric: &v1::MetricVerdict) -> Self {
        let canary = metric.canary.unwrap_or_default();
        let stable = metric.stable.unwrap_or_default();
        let ratio = match (metric.canary_rate, metric.stable_rate) {
            (Some(canary), Some(stable)) if stable > 0.0 => Some(canary / stable),
            _ => None,
        };
        Self {
            metric: metric.metric.clone(),
            rule: metric.rule.clone(),
            verdict: verdict(metric.verdict()),
            action: metric.action.clone(),
            canary_requests: canary.requests,
            canary_bad: canary.bad,
            stable_requests: stable.requests,
            stable_bad: stable.bad,
            canary_rate: metric.canary_rate,
            stable_rate: metric.stable_rate,
            ratio,
            lower: metric.lower,
            upper: metric.upper,
            evidence: evidence(metric),
            min_samples: metric.min_samples,
            would_change: metric.would_change.clone(),
        }
    }
}

/// Evidence against the canary as a share of what fails it; below nothing it speaks for the canary.
fn evidence(metric: &v1::MetricVerdict) -> f64 {
    if metric.log_threshold > 0.0 {
        (metric.log_evidence / metric.log_threshold).max(0.0)
    } else {
        0.0
    }
}

fn verdict(verdict: v1::Verdict) -> &'static str {
    match verdict {
        v1::Verdict::Unspecified => "unknown",
        v1::Verdict::Pass => "pass",
        v1::Verdict::Fail => "fail",
        v1::Verdict::Insufficient => "insufficient",
    }
}

impl Explanation {
    /// Of a status that was received at `now_ms`.
    pub(crate) fn new(status: v1::RolloutStatus, now_ms: u64) -> Self {
        Self {
            steps: status.steps.iter().map(Step::from).collect(),
            metrics: status.metrics.iter().map(Metric::from).collect(),
            stable: status.stable_stats.clone().unwrap_or_default().into(),
            canary: status.canary_stats.clone().unwrap_or_default().into(),
            abort_ms: status.abort_ms,
            rollout: status.into(),
            now_ms,
        }
    }

    /// Now, in milliseconds since the Unix epoch.
    pub(crate) fn clock() -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
    }

    /// What it waits for, and when it goes on.
    pub(crate) fn waits(&self) -> Vec<String> {
        let r = &self.rollout;
        let mut lines = Vec::new();
        if !r.pause.is_empty() {
            lines.push(format!("paused: {}", r.pause));
        }
        if !r.message.is_empty() {
            lines.push(format!("waits: {}", r.message));
        }
        if !r.cause.is_empty() {
            lines.push(format!("cause: {}", r.cause));
        }
        if r.next_ms > self.now_ms {
            let left = span(r.next_ms - self.now_ms);
            lines.push(format!(
                "next: in {left} at the earliest, at {}",
                moment(r.next_ms)
            ));
        }
        if !r.pending.is_empty() {
            lines.push(format!(
                "gateways that have not acknowledged: {}",
                r.pending.join(", ")
            ));
        }
        lines.extend(r.nacks.iter().map(super::Nack::line));
        if !r.queued.is_empty() {
            lines.push(format!("then: a rollout of {}", r.queued));
        }
        if self.abort_ms > 0 {
            let took = crate::output::time(Duration::from_millis(self.abort_ms));
            lines.push(format!("the abort reached the last gateway in {took}"));
        }
        lines
    }

    fn steps_table(&self) -> String {
        let row = |(index, step): (usize, &Step)| {
            let mut wants = Vec::new();
            if step.min_samples > 0 {
                wants.push(format!("{} samples", step.min_samples));
            }
            if step.approval {
                wants.push("approval".to_owned());
            }
            [
                (index + 1).to_string(),
                step.share.clone(),
                step.stays(),
                wants.join(", "),
                step.state.clone(),
                if step.began_ms > 0 {
                    moment(step.began_ms)
                } else {
                    String::new()
                },
            ]
        };
        let rows: Vec<_> = self.steps.iter().enumerate().map(row).collect();
        columns(["STEP", "SHARE", "HOLD", "WANTS", "STATE", "BEGAN"], &rows)
    }

    fn sides_table(&self) -> String {
        let row = |name: &str, revision: &str, side: &Side| {
            [
                name.to_owned(),
                revision.to_owned(),
                side.requests.to_string(),
                side.errors.to_string(),
                side.timeouts.to_string(),
                side.cancelled.to_string(),
                side.output_tokens.to_string(),
                side.negative_feedback.to_string(),
                side.in_flight.to_string(),
            ]
        };
        let rows = [
            row("stable", &self.rollout.stable, &self.stable),
            row("canary", &self.rollout.canary, &self.canary),
        ];
        let titles = [
            "SIDE",
            "REVISION",
            "REQUESTS",
            "ERRORS",
            "TIMEOUTS",
            "CANCELLED",
            "TOKENS",
            "NEGATIVE",
            "RUNNING",
        ];
        columns(titles, &rows)
    }
}

impl Metric {
    fn text(&self) -> String {
        let rate = |rate: Option<f64>| rate.map_or_else(|| "no rate".to_owned(), percent);
        let action = match self.verdict {
            "fail" => format!("therefore {}", self.action),
            _ => format!("else {}", self.action),
        };
        let mut text = format!("{}: {}; {}, {action}\n", self.metric, self.verdict, self.rule);
        text += &format!(
            "  canary    {} bad of {} ({}); stable {} of {} ({})\n",
            self.canary_bad,
            self.canary_requests,
            rate(self.canary_rate),
            self.stable_bad,
            self.stable_requests,
            rate(self.stable_rate)
        );
        let mut effect = Vec::new();
        if let (Some(lower), Some(upper)) = (self.lower, self.upper) {
            effect.push(format!(
                "canary's rate between {} and {}",
                percent(lower),
                percent(upper)
            ));
        }
        if let Some(ratio) = self.ratio {
            effect.push(format!("{ratio:.2} times stable's"));
        }
        if !effect.is_empty() {
            text += &format!("  effect    {}\n", effect.join("; "));
        }
        text += &format!(
            "  evidence  [{}] {} of what fails it\n",
            bar(self.evidence, BAR),
            percent(self.evidence)
        );
        if self.canary_requests < self.min_samples {
            text += &format!("  samples   {} of {}\n", self.canary_requests, self.min_samples);
        }
        if !self.would_change.is_empty() {
            text += &format!("  change    {}\n", self.would_change);
        }
        text
    }
}

impl View for Explanation {
    fn table(&self) -> String {
        let r = &self.rollout;
        let since = match r.phase_since_ms {
            0 => String::new(),
            since => format!(" for {}", ago(since, self.now_ms)),
        };
        let attempt = match r.attempt {
            0 | 1 => String::new(),
            attempt => format!(", attempt {attempt}"),
        };
        let mut text = format!(
            "{}: {} → {} at {}, {}{since}{}{attempt}; {}/{} gateways acknowledged epoch {}\n",
            r.model,
            r.stable,
            r.canary,
            r.share,
            r.phase,
            step(r.step, r.steps),
            r.acknowledged,
            r.live_gateways,
            r.epoch
        );
        for line in self.waits() {
            text += &format!("{line}\n");
        }
        let counted = shares(r);
        if !counted.is_empty() {
            text += &format!("counted: {counted}\n");
        }
        if !self.steps.is_empty() {
            text += &format!("\n{}", self.steps_table());
        }
        if self.stable.requests + self.canary.requests > 0 {
            text += &format!("\n{}", self.sides_table());
        }
        for metric in &self.metrics {
            text += &format!("\n{}", metric.text());
        }
        text
    }
}

/// A bar of `cells` cells, filled to `share` of its length.
pub(crate) fn bar(share: f64, cells: usize) -> String {
    let cells = u16::try_from(cells).unwrap_or(u16::MAX);
    let filled = (0..cells)
        .take_while(|cell| (f64::from(*cell) + 0.5) / f64::from(cells) <= share)
        .count();
    let empty = usize::from(cells) - filled;
    format!("{}{}", "█".repeat(filled), "·".repeat(empty))
}

/// The time between two moments, to the second.
pub(crate) fn ago(since_ms: u64, now_ms: u64) -> String {
    span(now_ms.saturating_sub(since_ms))
}

/// `2h 3m`, to the second.
fn span(ms: u64) -> String {
    humantime::format_duration(Duration::from_secs(ms / 1000)).to_string()
}

/// A moment in UTC, to the second.
pub(crate) fn moment(ms: u64) -> String {
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(ms / 1000));
    // Beyond what a calendar can say; show the figure rather than hide it.
    at.filter(|_| ms / 1000 < 253_402_300_800).map_or_else(
        || format!("{ms} ms"),
        |at| humantime::format_rfc3339_seconds(at).to_string(),
    )
}
