use proptest::prelude::*;

use super::*;

fn counts(n: u64, bad: u64) -> Counts {
    Counts { n, bad }
}

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
        let stratum = Stratum {
            canary: counts(10, 10),
            stable: counts(10, 0),
        };
        assert_eq!(attribution(&[stratum], ratio).log_e, 0.0);
    }
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
    fn the_rate_lies_between_its_bounds(n in 1u64..10_000, share in 0.0f64..=1.0) {
        let bad = (n as f64 * share) as u64;
        let (low, high) = bounds(counts(n, bad), 0.01).unwrap();
        let rate = bad as f64 / n as f64;
        prop_assert!((0.0..=1.0).contains(&low) && (0.0..=1.0).contains(&high));
        prop_assert!(low <= rate && rate <= high, "{low} {rate} {high}");
    }

    #[test]
    fn no_counts_make_it_panic(n in any::<u64>(), bad in any::<u64>(), stable in any::<u64>(), limit in any::<f64>()) {
        let evidence = exceedance(counts(n, bad), limit);
        prop_assert!(!evidence.log_e.is_nan());
        let stratum = Stratum { canary: counts(n, bad), stable: counts(stable, bad) };
        prop_assert!(!attribution(&[stratum], limit).log_e.is_nan());
    }
}
