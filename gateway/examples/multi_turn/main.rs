//! What routing by prefix is worth: hit rates of 64 conversations on four workers, by policy.
//!
//! `cargo run -p gateway --example multi_turn`
#![allow(clippy::print_stdout, reason = "a bench prints its table")]

mod trace;

use gateway::balance::Policy;
use trace::{Fleet, Trace, play};

fn main() {
    let trace = Trace {
        conversations: 64,
        turns: 6,
        turn_tokens: 200,
        reply_tokens: 200,
        system_tokens: 300,
    };
    println!("64 conversations x 6 turns of 200 tokens, replies of 200, 300 shared; mean of 10 runs");
    println!(
        "{:<34} {:>9} {:>10} {:>10} {:>9} {:>9}",
        "fleet", "hit rate", "of single", "imbalance", "ttft p50", "p99"
    );
    for cache_tokens in [usize::MAX, 32 << 10] {
        let single = Fleet {
            workers: 1,
            cache_tokens: cache_tokens.saturating_mul(4),
            gateways: 1,
            policy: Policy::Random,
        };
        let best = row("1 worker with all of the cache", &trace, &single, None);
        for (policy, gateways) in [
            (Policy::Random, 1),
            (Policy::TwoChoices, 1),
            (Policy::Prefix, 1),
            (Policy::Prefix, 2),
        ] {
            let fleet = Fleet {
                workers: 4,
                cache_tokens,
                gateways,
                policy,
            };
            let cache = match cache_tokens {
                usize::MAX => "endless".into(),
                tokens => format!("{} Ki", tokens >> 10),
            };
            let name = format!("4 x {cache}, {policy:?}, {gateways} gateway(s)");
            row(&name, &trace, &fleet, Some(best));
        }
    }
}

fn row(name: &str, trace: &Trace, fleet: &Fleet, best: Option<f64>) -> f64 {
    const RUNS: u32 = 10;
    let outcomes: Vec<_> = (0..RUNS).map(|seed| play(trace, fleet, seed.into())).collect();
    let mean = |of: &dyn Fn(&trace::Outcome) -> f64| outcomes.iter().map(of).sum::<f64>() / f64::from(RUNS);
    let hit_rate = mean(&|outcome| outcome.hit_rate);
    println!(
        "{name:<34} {:>7.1} % {:>8.1} % {:>10.2} {:>6.0} ms {:>6.0} ms",
        100.0 * hit_rate,
        100.0 * hit_rate / best.unwrap_or(hit_rate),
        mean(&|outcome| outcome.imbalance),
        mean(&|outcome| outcome.ttft[0].as_secs_f64() * 1e3),
        mean(&|outcome| outcome.ttft[1].as_secs_f64() * 1e3),
    );
    hit_rate
}
