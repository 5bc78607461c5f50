//! Charts of the last minutes.

use std::collections::VecDeque;

use penstock_analysis::Sketch;
use penstock_plan::Rollout;
use penstock_proto::v1;

use super::merge::read;

/// Points that are kept: ten minutes.
const POINTS: usize = 600;
/// Time between two points, in milliseconds.
const EVERY_MS: u64 = 1_000;

/// One model's points, and the sums at the last one.
#[derive(Debug, Default)]
pub(super) struct Charts {
    points: VecDeque<v1::ChartPoint>,
    /// Identity of the trial, and its sums when the last point was taken.
    last: Option<((String, u32, u32), [v1::RevisionStats; 2])>,
}

// === impl Charts ===

impl Charts {
    /// Takes a point, unless the last one is too new. Sums are those of the present trial: stable, then canary.
    pub(super) fn take(&mut self, rollout: &Rollout, sums: [v1::RevisionStats; 2], now_ms: u64) {
        if !self.due(now_ms) {
            return;
        }
        let trial = (rollout.uid.clone(), rollout.attempt, rollout.trial);
        let before = self
            .last
            .take()
            .filter(|(of, _)| *of == trial)
            .map(|(_, sums)| sums);
        let before = before.unwrap_or_default();
        let [stable, canary] = [0, 1].map(|side| grown(&before[side], &sums[side]));
        self.points.push_back(v1::ChartPoint {
            at_ms: now_ms,
            canary_ppm: rollout.share.get(),
            stable: Some(stable),
            canary: Some(canary),
        });
        while self.points.len() > POINTS {
            self.points.pop_front();
        }
        self.last = Some((trial, sums));
    }

    /// Whether it is time for another point.
    pub(super) fn due(&self, now_ms: u64) -> bool {
        self.points
            .back()
            .is_none_or(|point| now_ms >= point.at_ms + EVERY_MS)
    }

    pub(super) fn points(&self) -> Vec<v1::ChartPoint> {
        self.points.iter().copied().collect()
    }
}

/// What came between two sums.
fn grown(before: &v1::RevisionStats, now: &v1::RevisionStats) -> v1::ChartSide {
    let sketch = |wire: &Option<v1::Sketch>| wire.clone().map(read).unwrap_or_default();
    let since = |before: &Option<v1::Sketch>, now: &Option<v1::Sketch>| -> Sketch {
        sketch(now).since(&sketch(before))
    };
    let ttft = since(&before.ttft_s, &now.ttft_s);
    let total = since(&before.total_s, &now.total_s);
    v1::ChartSide {
        requests: now.requests.saturating_sub(before.requests),
        errors: now.errors.saturating_sub(before.errors),
        output_tokens: now.output_tokens.saturating_sub(before.output_tokens),
        ttft_p50: ttft.quantile(0.5),
        ttft_p99: ttft.quantile(0.99),
        total_p99: total.quantile(0.99),
    }
}
