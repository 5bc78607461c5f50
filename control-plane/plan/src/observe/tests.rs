use proptest::{collection::vec, prelude::*};

use super::*;

fn key(revision: &str, trial: u32) -> ObservationKey {
    ObservationKey {
        rollout_uid: "r-1".into(),
        attempt: 1,
        trial,
        revision: revision.into(),
    }
}

fn strata(first: Counts) -> [Counts; STRATA] {
    let mut strata = [Counts::default(); STRATA];
    strata[0] = first;
    strata
}

fn tally(requests: u64, bad: u64) -> Tally {
    Tally {
        requests,
        metrics: [("error_rate".to_owned(), strata(Counts { n: requests, bad }))].into(),
        ..Tally::default()
    }
}

fn report(requests: u64) -> BTreeMap<ObservationKey, Tally> {
    [(key("v2", 0), tally(requests, requests / 10))].into()
}

#[test]
fn a_report_that_is_heard_again_or_late_counts_once() {
    let mut ledger = Ledger::default();
    assert!(ledger.hear("a", 2, report(20)));
    assert!(!ledger.hear("a", 2, report(20)));
    assert!(!ledger.hear("a", 1, report(10)));
    assert_eq!(ledger.total(&key("v2", 0)).requests, 20);
}

#[test]
fn a_gateway_that_restarts_counts_on_and_loses_nothing() {
    let mut ledger = Ledger::default();
    ledger.hear("a-1", 90, report(100));
    ledger.hear("a-2", 1, report(5));
    assert_eq!(ledger.total(&key("v2", 0)).requests, 105);
    assert_eq!(
        ledger.total(&key("v2", 0)).counts("error_rate"),
        Counts { n: 105, bad: 10 }
    );
}

#[test]
fn trials_and_revisions_are_kept_apart() {
    let mut ledger = Ledger::default();
    ledger.hear(
        "a",
        1,
        [
            (key("v1", 0), tally(90, 0)),
            (key("v2", 0), tally(10, 1)),
            (key("v2", 1), tally(7, 0)),
        ]
        .into(),
    );
    assert_eq!(ledger.total(&key("v2", 1)).requests, 7);
    ledger.keep(|key| key.trial == 1);
    assert_eq!(ledger.total(&key("v2", 0)).requests, 0);
    assert_eq!(ledger.of_rollout("r-2"), Ledger::default());
}

#[test]
fn a_ledger_survives_the_store() {
    let mut ledger = Ledger::default();
    ledger.hear("a", 3, report(30));
    let json = serde_json::to_string(&ledger).unwrap();
    assert_eq!(serde_json::from_str::<Ledger>(&json).unwrap(), ledger);
}

proptest! {
    /// Three gateways report at will; reports are lost, repeated and shuffled, and a new control plane takes over
    /// from what another had written down. Whatever happens, the total is that of the newest reports heard.
    #[test]
    fn no_order_of_reports_loses_or_doubles_a_count(
        heard in vec((0usize..3, 1u64..20), 1..60), split in any::<prop::sample::Index>(),
    ) {
        let boots = ["a", "b", "c"];
        let mut newest = [0u64; 3];
        let split = split.index(heard.len());
        let mut first = Ledger::default();
        let mut second = Ledger::default();
        for (at, (boot, sequence)) in heard.iter().enumerate() {
            let ledger = if at < split { &mut first } else { &mut second };
            // What a boot has counted grows with its sequence number.
            ledger.hear(boots[*boot], *sequence, report(sequence * 10));
            newest[*boot] = newest[*boot].max(*sequence);
        }
        second.merge(first);
        prop_assert_eq!(second.total(&key("v2", 0)).requests, newest.iter().sum::<u64>() * 10);
    }
}

#[test]
fn gateways_with_other_shares_are_compared_each_by_itself_and_rules_left_out() {
    let mut ledger = Ledger::default();
    ledger.hear(
        "a",
        1,
        [(key("v1", 0), tally(90, 1)), (key("v2", 0), tally(10, 2))].into(),
    );
    let mut ruled = tally(40, 3);
    ruled.metrics.get_mut("error_rate").unwrap()[STRATA / 2] = Counts { n: 5, bad: 5 };
    ledger.hear("b", 1, [(key("v2", 0), ruled)].into());
    let observations = Observations {
        boots: ledger.sides(&key("v1", 0), &key("v2", 0)),
        ..Observations::default()
    };
    let counts = |n, bad| Counts { n, bad };
    assert_eq!(
        observations.strata("error_rate", false),
        [
            Stratum {
                canary: counts(10, 2),
                stable: counts(90, 1)
            },
            Stratum {
                canary: counts(40, 3),
                stable: counts(0, 0)
            },
        ]
    );
    assert_eq!(ledger.total(&key("v2", 0)).counts("error_rate"), counts(55, 10));
}
