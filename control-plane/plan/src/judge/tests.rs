use super::*;
use crate::{Change, CreateRollout, Manifest, PrometheusQuery, Sampled, Step, Tally};

fn rollout(metrics: Vec<Metric>, steps: usize) -> Rollout {
    let mut plan = Manifest {
        steps: vec![Step::default(); steps],
        ..Manifest::default()
    };
    plan.analysis.metrics = metrics;
    let new = CreateRollout {
        uid: "r-1".into(),
        model: "demo".into(),
        stable: "v1".into(),
        canary: "v2".into(),
        share: crate::Ppm::ZERO,
        plan,
    };
    Rollout::create(new, None, Change::default()).unwrap()
}

fn metric(yaml: &str) -> Metric {
    serde_norway::from_str(yaml).unwrap()
}

fn tally(name: &str, n: u64, bad: u64) -> Tally {
    let mut strata = [Counts::default(); crate::STRATA];
    strata[0] = Counts { n, bad };
    Tally {
        requests: n,
        metrics: [(name.to_owned(), strata)].into(),
        ..Tally::default()
    }
}

fn observed(name: &str, canary: (u64, u64), stable: (u64, u64)) -> Observations {
    let (canary, stable) = (tally(name, canary.0, canary.1), tally(name, stable.0, stable.1));
    Observations {
        boots: vec![[stable.clone(), canary.clone()]],
        canary,
        stable,
        ..Observations::default()
    }
}

fn one(yaml: &str, observations: &Observations) -> MetricVerdict {
    judge(&rollout(vec![metric(yaml)], 1), observations).remove(0)
}

#[test]
fn the_rules_that_operators_write_are_judged() {
    let errors = "{name: error_rate, max: 1%}";
    assert_eq!(
        one(errors, &observed("error_rate", (2_000, 200), (0, 0))).verdict,
        Verdict::Fail
    );
    assert_eq!(
        one(errors, &observed("error_rate", (2_000, 10), (0, 0))).verdict,
        Verdict::Pass
    );
    assert_eq!(
        one(errors, &observed("error_rate", (10, 0), (0, 0))).verdict,
        Verdict::Insufficient
    );
    // The P99 is above 2 s where more than 1 % take longer.
    let slow = "{name: latency_p99, max: 2s}";
    assert_eq!(
        one(slow, &observed("latency_p99", (2_000, 100), (0, 0))).verdict,
        Verdict::Fail
    );
    assert_eq!(
        one(slow, &observed("latency_p99", (2_000, 15), (0, 0))).verdict,
        Verdict::Pass
    );
}

#[test]
fn a_comparison_needs_stable() {
    let ratio = "{name: repetition, max_ratio: 1.5, action: pause}";
    let without = one(ratio, &observed("repetition", (5_000, 50), (0, 0)));
    assert_eq!(without.verdict, Verdict::Insufficient);
    assert!(
        without.would_change.contains("stable"),
        "{}",
        without.would_change
    );
    let worse = one(ratio, &observed("repetition", (500, 200), (5_000, 50)));
    assert_eq!((worse.verdict, worse.action), (Verdict::Fail, Action::Pause));
    assert!(
        worse.cause().starts_with("repetition: 200 of the canary's 500"),
        "{}",
        worse.cause()
    );
}

#[test]
fn it_is_told_what_would_change_a_verdict() {
    let passed = one(
        "{name: error_rate, max: 1%}",
        &observed("error_rate", (2_000, 10), (0, 0)),
    );
    let words = passed.would_change.clone();
    let bad: u64 = words
        .strip_prefix("fails if ")
        .and_then(|rest| rest.split(' ').next())
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("{words}"));
    let after = |more| {
        one(
            "{name: error_rate, max: 1%}",
            &observed("error_rate", (2_100, 10 + more), (0, 0)),
        )
    };
    assert_eq!(after(bad).verdict, Verdict::Fail);
    assert_eq!(after(bad - 1).verdict, Verdict::Pass);
    let few = one(
        "{name: error_rate, max: 1%, min_samples: 500}",
        &observed("error_rate", (123, 0), (0, 0)),
    );
    assert_eq!(few.would_change, "needs 377 more requests of the canary");
}

#[test]
fn alpha_is_shared_by_everything_that_can_accuse() {
    let two = rollout(
        vec![
            metric("{name: error_rate, max: 1%, max_ratio: 2}"),
            metric("{name: latency_p99, max: 2s}"),
        ],
        3,
    );
    assert!((alpha_per_test(&two) - 0.01 / 4.0 / 3.0).abs() < 1e-12);
    // However many trials an operator adds, the parts add up to no more than the whole.
    for steps in [0, 1, 4] {
        let sum: f64 = (0..10_000).map(|trial| trial_weight(steps, trial)).sum();
        assert!(sum <= 1.0 + 1e-9 && sum > 0.99, "{steps}: {sum}");
    }
}

#[test]
fn events_of_workers_count_one_by_one() {
    let observations = Observations {
        out_of_memory: 1,
        ..Observations::default()
    };
    let fails = one("{name: out_of_memory, max: 0}", &observations);
    assert_eq!(
        (fails.verdict, fails.cause().as_str()),
        (Verdict::Fail, "out_of_memory is 1, at most 0 is allowed")
    );
    assert_eq!(
        one("{name: restarts, max: 2}", &observations).verdict,
        Verdict::Pass
    );
}

#[test]
fn a_query_fails_after_so_many_values_in_a_row_and_no_data_is_no_failure() {
    let mut metric = metric("{name: 'prometheus:heat', max: 90}");
    metric.prometheus = Some(PrometheusQuery {
        failures: 3,
        ..PrometheusQuery::default()
    });
    let of = |sampled: Sampled| {
        let prometheus = [("prometheus:heat".to_owned(), sampled)].into();
        let observations = Observations {
            prometheus,
            ..Observations::default()
        };
        judge(&rollout(vec![metric.clone()], 1), &observations)
            .remove(0)
            .verdict
    };
    let value = |value, above| Sampled {
        value: Some(value),
        above,
        evaluations: 9,
    };
    assert_eq!(of(Sampled::default()), Verdict::Insufficient);
    assert_eq!(of(value(80.0, 0)), Verdict::Pass);
    assert_eq!(of(value(95.0, 2)), Verdict::Insufficient);
    assert_eq!(of(value(95.0, 3)), Verdict::Fail);
}

#[test]
fn aborts_go_before_pauses_and_warnings_hold_nothing_up() {
    let metrics = |action: &str| metric(&format!("{{name: error_rate, max: 1%, action: {action}}}"));
    let rollout = rollout(vec![metrics("warn"), metrics("pause"), metrics("abort")], 1);
    let verdicts = judge(&rollout, &observed("error_rate", (1_000, 900), (0, 0)));
    assert_eq!(failure(&verdicts).unwrap().action, Action::Abort);
    assert_eq!(failure(&verdicts[..2]).unwrap().action, Action::Pause);
    assert_eq!(failure(&verdicts[..1]), None);
    assert!(passes(&verdicts[..1]) && !passes(&verdicts[..2]));
}
