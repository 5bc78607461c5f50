//! Routing by prefix keeps conversations where their prompts are computed, and workers evenly busy.

#[path = "../examples/multi_turn/trace.rs"]
mod trace;

use gateway::balance::Policy;
use trace::{Fleet, Outcome, Trace, play};

const TRACE: Trace = Trace {
    conversations: 64,
    turns: 6,
    turn_tokens: 200,
    reply_tokens: 200,
    system_tokens: 300,
};

fn mean(fleet: Fleet, of: fn(&Outcome) -> f64) -> f64 {
    const RUNS: u32 = 5;
    (0..RUNS)
        .map(|seed| of(&play(&TRACE, &fleet, seed.into())))
        .sum::<f64>()
        / f64::from(RUNS)
}

fn single(cache_tokens: usize) -> f64 {
    let fleet = Fleet {
        workers: 1,
        cache_tokens,
        gateways: 1,
        policy: Policy::Random,
    };
    mean(fleet, |outcome| outcome.hit_rate)
}

#[test]
fn four_workers_hit_their_caches_like_a_single_one() {
    for gateways in [1, 2] {
        let fleet = Fleet {
            workers: 4,
            cache_tokens: usize::MAX,
            gateways,
            policy: Policy::Prefix,
        };
        let share = mean(fleet, |outcome| outcome.hit_rate) / single(usize::MAX);
        assert!(share >= 0.95, "{gateways} gateways: {share}");
        let imbalance = mean(fleet, |outcome| outcome.imbalance);
        assert!(imbalance <= 1.25, "{gateways} gateways: {imbalance}");
    }
}

#[test]
fn small_caches_are_used_far_better_than_by_chance() {
    let fleet = |policy| Fleet {
        workers: 4,
        cache_tokens: 32 << 10,
        gateways: 1,
        policy,
    };
    let prefix = mean(fleet(Policy::Prefix), |outcome| outcome.hit_rate);
    let random = mean(fleet(Policy::Random), |outcome| outcome.hit_rate);
    assert!(prefix > 0.95 * single(4 * (32 << 10)), "{prefix}");
    assert!(prefix > 1.5 * random, "{prefix} and by chance {random}");
    let ttft = |policy| mean(fleet(policy), |outcome| outcome.ttft[1].as_secs_f64());
    assert!(ttft(Policy::Prefix) < ttft(Policy::Random));
}
