//! How long a test takes to see a worse canary, and how often it accuses an innocent one: by simulation from a
//! seed, the same on every machine.

use crate::{Counts, Stratum, attribution, exceedance};

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

/// Simulates a scenario, looking at the evidence after every bad event, which is when it can grow.
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
    let threshold = -scenario.alpha.ln();
    let share = scenario.canary_share.clamp(0.0, 1.0);
    // Per request: chance of a bad event of the canary, and of stable where the test looks at it.
    let canary = share * scenario.canary_rate;
    let stable = match scenario.test {
        Test::Exceedance(_) => 0.0,
        Test::Attribution(_) => (1.0 - share) * scenario.stable_rate,
    };
    let mut counts = Stratum::default();
    loop {
        let gap = random.geometric(canary + stable)?;
        let of_canary = random.binomial(gap.saturating_sub(1), share);
        counts.canary.n += of_canary;
        counts.stable.n += gap - 1 - of_canary;
        let bad = Counts { n: 1, bad: 1 };
        let side = match random.uniform() * (canary + stable) < canary {
            true => &mut counts.canary,
            false => &mut counts.stable,
        };
        *side = Counts {
            n: side.n + bad.n,
            bad: side.bad + bad.bad,
        };
        if counts.canary.n > scenario.horizon {
            return None;
        }
        let evidence = match scenario.test {
            Test::Exceedance(limit) => exceedance(counts.canary, limit),
            Test::Attribution(ratio) => attribution(&[counts], ratio),
        };
        if evidence.log_e >= threshold {
            return Some(counts.canary.n);
        }
    }
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
        Some((self.uniform().ln() / (-chance).ln_1p()).floor() as u64 + 1)
    }

    /// Successes among `n` trials: trial by trial where they are few, else by the normal approximation.
    pub fn binomial(&mut self, n: u64, chance: f64) -> u64 {
        let mean = n as f64 * chance;
        let variance = mean * (1.0 - chance);
        if n < 64 {
            return (0..n).filter(|_| self.uniform() < chance).count() as u64;
        }
        if variance < 25.0 {
            // Gaps between successes of the rarer side.
            let rare = chance.min(1.0 - chance);
            let (mut at, mut successes) = (0, 0);
            while let Some(gap) = self.geometric(rare) {
                at += gap;
                if at > n {
                    break;
                }
                successes += 1;
            }
            return if chance <= 0.5 { successes } else { n - successes };
        }
        let (radius, angle) = (
            (-2.0 * self.uniform().ln()).sqrt(),
            std::f64::consts::TAU * self.uniform(),
        );
        (mean + variance.sqrt() * radius * angle.cos())
            .round()
            .clamp(0.0, n as f64) as u64
    }
}

#[cfg(test)]
mod tests;
