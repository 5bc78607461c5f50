//! How long a test takes to see a worse canary, and how often it accuses an innocent one: by simulation from a
//! seed, the same on every machine.

use crate::{Counts, Stratum, attribution, exceedance, sequential::threshold};

/// Which test is simulated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Test {
    /// [`exceedance`] of this limit.
    Exceedance(f64),
    /// [`attribution`] with this ratio.
    Attribution(f64),
}

/// The world that a test is put into.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scenario {
    /// The test.
    pub test: Test,
    /// Stable's rate of bad events.
    pub stable_rate: f64,
    /// The canary's.
    pub canary_rate: f64,
    /// The canary's share of the requests.
    pub canary_share: f64,
    /// Level of the test.
    pub alpha: f64,
    /// Requests of the canary after which a run ends.
    pub horizon: u64,
    /// Runs.
    pub runs: u32,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// When the test fails the canary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    /// Requests of the canary until half of the runs have failed; `None` where fewer ever do.
    pub median: Option<u64>,
    /// Likewise until nine tenths have.
    pub p90: Option<u64>,
    /// Share of the runs that fail within the horizon.
    pub detected: f64,
}

/// Bad events of the canary after which a run ends undecided, so that a scenario without an end comes to one.
const MOST_EVENTS: u32 = 1_000_000;

/// Simulates a scenario, looking at the evidence after every bad event of the canary, which is when it grows.
///
/// How often an innocent canary is accused is `detected` where both rates are the same, or the canary's is the limit.
/// Rates are cut to [0, 1]; where no bad event can come, or none can be compared, none is detected.
pub fn detect(scenario: &Scenario) -> Detection {
    let mut random = SplitMix(scenario.seed);
    let mut failed: Vec<u64> = (0..scenario.runs)
        .filter_map(|_| run(scenario, &mut random))
        .collect();
    failed.sort_unstable();
    let at = |quantile: f64| {
        let rank = (quantile * f64::from(scenario.runs)).ceil() as usize;
        failed.get(rank.saturating_sub(1)).copied()
    };
    Detection {
        median: at(0.5),
        p90: at(0.9),
        detected: failed.len() as f64 / f64::from(scenario.runs.max(1)),
    }
}

/// Requests of the canary until the test fails it, if it does within the horizon.
fn run(scenario: &Scenario, random: &mut SplitMix) -> Option<u64> {
    let threshold = threshold(scenario.alpha);
    let (of_canary, of_stable) = (
        scenario.canary_rate.clamp(0.0, 1.0),
        scenario.stable_rate.clamp(0.0, 1.0),
    );
    let mut counts = Stratum::default();
    for _ in 0..MOST_EVENTS {
        let n = random.geometric(of_canary)?;
        counts.canary += Counts { n, bad: 1 };
        if counts.canary.n > scenario.horizon {
            return None;
        }
        if let Test::Attribution(_) = scenario.test {
            let n = random.failures(n, scenario.canary_share)?;
            let bad = random.binomial(n, of_stable);
            counts.stable += Counts { n, bad };
        }
        let evidence = match scenario.test {
            Test::Exceedance(limit) => exceedance(counts.canary, limit),
            Test::Attribution(ratio) => attribution(&[counts], ratio),
        };
        if evidence.log_e >= threshold {
            return Some(counts.canary.n);
        }
    }
    None
}

/// Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
#[derive(Debug, Clone)]
pub struct SplitMix(pub u64);

// === impl SplitMix ===

impl SplitMix {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Trials up to and with the first success; `None` where none can come.
    pub fn geometric(&mut self, chance: f64) -> Option<u64> {
        if chance.is_nan() || chance <= 0.0 {
            return None;
        }
        if chance >= 1.0 {
            return Some(1);
        }
        let failures = (self.uniform().ln() / (-chance).ln_1p()).floor();
        Some((failures as u64).saturating_add(1))
    }

    /// Failures before the `n`th success: gap by gap where they are few, else by the normal approximation; `None`
    /// where no success can come.
    pub fn failures(&mut self, n: u64, chance: f64) -> Option<u64> {
        if n < 64 {
            return (0..n).try_fold(0_u64, |sum, _| {
                Some(sum.saturating_add(self.geometric(chance)? - 1))
            });
        }
        if chance.is_nan() || chance <= 0.0 {
            return None;
        }
        let chance = chance.min(1.0);
        let mean = n as f64 * (1.0 - chance) / chance;
        Some((mean + (mean / chance).sqrt() * self.normal()).round().max(0.0) as u64)
    }

    /// Standard normal (Box and Muller, 1958).
    fn normal(&mut self) -> f64 {
        let (radius, angle) = (
            (-2.0 * self.uniform().ln()).sqrt(),
            std::f64::consts::TAU * self.uniform(),
        );
        radius * angle.cos()
    }

    /// Successes among `n` trials: trial by trial where they are few, by the gaps between them where successes or
    /// failures are, else by the normal approximation.
    pub fn binomial(&mut self, n: u64, chance: f64) -> u64 {
        let mean = n as f64 * chance;
        let variance = mean * (1.0 - chance);
        if n < 64 {
            return (0..n).filter(|_| self.uniform() < chance).count() as u64;
        }
        if variance < 25.0 {
            let rare = chance.min(1.0 - chance);
            let (mut at, mut successes) = (0, 0);
            while let Some(gap) = self.geometric(rare) {
                at = gap.saturating_add(at);
                if at > n {
                    break;
                }
                successes += 1;
            }
            return if chance <= 0.5 { successes } else { n - successes };
        }
        let drawn = mean + variance.sqrt() * self.normal();
        (drawn.round().clamp(0.0, n as f64) as u64).min(n)
    }
}

#[cfg(test)]
mod tests;
