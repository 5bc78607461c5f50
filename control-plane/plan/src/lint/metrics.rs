//! Metrics: each can fail a canary, in a unit that it has, and at most so often as α says.

use std::collections::BTreeMap;

use super::Report;
use crate::{Limit, Manifest, Metric, Ppm, Signal};

pub(super) fn check(plan: &Manifest, report: &mut Report<'_>) {
    whole(plan, report);
    let mut first: BTreeMap<&Signal, usize> = BTreeMap::new();
    for (index, metric) in plan.analysis.metrics.iter().enumerate() {
        let path = format!("analysis.metrics[{index}]");
        if let Some(earlier) = first.get(&metric.name) {
            report.error(
                format!("{path}.name"),
                "duplicate-metric",
                format!(
                    "analysis.metrics[{earlier}] is {} too: put both bounds into one metric",
                    metric.name
                ),
            );
        }
        first.entry(&metric.name).or_insert(index);
        bounds(metric, &path, report);
        units(metric, &path, report);
        unused(metric, &path, report);
        prometheus(metric, &path, report);
    }
    watch_words(plan, report);
    if let Some(last) = plan.steps.iter().position(|step| step.canary.0 == Ppm::ALL) {
        compared_with_nothing(plan, last, report);
    }
}

fn whole(plan: &Manifest, report: &mut Report<'_>) {
    let analysis = &plan.analysis;
    if !(analysis.alpha > 0.0 && analysis.alpha <= 0.5) {
        report.error(
            "analysis.alpha",
            "bad-alpha",
            format!(
                "{} is no level of a test: write a number above 0 and up to 0.5",
                analysis.alpha
            ),
        );
    }
    if !(analysis.extend_limit.is_finite() && analysis.extend_limit >= 0.0) {
        report.error(
            "analysis.extend_limit",
            "bad-extend-limit",
            format!(
                "{} is no multiple of a hold: write a number from 0 up",
                analysis.extend_limit
            ),
        );
    }
    if analysis.metrics.is_empty() && !plan.steps.is_empty() {
        report.warning(
            "analysis.metrics",
            "no-metrics",
            "nothing is judged, so every step passes when its hold is over: add metrics, for example \
             {name: error_rate, max: 1%}",
        );
    }
}

fn bounds(metric: &Metric, path: &str, report: &mut Report<'_>) {
    let events = matches!(metric.name, Signal::OutOfMemory | Signal::Restarts);
    if metric.max.is_none() && metric.max_ratio.is_none() && !events {
        report.error(
            path,
            "metric-without-bound",
            format!("{} can never fail: give it max or max_ratio", metric.name),
        );
    }
    let Some(ratio) = metric.max_ratio else {
        return;
    };
    let path = format!("{path}.max_ratio");
    if !(ratio.is_finite() && ratio > 0.0) {
        report.error(
            path,
            "bad-ratio",
            format!("{ratio} is no ratio to stable: write a number above 0, for example 2"),
        );
    } else if !metric.name.is_counted() {
        report.error(
            path,
            "ratio-without-stable",
            format!("{} is not measured of stable: give it max", metric.name),
        );
    } else if metric.name.tail().is_some() && metric.max.is_none() {
        report.error(
            path,
            "quantile-ratio-needs-max",
            format!(
                "{} counts the requests above max: without max there is nothing to compare",
                metric.name
            ),
        );
    }
}

fn units(metric: &Metric, path: &str, report: &mut Report<'_>) {
    let Some(max) = metric.max else {
        return;
    };
    let (fits, write) = match (&metric.name, max) {
        (Signal::Latency(_) | Signal::Ttft(_) | Signal::Tpot(_), limit) => {
            (matches!(limit, Limit::Seconds(_)), "a time span such as 2s")
        }
        (Signal::OutputLength(_), limit) => (matches!(limit, Limit::Number(_)), "tokens such as 512"),
        (Signal::OutOfMemory | Signal::Restarts, limit) => {
            (matches!(limit, Limit::Number(_)), "a number such as 0")
        }
        (Signal::Prometheus(_), _) => (true, ""),
        (_, limit) => (matches!(limit, Limit::Share(_)), "a share such as 1%"),
    };
    let path = format!("{path}.max");
    if !fits {
        report.error(
            path,
            "wrong-unit",
            format!("{max} has the wrong unit for {}: write {write}", metric.name),
        );
    } else if max == Limit::Share(1.0) {
        report.error(
            path,
            "max-of-all",
            format!("{} is never above 100%: write less", metric.name),
        );
    }
}

