//! How a figure of a process moves while it works.

use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};

/// Samples of one figure over time, and the line through them.
#[derive(Debug, Clone)]
pub struct Trend {
    began: Instant,
    samples: Vec<(f64, f64)>,
}

// === impl Trend ===

impl Trend {
    /// No samples yet; time counts from now.
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            samples: Vec::new(),
        }
    }

    /// Adds what is measured now.
    pub fn push(&mut self, value: f64) {
        self.samples.push((self.began.elapsed().as_secs_f64(), value));
    }

    /// The first value and the last one.
    pub fn ends(&self) -> Option<(f64, f64)> {
        Some((self.samples.first()?.1, self.samples.last()?.1))
    }

    /// The last `share` of the samples.
    pub fn last(&self, share: f64) -> Self {
        let skipped = (self.samples.len() as f64 * (1.0 - share)) as usize;
        Self {
            began: self.began,
            samples: self.samples[skipped..].to_vec(),
        }
    }

    /// Time from the first sample to the last.
    pub fn length(&self) -> Duration {
        let ends = self.samples.first().zip(self.samples.last());
        Duration::from_secs_f64(ends.map_or(0.0, |(first, last)| last.0 - first.0))
    }

    /// Slope of the line with the least squares through the samples, per minute.
    pub fn per_minute(&self) -> f64 {
        let count = self.samples.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| self.samples.iter().map(of).sum::<f64>() / count;
        let (time, value) = (mean(|sample| sample.0), mean(|sample| sample.1));
        let deviations = self
            .samples
            .iter()
            .map(|sample| (sample.0 - time, sample.1 - value));
        let (products, squares) = deviations.fold((0.0, 0.0), |(products, squares), (time, value)| {
            (products + time * value, squares + time * time)
        });
        60.0 * products / squares
    }
}

impl Default for Trend {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes of memory that a process has in RAM (`VmRSS` of proc(5)).
pub fn resident_bytes(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))
        .with_context(|| format!("process {process} has ended"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"))
        .with_context(|| format!("process {process} has no VmRSS"))?;
    Ok(kib.trim().parse::<u64>()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_that_of_the_line_and_per_minute() {
        let samples = (0..10).map(|second| (f64::from(second), 5.0 + 3.0 * f64::from(second)));
        let trend = Trend {
            began: Instant::now(),
            samples: samples.collect(),
        };
        assert!((trend.per_minute() - 180.0).abs() < 1e-9);
        let half = trend.last(0.5);
        assert_eq!(half.ends(), Some((20.0, 32.0)));
        assert_eq!(half.length(), Duration::from_secs(4));
        assert!((half.per_minute() - 180.0).abs() < 1e-9);
    }
}
