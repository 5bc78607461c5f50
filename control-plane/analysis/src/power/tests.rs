use super::*;

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
    let detected = detect(&SCENARIO).detected;
    assert!(detected <= SCENARIO.alpha, "{detected}");
    // The test is not so timid that it could not accuse anybody.
    assert!(detected > 0.0);
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
fn worse_canaries_are_seen_as_soon_as_the_published_simulation_sees_them() {
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
}
