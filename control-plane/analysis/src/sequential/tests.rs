use proptest::{collection::vec, num::f64 as float, prelude::*};

use super::*;

fn counts(n: u64, bad: u64) -> Counts {
    Counts { n, bad }
}

const GUILTY: Stratum = Stratum {
    canary: Counts { n: 10, bad: 10 },
    stable: Counts { n: 10, bad: 0 },
};

#[test]
fn nothing_seen_says_nothing() {
    assert_eq!(exceedance(Counts::default(), 0.01).log_e, 0.0);
    assert!(attribution(&[], 1.0).log_e.abs() < 1e-12);
    assert!(attribution(&[Stratum::default()], 2.0).log_e.abs() < 1e-12);
    assert_eq!(bounds(Counts::default(), 0.01), None);
}

#[test]
fn absurd_limits_accuse_nobody_and_panic_nowhere() {
    for limit in [f64::NAN, -1.0, 1.0, 2.0, f64::INFINITY] {
        assert_eq!(exceedance(counts(10, 10), limit).log_e, 0.0);
    }
    for ratio in [f64::NAN, -1.0, 0.0] {
        assert!(attribution(&[GUILTY], ratio).log_e.abs() < 1e-12);
    }
    assert!(attribution(&[GUILTY], f64::INFINITY).log_e < 1e-12);
    assert!(attribution(&[GUILTY], f64::MIN_POSITIVE).log_e > 10.0);
    assert_eq!(exceedance(counts(10, 1), 0.0).log_e, f64::INFINITY);
    assert_eq!(exceedance(counts(10, 0), 0.0).log_e, 0.0);
}

#[test]
fn strata_do_not_blame_a_canary_for_harder_requests() {
    // Both sides fail 1 % of easy and 10 % of hard requests; the canary gets more of the hard ones.
    let easy = Stratum {
        canary: counts(1_000, 10),
        stable: counts(90_000, 900),
    };
    let hard = Stratum {
        canary: counts(4_000, 400),
        stable: counts(10_000, 1_000),
    };
    let pooled = Stratum {
        canary: counts(5_000, 410),
        stable: counts(100_000, 1_900),
    };
    assert_eq!(
        verdict(&attribution(&[pooled], 1.0), 0.01, 5_000, 100),
        Verdict::Fail
    );
    assert_eq!(
        verdict(&attribution(&[easy, hard], 1.0), 0.01, 5_000, 100),
        Verdict::Pass
    );
}

#[test]
fn strata_that_each_say_little_convict_together() {
    let stratum = Stratum {
        canary: counts(400, 6),
        stable: counts(7_600, 38),
    };
    let of = |strata: &[Stratum]| verdict(&attribution(strata, 1.0), 0.01, 400, 1);
    assert_eq!(of(&[stratum]), Verdict::Pass);
    assert_eq!(of(&[stratum; 6]), Verdict::Fail);
}

#[test]
fn a_side_without_requests_says_nothing_about_the_other() {
    let alone = Stratum {
        canary: counts(1_000, 900),
        stable: Counts::default(),
    };
    assert!(attribution(&[alone], 1.0).log_e.abs() < 1e-12);
    assert_eq!(ratio_bounds(&[alone], 0.01), None);
}

#[test]
fn levels_that_make_no_sense_are_taken_at_their_limits() {
    let (some, certain) = (exceedance(counts(500, 50), 0.01), exceedance(counts(1, 1), 0.0));
    assert!(some.log_e > 10.0);
    let failed = |evidence, alpha| verdict(evidence, alpha, 500, 0) == Verdict::Fail;
    assert!(!failed(&some, 0.0) && !failed(&some, -1.0) && !failed(&some, f64::NAN));
    assert!(failed(&certain, 0.0) && failed(&some, 2.0));
}

#[test]
fn no_side_is_more_than_certain_about_a_few_events() {
    // What the canary shows is four times stable's rate; bounds at 99 % hold that and leave out 1.
    let stratum = Stratum {
        canary: counts(5_000, 100),
        stable: counts(95_000, 475),
    };
    let (low, high) = ratio_bounds(&[stratum], 0.01).unwrap();
    assert!(
        1.0 < low && low < 4.0 && 4.0 < high && high < 10.0,
        "{low} {high}"
    );
    // Without a bad event of stable's there is no telling how much worse the canary is.
    assert_eq!(ratio_bounds(&[GUILTY], 0.01).unwrap().1, f64::INFINITY);
}

/// E[e] under `rates` of canary and stable where the numbers of requests are given: both sides' bad events are
/// independent coins, so that it is a product.
fn expected_e(canary: u64, stable: u64, rates: (f64, f64), max_ratio: f64) -> f64 {
    let null = 1.0 / (1.0 + stable as f64 / canary as f64 / max_ratio);
    let of_risk = |(risk, weight): (f64, f64)| {
        let factor = |events| log_ratio(events, 1.0, null, risk).exp();
        let log_side = |n: u64, rate: f64, event| n as f64 * (rate * (factor(event) - 1.0)).ln_1p();
        weight * (log_side(canary, rates.0, 1.0) + log_side(stable, rates.1, 0.0)).exp()
    };
    RISKS.into_iter().map(of_risk).sum()
}

