use penstock_plan::{Outcome, RequestFacts, Threshold};

use super::*;

fn route(step: u32) -> Route {
    let threshold = |metric: &str, over| Threshold {
        metric: metric.into(),
        over,
    };
    Route {
        model: "demo".into(),
        stable: Revision::new("v1", "aa"),
        rollout_uid: "r-1".into(),
        trial: Some(Trial {
            attempt: 1,
            step,
            thresholds: vec![
                threshold("error_rate", 0.0),
                threshold("latency_p99", 2.0),
                threshold("negative_feedback", 0.0),
                threshold("of_the_future", 0.0),
                threshold("restarts", 0.0),
            ],
            window_s: 60,
        }),
        ..Route::default()
    }
}

fn snapshot(step: u32) -> Snapshot {
    Snapshot {
        epoch: 1,
        routes: [("demo".into(), route(step))].into(),
    }
}

fn took(total_s: f64, outcome: Outcome, cached: u32) -> Ended {
    Ended {
        facts: RequestFacts {
            outcome,
            total_s,
            prompt_tokens: Some(100),
            cached_tokens: cached,
            output_tokens: Some(5),
            ..RequestFacts::default()
        },
        cancelled: false,
    }
}

#[test]
fn bad_events_are_counted_by_stratum_and_once_per_key_and_window() {
    let (ledger, route) = (Ledger::default(), route(0));
    let entry = ledger.entry(&route, &route.stable);
    let now = Instant::now();
    for (key, ended) in [
        (Some(1), took(1.0, Outcome::Ok, 0)),
        (Some(1), took(3.0, Outcome::Ok, 0)),
        (Some(1), took(3.0, Outcome::Ok, 0)),
        (Some(2), took(3.0, Outcome::Error, 70)),
        (Some(2), took(9.0, Outcome::Excluded, 70)),
    ] {
        entry.record(key, &ended, now);
    }
    entry.judged(true);
    let stats = ledger.report(Some(&snapshot(0)), now).remove(0);
    let metrics: Vec<(&str, [(u64, u64); 3])> = stats
        .metrics
        .iter()
        .map(|metric| {
            let strata = [0, 1, 2].map(|index| (metric.strata[index].requests, metric.strata[index].bad));
            (metric.metric.as_str(), strata)
        })
        .collect();
    assert_eq!(
        metrics,
        [
            ("error_rate", [(3, 0), (0, 0), (1, 1)]),
            ("latency_p99", [(3, 1), (0, 0), (1, 1)]),
            ("negative_feedback", [(1, 1), (0, 0), (0, 0)]),
        ]
    );
    assert_eq!((stats.requests, stats.errors, stats.output_tokens), (5, 1, 25));
    assert_eq!((stats.feedback, stats.negative_feedback), (1, 1));
    let total = stats.total_s.unwrap();
    assert_eq!(
        total.count.iter().sum::<u64>(),
        4,
        "what says nothing of the service is left out"
    );
}

#[test]
fn trials_are_never_added_up_and_old_ones_go_after_an_hour() {
    let ledger = Ledger::default();
    let (before, after) = (route(0), route(1));
    let now = Instant::now();
    for route in [&before, &after] {
        ledger
            .entry(route, &route.stable)
            .record(None, &took(1.0, Outcome::Ok, 0), now);
    }
    let steps = |at| {
        let mut steps: Vec<(u32, u64)> = ledger
            .report(Some(&snapshot(1)), at)
            .iter()
            .map(|stats| (stats.step, stats.requests))
            .collect();
        steps.sort_unstable();
        steps
    };
    assert_eq!(steps(now), [(0, 1), (1, 1)]);
    assert_eq!(steps(now + KEEP - Duration::from_secs(1)), [(0, 1), (1, 1)]);
    let running = Running::new(ledger.entry(&before, &before.stable), None);
    assert_eq!(steps(now + KEEP), [(0, 1), (1, 1)], "a request of it still runs");
    drop(running);
    assert_eq!(steps(now + KEEP).len(), 2, "the hour begins with its end");
    assert_eq!(steps(now + KEEP * 2), [(1, 1)]);
}

#[test]
fn running_requests_are_counted_while_they_run() {
    let (ledger, route) = (Ledger::default(), route(0));
    let entry = ledger.entry(&route, &route.stable);
    let running = [1, 2].map(|key| Running::new(entry.clone(), Some(key)));
    assert_eq!(entry.report().in_flight, 2);
    drop(running);
    assert_eq!(entry.report().in_flight, 0);
}

#[test]
fn of_many_trials_that_are_over_the_newest_are_kept() {
    let (ledger, start) = (Ledger::default(), Instant::now());
    // One request of the first trial goes on.
    let running = Running::new(ledger.entry(&route(0), &route(0).stable), None);
    for step in 0..100 {
        let route = route(step);
        ledger.entry(&route, &route.stable);
        let now = start + Duration::from_secs(u64::from(step));
        ledger.report(Some(&snapshot(step)), now);
    }
    let steps = || {
        let report = ledger.report(Some(&snapshot(99)), start + Duration::from_secs(100));
        let mut steps: Vec<u32> = report.iter().map(|stats| stats.step).collect();
        steps.sort_unstable();
        steps
    };
    let newest = 99 - u32::try_from(MOST_OVER).unwrap()..=99;
    let expected: Vec<u32> = std::iter::once(0).chain(newest.clone()).collect();
    assert_eq!(steps(), expected);
    drop(running);
    let expected: Vec<u32> = newest.collect();
    // It is the last that ended; the one before it is dropped for it.
    assert_eq!(steps(), [&[0], &expected[1..]].concat());
}