fn unused(metric: &Metric, path: &str, report: &mut Report<'_>) {
    if let Some(threshold) = metric.threshold {
        let path = format!("{path}.threshold");
        let share = matches!(threshold, Limit::Share(_))
            || matches!(threshold, Limit::Number(value) if (0.0..=1.0).contains(&value));
        if metric.name != Signal::Repetition {
            report.error(
                path,
                "unused-threshold",
                format!("{} has no threshold beside max: leave it out", metric.name),
            );
        } else if !share {
            report.error(
                path,
                "wrong-unit",
                format!("{threshold} has the wrong unit for repetition: write a share such as 20%"),
            );
        }
    }
    if metric.stratify.is_some() && metric.max_ratio.is_none() {
        report.warning(
            format!("{path}.stratify"),
            "unused-stratify",
            "strata are compared with stable's: without max_ratio nothing is",
        );
    }
}

fn prometheus(metric: &Metric, path: &str, report: &mut Report<'_>) {
    let query = match (&metric.name, &metric.prometheus) {
        (Signal::Prometheus(name), None) => {
            return report.error(
                path,
                "prometheus-missing",
                format!("prometheus:{name} has no query: add prometheus: {{url: ..., query: ...}}"),
            );
        }
        (Signal::Prometheus(_), Some(query)) => query,
        (name, Some(_)) => {
            return report.error(
                format!("{path}.prometheus"),
                "prometheus-missing",
                format!("{name} is measured by gateways: name the metric prometheus:NAME to ask Prometheus"),
            );
        }
        (_, None) => return,
    };
    let path = format!("{path}.prometheus");
    if !(query.url.starts_with("http://") || query.url.starts_with("https://")) {
        report.error(
            format!("{path}.url"),
            "bad-url",
            format!("{:?} is no address such as http://127.0.0.1:9090", query.url),
        );
    }
    if query.query.trim().is_empty() {
        report.error(
            format!("{path}.query"),
            "empty-query",
            "\"\" asks for nothing: write PromQL",
        );
    }
    if query.every.get().is_zero() {
        report.error(
            format!("{path}.every"),
            "bad-every",
            "0s between two evaluations: write 1s or more",
        );
    }
}

fn watch_words(plan: &Manifest, report: &mut Report<'_>) {
    let metrics = &plan.analysis.metrics;
    let watching = metrics
        .iter()
        .position(|metric| metric.name == Signal::WatchWords);
    match watching {
        Some(index) if plan.analysis.watch_words.is_empty() => report.error(
            format!("analysis.metrics[{index}].name"),
            "watch-words-missing",
            "watch_words needs words to look for: list them in analysis.watch_words",
        ),
        None if !plan.analysis.watch_words.is_empty() => report.warning(
            "analysis.watch_words",
            "watch-words-unused",
            "nothing comes of the words: add {name: watch_words, max: 0.1%} to the metrics",
        ),
        _ => {}
    }
}

/// A canary with all of the traffic leaves nothing to compare it with.
fn compared_with_nothing(plan: &Manifest, step: usize, report: &mut Report<'_>) {
    let metrics = &plan.analysis.metrics;
    if !metrics.is_empty()
        && metrics
            .iter()
            .all(|metric| metric.name.is_counted() && metric.max.is_none())
    {
        report.warning(
            format!("steps[{step}].canary"),
            "nothing-to-compare",
            "at 100% stable has no requests, so max_ratio says nothing: give a metric max too",
        );
    }
}
