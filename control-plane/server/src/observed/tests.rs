use penstock_plan::{Change, CreateRollout, Manifest, Ppm, Sticky};

use super::*;

fn rollout() -> Rollout {
    let new = CreateRollout {
        uid: "r-1".into(),
        model: "demo".into(),
        stable: "v1".into(),
        canary: "v2".into(),
        share: Ppm::ZERO,
        plan: Manifest::manual("demo", "v2", &Sticky::default()),
    };
    Rollout::create(new, None, Change::default()).unwrap()
}

fn stats(sequence: u64, revision: &str, requests: u64, in_flight: u32) -> v1::Stats {
    v1::Stats {
        sequence,
        revisions: vec![v1::RevisionStats {
            model: "demo".into(),
            revision: revision.into(),
            rollout_uid: "r-1".into(),
            attempt: 1,
            requests,
            in_flight,
            metrics: vec![v1::MetricCounts {
                metric: "error_rate".into(),
                strata: vec![v1::Counts {
                    requests,
                    bad: requests / 10,
                }],
            }],
            ttft_s: Some(v1::Sketch {
                index: vec![0],
                count: vec![requests],
                zeros: 0,
                sum: requests as f64,
            }),
            keys: vec![u8::from(requests > 0); 16].into(),
            ..v1::RevisionStats::default()
        }],
        overrides: Vec::new(),
    }
}

#[test]
fn reports_of_several_gateways_add_up_and_none_counts_twice() {
    let observed = Observed::default();
    observed.hear_gateway("g1", "a", stats(2, "v2", 20, 1), 0);
    observed.hear_gateway("g1", "a", stats(2, "v2", 20, 1), 0);
    observed.hear_gateway("g1", "a", stats(1, "v2", 10, 9), 0);
    observed.hear_gateway("g2", "b", stats(1, "v2", 5, 2), 0);
    let observations = observed.of(&rollout());
    assert_eq!(observations.canary.requests, 25);
    assert_eq!(observations.canary.counts("error_rate").bad, 2);
    assert_eq!(observed.in_flight("demo", "v2", 0), 3);
    // What a gateway that is lost had in flight is nobody's any more.
    assert_eq!(observed.in_flight("demo", "v2", PRESENT_MS + 1), 0);
    let sides = observed.sides(&rollout());
    assert_eq!(sides[1].ttft_s.as_ref().unwrap().count, [25]);
    assert_eq!(Observed::key_share(&sides), Some(1.0));
}

#[test]
fn a_control_plane_that_takes_over_goes_on_from_what_was_written_down() {
    let first = Observed::default();
    first.hear_gateway("g1", "a", stats(7, "v2", 70, 0), 0);
    let written = first.unsaved(&rollout()).unwrap();
    assert_eq!(first.unsaved(&rollout()), None, "nothing new");
    let second = Observed::default();
    second.hear_gateway("g1", "a", stats(8, "v2", 80, 0), 0);
    second.restore(written.clone());
    assert_eq!(second.of(&rollout()).canary.requests, 80);
    // A gateway that died in between is remembered by what was written.
    let third = Observed::default();
    third.restore(written);
    third.hear_gateway("g1", "a-2", stats(1, "v2", 3, 0), 0);
    assert_eq!(third.of(&rollout()).canary.requests, 73);
}

#[test]
fn charts_show_what_came_since_the_last_point() {
    let observed = Observed::default();
    observed.hear_gateway("g1", "a", stats(1, "v2", 10, 0), 0);
    observed.point(&rollout(), 10_000);
    observed.hear_gateway("g1", "a", stats(2, "v2", 30, 0), 0);
    observed.point(&rollout(), 10_500);
    observed.point(&rollout(), 11_000);
    let requests: Vec<u64> = observed
        .points(&rollout())
        .iter()
        .map(|p| p.canary.unwrap().requests)
        .collect();
    assert_eq!(requests, [10, 20]);
}

#[test]
fn restarts_and_out_of_memory_are_counted_over_boots() {
    let observed = Observed::default();
    let report = |out_of_memory| v1::WorkerReport {
        revisions: vec![v1::RevisionState {
            model: "demo".into(),
            revision: "v2".into(),
            out_of_memory,
            ..v1::RevisionState::default()
        }],
    };
    observed.hear_worker("w1", "a", report(2), 1);
    observed.hear_worker("w1", "a", report(3), 2);
    assert_eq!(
        (
            observed.of(&rollout()).out_of_memory,
            observed.of(&rollout()).restarts
        ),
        (3, 0)
    );
    observed.hear_worker("w1", "b", report(1), 3);
    assert_eq!(
        (
            observed.of(&rollout()).out_of_memory,
            observed.of(&rollout()).restarts
        ),
        (4, 1)
    );
}

#[test]
fn a_query_without_data_breaks_no_row() {
    let observed = Observed::default();
    for value in [Some(9.0), None, Some(9.0), Some(9.0)] {
        observed.sample("r-1", "prometheus:heat", value, 5.0);
    }
    assert_eq!(observed.of(&rollout()).prometheus["prometheus:heat"].above, 3);
    observed.sample("r-1", "prometheus:heat", Some(5.0), 5.0);
    assert_eq!(observed.of(&rollout()).prometheus["prometheus:heat"].above, 0);
}

#[test]
fn each_override_is_handed_over_once_at_its_start_and_at_its_end() {
    let observed = Observed::default();
    let report = |sequence, ended_ms| v1::Stats {
        sequence,
        overrides: vec![v1::OverrideRecord {
            id: "o-1".into(),
            ended_ms,
            ..v1::OverrideRecord::default()
        }],
        ..v1::Stats::default()
    };
    for (sequence, ended) in [(1, 0), (2, 0), (3, 9), (4, 9)] {
        observed.hear_gateway("g1", "a", report(sequence, ended), 0);
    }
    let ended: Vec<u64> = observed
        .overrides()
        .iter()
        .map(|(_, record)| record.ended_ms)
        .collect();
    assert_eq!(ended, [0, 9]);
    assert!(observed.overrides().is_empty());
}
