//! Mixture likelihood-ratio tests on counts of bad events.

use std::{iter::Sum, ops::AddAssign};

use serde::{Deserialize, Serialize};

/// Requests, and bad events among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests.
    pub n: u64,
    /// Bad events; what is above `n` counts as `n`.
    pub bad: u64,
}

/// Both sides of a comparison among requests that are alike, each of which had the same chance to go to the canary.
/// When that chance changes (another step, another region's share), another stratum begins: were both put into one,
/// a bad hour that fell into the larger share would be blamed on the canary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stratum {
    /// The revision being tried.
    pub canary: Counts,
    /// The revision that served before.
    pub stable: Counts,
}

/// The attribution test carried along: windows are folded in one after the other, and nothing but their sums is kept.
/// [`attribution`] is the same test for strata that are all at hand.
///
/// Each window is a set of strata of its own, so that the share may differ from window to window. For counts that
/// were fixed before their outcomes were known, the expected factor of a window is at most 1 under H₀:
/// Π(1 + pᵢ·xᵢ) ≤ exp Σ pᵢ·xᵢ, whose exponent is 0 where the canary's rate is exactly `max_ratio` times stable's, and
/// less where it is lower. So the product is a supermartingale, and Ville's inequality holds for every rate of bad
/// events, also for one that changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attribution {
    max_ratio: f64,
    /// Log-likelihood ratio by relative risk.
    log_ratios: [f64; RISKS.len()],
    pub(crate) canary: Counts,
    stable: Counts,
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

/// ln 10⁹.
const LN_BILLION: f64 = 9.0 * std::f64::consts::LN_10;

/// Evidence that more than `limit` of the canary's requests are bad: H₀ is P(bad) ≤ `limit`.
///
/// "The P99 is at most T" is the same test: the share of requests above T exceeds 1 %. A limit of 0 makes the
/// first bad event conclusive; a limit outside of [0, 1) or NaN is never exceeded.
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
        _ => mixture(RISKS.map(|(risk, _)| log_ratio(bad, n, limit, risk))),
    };
    Evidence { log_e, ..evidence }
}

/// Evidence that the canary's rate of bad events is more than `max_ratio` times stable's.
///
/// The attribution test: given that a bad event happens, under H₀ it is the canary's with a probability of at most
/// r·s/(r·s + 1 − s), where s is the canary's share of the requests and r the ratio. The rate of bad events does not
/// matter. Strata are compared each by itself under one common relative risk, so that a canary that gets the harder
/// requests is not blamed for them. A stratum without requests on both sides says nothing; so a canary that has all
/// of the traffic needs an [`exceedance`] test. A ratio that is not a positive number is never exceeded.
pub fn attribution(strata: &[Stratum], max_ratio: f64) -> Evidence {
    let mut test = Attribution::new(max_ratio);
    test.observe(strata);
    test.evidence()
}

/// Bounds between which the canary's rate lies with a confidence of 1 − 2α at all times together: what a rate of
/// `canary` would have to be for [`exceedance`], or its mirror image, to speak against it at level `alpha`.
pub fn bounds(canary: Counts, alpha: f64) -> Option<(f64, f64)> {
    let (n, bad) = split(canary);
    if n == 0.0 {
        return None;
    }
    let threshold = threshold(alpha);
    let mirrored = Counts {
        n: canary.n,
        bad: (n - bad) as u64,
    };
    Some((lower(canary, threshold), 1.0 - lower(mirrored, threshold)))
}

/// Bounds between which the ratio of the canary's rate to stable's lies with a confidence of 1 − 2α at all times
/// together: the largest ratio that [`attribution`] speaks against at level `alpha`, and its mirror image. The lower
/// is 0 and the upper infinite where nothing is known; `None` without a stratum that has requests on both sides.
pub fn ratio_bounds(strata: &[Stratum], alpha: f64) -> Option<(f64, f64)> {
    if !strata.iter().any(Stratum::compares) {
        return None;
    }
    let swapped: Vec<Stratum> = strata
        .iter()
        .map(|stratum| Stratum {
            canary: stratum.stable,
            stable: stratum.canary,
        })
        .collect();
    let threshold = threshold(alpha);
    Some((
        lower_ratio(strata, threshold),
        lower_ratio(&swapped, threshold).recip(),
    ))
}