#[test]
fn a_canary_twice_as_bad_passes_where_twice_is_allowed() {
    let stratum = Stratum {
        canary: counts(10_000, 200),
        stable: counts(100_000, 1_000),
    };
    assert_eq!(
        verdict(&attribution(&[stratum], 1.0), 0.01, 10_000, 1),
        Verdict::Fail
    );
    assert_eq!(
        verdict(&attribution(&[stratum], 2.0), 0.01, 10_000, 1),
        Verdict::Pass
    );
}

#[test]
fn too_few_samples_pass_nothing_and_still_can_fail() {
    let clean = exceedance(counts(20, 0), 0.01);
    assert_eq!(verdict(&clean, 0.01, 20, 100), Verdict::Insufficient);
    assert_eq!(verdict(&clean, 0.01, 100, 100), Verdict::Pass);
    assert_eq!(
        verdict(&exceedance(counts(20, 10), 0.01), 0.01, 20, 100),
        Verdict::Fail
    );
}

#[test]
fn weights_are_a_distribution() {
    let sum: f64 = RISKS.iter().map(|(_, weight)| weight).sum();
    assert!((sum - 1.0).abs() < 1e-12);
}

proptest! {
    #[test]
    fn more_bad_events_never_speak_for_the_canary(n in 1u64..5_000, bad in 0u64..5_000, limit in 0.001f64..0.5) {
        let bad = bad.min(n - 1);
        // At the same number of requests one more of them was bad.
        let (less, more) = (exceedance(counts(n, bad), limit), exceedance(counts(n, bad + 1), limit));
        prop_assert!(more.log_e >= less.log_e);
    }

    #[test]
    fn attribution_grows_with_the_canarys_events_and_falls_with_stables(
        n in 10u64..5_000, bad in 0u64..10, stable in 10u64..50_000, stable_bad in 0u64..10, ratio in 0.5f64..4.0,
    ) {
        let of = |bad, stable_bad| {
            attribution(&[Stratum { canary: counts(n, bad), stable: counts(stable, stable_bad) }], ratio).log_e
        };
        prop_assert!(of(bad + 1, stable_bad) >= of(bad, stable_bad));
        prop_assert!(of(bad, stable_bad + 1) <= of(bad, stable_bad));
    }

    #[test]
    fn evidence_against_an_innocent_canary_is_expected_to_be_1_at_most(
        canary in 1u64..50_000, stable in 1u64..50_000, rate in 0.0f64..=1.0, max_ratio in 0.1f64..10.0,
    ) {
        let expected = expected_e(canary, stable, ((max_ratio * rate).min(1.0), rate), max_ratio);
        prop_assert!(expected <= 1.0 + 1e-9, "{expected}");
    }

    #[test]
    fn windows_folded_in_one_by_one_say_what_their_strata_say(
        windows in vec((0u64..1_000, 0u64..20, 0u64..1_000, 0u64..20), 0..20), ratio in 0.5f64..4.0,
    ) {
        let strata: Vec<Stratum> = windows
            .into_iter()
            .map(|(n, bad, stable, stable_bad)| Stratum { canary: counts(n, bad), stable: counts(stable, stable_bad) })
            .collect();
        let mut test = Attribution::new(ratio);
        for window in strata.chunks(3) {
            // As it is kept over a restart.
            test = serde_json::from_str(&serde_json::to_string(&test).unwrap()).unwrap();
            test.observe(window);
        }
        let (folded, at_once) = (test.evidence(), attribution(&strata, ratio));
        prop_assert!((folded.log_e - at_once.log_e).abs() < 1e-9);
        prop_assert_eq!((folded.canary_rate, folded.stable_rate), (at_once.canary_rate, at_once.stable_rate));
    }

    #[test]
    fn the_ratio_is_bounded_by_what_speaks_against_it(
        n in 100u64..5_000, bad in 0u64..100, stable in 100u64..50_000, stable_bad in 1u64..100,
    ) {
        let strata = [Stratum { canary: counts(n, bad), stable: counts(stable, stable_bad) }];
        let (low, high) = ratio_bounds(&strata, 0.01).unwrap();
        let ratio = (bad as f64 / n as f64) / (stable_bad as f64 / stable as f64);
        prop_assert!(low <= ratio && ratio <= high, "{low} {ratio} {high}");
        let fails = |ratio| verdict(&attribution(&strata, ratio), 0.01, n, 0) == Verdict::Fail;
        prop_assert!(low == 0.0 || fails(low * 0.999) && !fails(low * 1.001));
    }

    #[test]
    fn the_rate_lies_between_its_bounds(n in 1u64..10_000, share in 0.0f64..=1.0) {
        let bad = (n as f64 * share) as u64;
        let (low, high) = bounds(counts(n, bad), 0.01).unwrap();
        let rate = bad as f64 / n as f64;
        prop_assert!((0.0..=1.0).contains(&low) && (0.0..=1.0).contains(&high));
        prop_assert!(low <= rate && rate <= high, "{low} {rate} {high}");
    }

    #[test]
    fn no_counts_make_it_panic(
        n in any::<u64>(), bad in any::<u64>(), stable in any::<u64>(), limit in float::ANY, alpha in float::ANY,
    ) {
        let evidence = exceedance(counts(n, bad), limit);
        prop_assert!(!evidence.log_e.is_nan());
        let stratum = Stratum { canary: counts(n, bad), stable: counts(stable, bad) };
        prop_assert!(!attribution(&[stratum, stratum], limit).log_e.is_nan());
        let _ = (bounds(counts(n, bad), alpha), ratio_bounds(&[stratum], alpha));
        let _ = verdict(&evidence, alpha, n, bad);
    }
}
