use super::*;
use crate::Attribution;

const SCENARIO: Scenario = Scenario {
    test: Test::Attribution(1.0),
    stable_rate: 0.005,
    canary_rate: 0.005,
    canary_share: 0.05,
    alpha: 0.01,
    horizon: 20_000,
    runs: 10_000,
    seed: 1,
};

#[test]
fn an_innocent_canary_is_accused_no_more_often_than_alpha_however_often_one_looks() {
    for alpha in [0.01, 0.05] {
        let detected = detect(&Scenario { alpha, ..SCENARIO }).detected;
        // Nor is the test so timid that it could not accuse anybody.
        assert!(0.0 < detected && detected <= alpha, "{detected}");
    }
}

#[test]
fn a_canary_exactly_at_its_limit_is_accused_no_more_often_than_alpha() {
    let scenario = Scenario {
        test: Test::Exceedance(0.01),
        canary_rate: 0.01,
        ..SCENARIO
    };
    let detected = detect(&scenario).detected;
    assert!(detected <= SCENARIO.alpha, "{detected}");
    assert!(detected > 0.0);
}

#[test]
fn looking_after_every_request_of_the_canary_accuses_no_more_often_either() {
    let (alpha, runs) = (0.05, 500);
    let mut random = SplitMix(11);
    let mut accused = 0;
    for _ in 0..runs {
        let mut counts = Stratum::default();
        accused += u32::from((0..20_000).any(|_| {
            let stable = random.geometric(SCENARIO.canary_share).unwrap() - 1;
            counts.stable += Counts {
                n: stable,
                bad: random.binomial(stable, 0.005),
            };
            counts.canary += Counts {
                n: 1,
                bad: random.binomial(1, 0.005),
            };
            attribution(&[counts], 1.0).log_e >= threshold(alpha)
        }));
    }
    let share = f64::from(accused) / f64::from(runs);
    assert!(0.0 < share && share <= alpha, "{share}");
    // The simulation, which looks at fewer points, comes to the same within four standard deviations.
    let detected = detect(&Scenario {
        alpha,
        runs: 5_000,
        ..SCENARIO
    })
    .detected;
    let deviation = (detected * (1.0 - detected) / f64::from(runs)).sqrt();
    assert!((share - detected).abs() < 4.0 * deviation, "{share} {detected}");
}

/// Share of 1,000 innocent canaries that are accused within 200 windows, in which bad hours fall together with a
/// larger share: with windows as strata of their own, and with everything in one.
fn accused_while_the_share_changes() -> (f64, f64) {
    let mut random = SplitMix(5);
    let (mut by_window, mut pooled) = (0.0, 0.0);
    for _ in 0..1_000 {
        let mut test = Attribution::new(1.0);
        let mut all = Stratum::default();
        let (mut window_fails, mut pooled_fails) = (false, false);
        for _ in 0..200 {
            let (share, rate) = match random.uniform() < 0.5 {
                true => (0.2, 0.02),
                false => (0.01, 0.002),
            };
            let canary = random.binomial(500, share);
            let mut side = |n| Counts {
                n,
                bad: random.binomial(n, rate),
            };
            let window = Stratum {
                canary: side(canary),
                stable: side(500 - canary),
            };
            test.observe(&[window]);
            all.canary += window.canary;
            all.stable += window.stable;
            window_fails |= test.evidence().log_e >= threshold(0.05);
            pooled_fails |= attribution(&[all], 1.0).log_e >= threshold(0.05);
        }
        by_window += f64::from(u8::from(window_fails)) / 1_000.0;
        pooled += f64::from(u8::from(pooled_fails)) / 1_000.0;
    }
    (by_window, pooled)
}

#[test]
fn a_share_that_changes_with_the_error_rate_accuses_nobody_where_windows_are_strata() {
    let (by_window, pooled) = accused_while_the_share_changes();
    assert!(by_window <= 0.05, "{by_window}");
    // This is what the strata are there for.
    assert!(pooled > 0.5, "{pooled}");
}

#[test]
fn strata_of_one_window_each_find_a_worse_canary_as_soon_as_totals_do() {
    let (mut random, mut needed) = (SplitMix(13), Vec::new());
    for _ in 0..1_000 {
        let mut test = Attribution::new(1.0);
        while test.evidence().log_e < threshold(0.01) {
            // Five of 100 requests are the canary's.
            let canary = random.binomial(100, 0.05);
            test.observe(&[Stratum {
                canary: Counts {
                    n: canary,
                    bad: random.binomial(canary, 0.025),
                },
                stable: Counts {
                    n: 100 - canary,
                    bad: random.binomial(100 - canary, 0.005),
                },
            }]);
        }
        needed.push(test.canary.n);
    }
    needed.sort_unstable();
    let totals = detect(&Scenario {
        canary_rate: 0.025,
        runs: 1_000,
        ..SCENARIO
    });
    let ratio = needed[500] as f64 / totals.median.unwrap() as f64;
    assert!(ratio < 1.15, "{ratio}");
}

