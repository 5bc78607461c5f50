//! Adding up what several gateways say.

use penstock_analysis::{Bins, Counts, Sketch};
use penstock_plan::{STRATA, Tally};
use penstock_proto::v1;

/// The counts that verdicts are made of.
pub(super) fn tally(stats: &v1::RevisionStats) -> Tally {
    let strata = |metric: &v1::MetricCounts| {
        let mut strata = [Counts::default(); STRATA];
        // Strata of a newer gateway that this build does not know go into the last one.
        for (index, counts) in metric.strata.iter().enumerate() {
            let own = &mut strata[index.min(STRATA - 1)];
            own.n = own.n.saturating_add(counts.requests);
            own.bad = own.bad.saturating_add(counts.bad);
        }
        (metric.metric.clone(), strata)
    };
    Tally {
        requests: stats.requests,
        errors: stats.errors,
        timeouts: stats.timeouts,
        cancelled: stats.cancelled,
        prompt_tokens: stats.prompt_tokens,
        cached_tokens: stats.cached_tokens,
        output_tokens: stats.output_tokens,
        metrics: stats.metrics.iter().map(strata).collect(),
    }
}

/// Takes another gateway's counts and sketches in.
pub(super) fn add_stats(total: &mut v1::RevisionStats, stats: &v1::RevisionStats) {
    for (own, more) in [
        (&mut total.requests, stats.requests),
        (&mut total.errors, stats.errors),
        (&mut total.timeouts, stats.timeouts),
        (&mut total.cancelled, stats.cancelled),
        (&mut total.prompt_tokens, stats.prompt_tokens),
        (&mut total.cached_tokens, stats.cached_tokens),
        (&mut total.output_tokens, stats.output_tokens),
        (&mut total.watch_word_hits, stats.watch_word_hits),
        (&mut total.grammar_failures, stats.grammar_failures),
        (&mut total.feedback, stats.feedback),
        (&mut total.negative_feedback, stats.negative_feedback),
        (&mut total.mirrored, stats.mirrored),
    ] {
        *own = own.saturating_add(more);
    }
    total.in_flight = total.in_flight.saturating_add(stats.in_flight);
    for (own, more) in [
        (&mut total.ttft_s, &stats.ttft_s),
        (&mut total.tpot_s, &stats.tpot_s),
        (&mut total.total_s, &stats.total_s),
        (&mut total.output_length, &stats.output_length),
        (&mut total.repetition, &stats.repetition),
    ] {
        if let Some(more) = more {
            let mut sketch = own.take().map(read).unwrap_or_default();
            sketch.merge(&read(more.clone()));
            *own = Some(write(&sketch));
        }
    }
    let registers = total.keys.len().max(stats.keys.len());
    let at = |keys: &[u8], register| keys.get(register).copied().unwrap_or_default();
    total.keys = (0..registers)
        .map(|register| at(&total.keys, register).max(at(&stats.keys, register)))
        .collect();
}

/// A sketch from its wire form.
pub(super) fn read(wire: v1::Sketch) -> Sketch {
    Sketch::from(Bins {
        index: wire.index,
        count: wire.count,
        zeros: wire.zeros,
        sum: wire.sum,
    })
}

fn write(sketch: &Sketch) -> v1::Sketch {
    let bins = Bins::from(sketch);
    v1::Sketch {
        index: bins.index,
        count: bins.count,
        zeros: bins.zeros,
        sum: bins.sum,
    }
}

/// Distinct keys, from the registers of a HyperLogLog (Flajolet et al., AofA 2007), with its correction for small
/// sets; off by 3 % as a rule.
pub(super) fn distinct(registers: &[u8]) -> f64 {
    let count = registers.len() as f64;
    if registers.is_empty() {
        return 0.0;
    }
    let sum: f64 = registers.iter().map(|&rank| (-f64::from(rank)).exp2()).sum();
    let estimate = 0.7213 / (1.0 + 1.079 / count) * count * count / sum;
    let empty = registers.iter().filter(|&&rank| rank == 0).count() as f64;
    match estimate <= 2.5 * count && empty > 0.0 {
        true => count * (count / empty).ln(),
        false => estimate,
    }
}