/// The verdict at level `alpha` after `samples` of the canary's requests, of which `min_samples` are needed before
/// anything passes. A failure needs no minimum: the evidence is valid from the first event on. Levels that make no
/// sense: at 1 and above the least evidence is enough, at 0 and below only what H₀ excludes, at NaN nothing.
pub fn verdict(evidence: &Evidence, alpha: f64, samples: u64, min_samples: u64) -> Verdict {
    let fails = evidence.log_e >= threshold(alpha);
    match (fails, samples >= min_samples) {
        (true, _) => Verdict::Fail,
        (false, true) => Verdict::Pass,
        (false, false) => Verdict::Insufficient,
    }
}

/// ln(1/α), which the evidence has to reach.
pub(crate) fn threshold(alpha: f64) -> f64 {
    -alpha.clamp(0.0, 1.0).ln()
}

/// ln Σ wᵢ·exp(log_ratioᵢ), without overflow.
fn mixture(log_ratios: [f64; RISKS.len()]) -> f64 {
    let largest = log_ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = log_ratios
        .iter()
        .zip(RISKS)
        .map(|(log_ratio, (_, weight))| weight * (log_ratio - largest).exp())
        .sum();
    largest + sum.ln()
}

/// Log-likelihood ratio of `events` among `trials`, each with a probability of `null` under H₀, and with `risk` times
/// the odds under the alternative: p₁/p₀ = k/(1 + p₀·(k − 1)), and (1 − p₁)/(1 − p₀) is the same without the k.
fn log_ratio(events: f64, trials: f64, null: f64, risk: f64) -> f64 {
    events * risk.ln() - trials * (null * (risk - 1.0)).ln_1p()
}

/// The largest ratio that the strata speak against.
fn lower_ratio(strata: &[Stratum], threshold: f64) -> f64 {
    // In logarithms, from one to a billion to a billion to one.
    let (mut low, mut high) = (-LN_BILLION, LN_BILLION);
    if attribution(strata, low.exp()).log_e < threshold {
        return 0.0;
    }
    // The evidence falls as the ratio grows; 40 halvings leave eleven digits.
    for _ in 0..40 {
        let middle = f64::midpoint(low, high);
        if attribution(strata, middle.exp()).log_e >= threshold {
            low = middle;
        } else {
            high = middle;
        }
    }
    low.exp()
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

// === impl Counts ===

impl Counts {
    /// What came since `earlier`, a former state of these counts; 0 where they shrank.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            n: self.n.saturating_sub(earlier.n),
            bad: self.bad.saturating_sub(earlier.bad),
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.n = self.n.saturating_add(other.n);
        self.bad = self.bad.saturating_add(other.bad);
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |mut sum, counts| {
            sum += counts;
            sum
        })
    }
}

// === impl Stratum ===

impl Stratum {
    /// Whether there is anything to compare.
    fn compares(&self) -> bool {
        self.canary.n > 0 && self.stable.n > 0
    }
}

// === impl Attribution ===

impl Attribution {
    /// A test of H₀: the canary's rate is at most `max_ratio` times stable's.
    pub fn new(max_ratio: f64) -> Self {
        Self {
            max_ratio,
            log_ratios: [0.0; RISKS.len()],
            canary: Counts::default(),
            stable: Counts::default(),
        }
    }

    /// Takes in the strata of a further window: what came since the last one, not totals.
    pub fn observe(&mut self, strata: &[Stratum]) {
        self.canary += strata.iter().map(|stratum| stratum.canary).sum();
        self.stable += strata.iter().map(|stratum| stratum.stable).sum();
        if self.max_ratio.is_nan() || self.max_ratio <= 0.0 {
            return;
        }
        for stratum in strata.iter().filter(|stratum| stratum.compares()) {
            let ((canary, of_canary), (stable, of_stable)) = (split(stratum.canary), split(stratum.stable));
            // The canary's share of the bad events under H₀; written so that no ratio makes it NaN.
            let null = 1.0 / (1.0 + stable / canary / self.max_ratio);
            for (sum, (risk, _)) in self.log_ratios.iter_mut().zip(RISKS) {
                *sum += log_ratio(of_canary, of_canary + of_stable, null, risk);
            }
        }
    }

    /// What all windows together say.
    pub fn evidence(&self) -> Evidence {
        Evidence {
            log_e: mixture(self.log_ratios),
            canary_rate: rate(self.canary),
            stable_rate: rate(self.stable),
        }
    }
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