#[test]
fn worse_canaries_are_seen_as_soon_as_the_published_simulation_sees_them() {
    // The published figures fit a level of 1 %; at 5 % a canary is seen in two thirds of the time.
    for (rate, median, p90) in [(0.01, 2_728, 6_442), (0.025, 326, 681), (0.05, 87, 193)] {
        let scenario = Scenario {
            canary_rate: rate,
            horizon: 100_000,
            runs: 2_000,
            ..SCENARIO
        };
        let detection = detect(&scenario);
        let within = |found: Option<u64>, published: u64| {
            let found = found.unwrap_or(u64::MAX);
            assert!(
                found as f64 <= 1.3 * published as f64,
                "{rate}: {found} against {published}: {detection:?}"
            );
        };
        within(detection.median, median);
        within(detection.p90, p90);
    }
}

#[test]
fn a_z_test_that_is_peeked_at_accuses_far_more_often() {
    let mut random = SplitMix(7);
    let mut accused = 0;
    for _ in 0..500 {
        let mut counts = Stratum::default();
        let peeked = (0..120).any(|_| {
            let (canary, stable) = (166, 3_167);
            counts.canary.n += canary;
            counts.canary.bad += random.binomial(canary, 0.005);
            counts.stable.n += stable;
            counts.stable.bad += random.binomial(stable, 0.005);
            z(&counts) > 2.326
        });
        accused += u32::from(peeked);
    }
    let share = f64::from(accused) / 500.0;
    assert!(share > 5.0 * SCENARIO.alpha, "{share}");
}

fn z(counts: &Stratum) -> f64 {
    let (nc, ns) = (counts.canary.n as f64, counts.stable.n as f64);
    let (pc, ps) = (counts.canary.bad as f64 / nc, counts.stable.bad as f64 / ns);
    let pooled = (counts.canary.bad + counts.stable.bad) as f64 / (nc + ns);
    (pc - ps) / (pooled * (1.0 - pooled) * (1.0 / nc + 1.0 / ns)).sqrt()
}

#[test]
fn the_simulated_canary_has_the_rate_that_it_should() {
    // Every request of a canary that fails always is bad: at a limit of 10 %, a risk of 25 is seen at the third.
    let scenario = Scenario {
        test: Test::Exceedance(0.1),
        canary_rate: 1.0,
        canary_share: 0.5,
        runs: 10,
        ..SCENARIO
    };
    let alone = (1..).find(|n| exceedance(Counts { n: *n, bad: *n }, 0.1).log_e >= threshold(0.01));
    assert_eq!(detect(&scenario).median, alone);
}

#[test]
fn scenarios_without_an_end_come_to_one() {
    for odd in [0.0, -1.0, 1.0, 2.0, 1e-300, f64::NAN, f64::INFINITY] {
        for test in [
            Test::Attribution(1.0),
            Test::Attribution(odd),
            Test::Exceedance(odd),
        ] {
            let scenario = Scenario {
                test,
                runs: 1,
                ..SCENARIO
            };
            detect(&Scenario {
                canary_share: odd,
                ..scenario
            });
            detect(&Scenario {
                canary_rate: odd,
                ..scenario
            });
            detect(&Scenario {
                stable_rate: odd,
                ..scenario
            });
            detect(&Scenario {
                alpha: odd,
                ..scenario
            });
        }
    }
    let never = detect(&Scenario {
        canary_share: 0.0,
        runs: 2,
        ..SCENARIO
    });
    assert_eq!((never.median, never.detected), (None, 0.0));
    assert_eq!(detect(&Scenario { runs: 0, ..SCENARIO }).detected, 0.0);
}

#[test]
fn the_same_seed_gives_the_same_runs() {
    let scenario = Scenario {
        runs: 50,
        canary_rate: 0.02,
        ..SCENARIO
    };
    assert_eq!(detect(&scenario), detect(&scenario));
    assert_ne!(detect(&scenario), detect(&Scenario { seed: 2, ..scenario }));
}

#[test]
fn draws_have_the_mean_that_they_should() {
    let mut random = SplitMix(3);
    for (n, chance) in [(40, 0.3), (2_000, 0.005), (2_000, 0.995), (100_000, 0.05)] {
        let runs = 2_000;
        let mean = (0..runs).map(|_| random.binomial(n, chance) as f64).sum::<f64>() / f64::from(runs);
        let expected = n as f64 * chance;
        let error = (expected * (1.0 - chance) / f64::from(runs)).sqrt();
        assert!((mean - expected).abs() < 5.0 * error, "{n} {chance}: {mean}");
    }
    for (n, chance) in [(1, 0.05), (40, 0.3), (200, 0.05)] {
        let runs = 2_000;
        let mean = (0..runs)
            .map(|_| random.failures(n, chance).unwrap() as f64)
            .sum::<f64>()
            / f64::from(runs);
        let expected = n as f64 * (1.0 - chance) / chance;
        let error = (expected / chance / f64::from(runs)).sqrt();
        assert!((mean - expected).abs() < 5.0 * error, "{n} {chance}: {mean}");
    }
}
