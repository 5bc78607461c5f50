//! Mixture likelihood-ratio tests on counts of bad events.

use serde::{Deserialize, Serialize};

/// Requests, and bad events among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests.
    pub n: u64,
    /// Bad events; what is above `n` counts as `n`.
    pub bad: u64,
}

/// Both sides of a comparison among requests that are alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stratum {
    /// The revision being tried.
    pub canary: Counts,
    /// The revision that served before.
    pub stable: Counts,
}

/// What the counts say against the canary.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Evidence {
    /// Natural logarithm of the e-value against the null hypothesis; 0 where nothing is known.
    pub log_e: f64,
    /// The canary's rate of bad events, in [0, 1]; `None` without requests.
    pub canary_rate: Option<f64>,
    /// Stable's; `None` without requests or where stable has no part in the test.
    pub stable_rate: Option<f64>,
}

/// What follows from the evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Enough was seen, and nothing that would speak against the canary.
    Pass,
    /// The canary is worse than allowed; wrong with probability α at most.
    Fail,
    /// Too little was seen.
    Insufficient,
}

/// Relative risks over which the alternative is mixed, and their weights, which add up to 1. Small risks need many
/// events and so the least handicap; large ones are found within a handful of events whatever their weight.
const RISKS: [(f64, f64); 7] = [
    (1.25, 0.08),
    (1.5, 0.14),
    (2.0, 0.28),
    (3.0, 0.14),
    (5.0, 0.16),
    (10.0, 0.14),
    (25.0, 0.06),
];

/// Evidence that more than `limit` of the canary's requests are bad: H₀ is P(bad) ≤ `limit`.
///
/// "The P99 is at most T" is the same test: the share of requests above T exceeds 1 %. A limit of 0 makes the
/// first bad event conclusive; a limit of 1 or NaN is never exceeded.
pub fn exceedance(canary: Counts, limit: f64) -> Evidence {
    let (n, bad) = split(canary);
    let evidence = Evidence {
        canary_rate: rate(canary),
        ..Evidence::default()
    };
    if !(0.0..1.0).contains(&limit) || n == 0.0 {
        return evidence;
    }
    let log_e = match limit {
        0.0 if bad > 0.0 => f64::INFINITY,
        0.0 => 0.0,
        _ => mixture(|risk| {
            let rate = alternative_rate(limit, risk);
            bad * (rate / limit).ln() + (n - bad) * ((1.0 - rate) / (1.0 - limit)).ln()
        }),
    };
    Evidence { log_e, ..evidence }
}

/// Evidence that the canary's rate of bad events is more than `max_ratio` times stable's.
///
/// The attribution test: given that a bad event happens, under H₀ it is the canary's with a probability of at most
/// r·s/(r·s + 1 − s), where s is the canary's share of the requests and r the ratio. Neither the rate of bad events
/// nor how traffic comes matters. Strata are compared each by itself under one common relative risk, so that a
/// canary that gets the harder requests is not blamed for them.
pub fn attribution(strata: &[Stratum], max_ratio: f64) -> Evidence {
    let sum = |side: fn(&Stratum) -> Counts| {
        strata.iter().map(side).fold(Counts::default(), |a, b| Counts {
            n: a.n.saturating_add(b.n),
            bad: a.bad.saturating_add(b.bad),
        })
    };
    let evidence = Evidence {
        log_e: 0.0,
        canary_rate: rate(sum(|stratum| stratum.canary)),
        stable_rate: rate(sum(|stratum| stratum.stable)),
    };
    if max_ratio.is_nan() || max_ratio <= 0.0 {
        return evidence;
    }
    let log_e = mixture(|risk| {
        strata
            .iter()
            .map(|stratum| log_ratio(stratum, max_ratio, risk))
            .sum()
    });
    Evidence { log_e, ..evidence }
}

/// Bounds between which the canary's rate lies with a confidence of 1 − 2α at all times together: what a rate of
/// `canary` would have to be for [`exceedance`], or its mirror image, to speak against it at level `alpha`.
pub fn bounds(canary: Counts, alpha: f64) -> Option<(f64, f64)> {
    let (n, bad) = split(canary);
    if n == 0.0 {
        return None;
    }
    let threshold = -alpha.clamp(f64::MIN_POSITIVE, 1.0).ln();
    let mirrored = Counts {
        n: canary.n,
        bad: (n - bad) as u64,
    };
    Some((lower(canary, threshold), 1.0 - lower(mirrored, threshold)))
}

/// The verdict at level `alpha` after `samples` of the canary's requests, of which `min_samples` are needed before
/// anything passes. A failure needs no minimum: the evidence is valid from the first event on.
pub fn verdict(evidence: &Evidence, alpha: f64, samples: u64, min_samples: u64) -> Verdict {
    let fails = evidence.log_e >= -alpha.clamp(f64::MIN_POSITIVE, 1.0).ln();
    match (fails, samples >= min_samples) {
        (true, _) => Verdict::Fail,
        (false, true) => Verdict::Pass,
        (false, false) => Verdict::Insufficient,
    }
}

/// Rate under the alternative of relative risk `risk`; by odds, so that it stays below 1.
pub(crate) fn alternative_rate(limit: f64, risk: f64) -> f64 {
    let odds = risk * limit / (1.0 - limit);
    odds / (1.0 + odds)
}

/// ln Σ wᵢ·exp(f(riskᵢ)), without overflow.
fn mixture(log_ratio: impl Fn(f64) -> f64) -> f64 {
    let terms = RISKS.map(|(risk, weight)| weight.ln() + log_ratio(risk));
    let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !largest.is_finite() {
        return largest;
    }
    largest + terms.iter().map(|term| (term - largest).exp()).sum::<f64>().ln()
}

/// Log-likelihood ratio of one stratum's bad events.
fn log_ratio(stratum: &Stratum, max_ratio: f64, risk: f64) -> f64 {
    let (canary, stable) = (stratum.canary, stratum.stable);
    // Without requests on both sides there is nothing to compare.
    if canary.n == 0 || stable.n == 0 {
        return 0.0;
    }
    let odds = max_ratio * canary.n as f64 / stable.n as f64;
    let share = |odds: f64| odds / (1.0 + odds);
    let (null, alternative) = (share(odds), share(odds * risk));
    split(canary).1 * (alternative / null).ln() + split(stable).1 * ((1.0 - alternative) / (1.0 - null)).ln()
}

/// The largest limit that the counts speak against.
fn lower(counts: Counts, threshold: f64) -> f64 {
    let (mut low, mut high) = (0.0, rate(counts).unwrap_or_default());
    if counts.bad == 0 {
        return 0.0;
    }
    // The evidence falls as the limit grows; 50 halvings leave nothing of a double's precision.
    for _ in 0..50 {
        let middle = f64::midpoint(low, high);
        if exceedance(counts, middle).log_e >= threshold {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

fn rate(counts: Counts) -> Option<f64> {
    let (n, bad) = split(counts);
    (n > 0.0).then(|| bad / n)
}

fn split(counts: Counts) -> (f64, f64) {
    (counts.n as f64, counts.bad.min(counts.n) as f64)
}

#[cfg(test)]
mod tests;
