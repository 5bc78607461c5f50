//! Plain twins of the kernels: the oracle of their tests. Sums are taken in f64, nothing is fast.

use half::bf16;

use crate::SampleRow;

/// Rows of `x` normalised: `x / sqrt(mean(x²) + eps) · weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let rows = x.chunks_exact(weight.len()).flat_map(|row| {
        let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / row.len() as f64;
        let scale = (mean + f64::from(eps)).sqrt().recip();
        row.iter()
            .zip(weight)
            .map(move |(&x, &weight)| (f64::from(x) * scale * f64::from(weight)) as f32)
    });
    rows.collect()
}

/// `silu(gate) · up` over rows of `[gate, up]`, each `width` long.
pub fn swiglu(gate_up: &[f32], width: usize) -> Vec<f32> {
    let rows = gate_up.chunks_exact(2 * width).flat_map(|row| {
        let (gate, up) = row.split_at(width);
        gate.iter().zip(up).map(|(&gate, &up)| {
            let gate = f64::from(gate);
            (gate / (1.0 + (-gate).exp()) * f64::from(up)) as f32
        })
    });
    rows.collect()
}

/// `x` (`[m, k]`) times the transpose of `weight` (`[n, k]`), plus `bias` (`[n]`).
pub fn linear(x: &[f32], weight: &[f32], k: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len() / k * (weight.len() / k));
    for x in x.chunks_exact(k) {
        for (column, weight) in weight.chunks_exact(k).enumerate() {
            let dot: f64 = x
                .iter()
                .zip(weight)
                .map(|(&x, &w)| f64::from(x) * f64::from(w))
                .sum();
            y.push((dot + f64::from(bias.map_or(0.0, |bias| bias[column]))) as f32);
        }
    }
    y
}

/// Rounds rows of `k` to 127 steps on either side of zero, the largest magnitude of a row being the last, and back.
pub fn round_int8(values: &[f32], k: usize) -> Vec<f32> {
    let round = |row: &[f32]| {
        let largest = row
            .iter()
            .fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let steps = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let back = move |value: &f32| (value * steps).round_ties_even() * (largest / 127.0);
        row.iter().map(back).collect::<Vec<_>>()
    };
    values.chunks_exact(k).flat_map(round).collect()
}

/// Softmax attention of one query over `keys` and `values` (`[positions][head_dim]`).
pub fn attend(query: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], scale: f32) -> Vec<f32> {
    let dot = |key: &Vec<f32>| {
        query
            .iter()
            .zip(key)
            .map(|(&q, &k)| f64::from(q) * f64::from(k))
            .sum::<f64>()
    };
    let scores: Vec<f64> = keys.iter().map(|key| dot(key) * f64::from(scale)).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = powers.iter().sum();
    let mixed = |dim: usize| {
        let sum: f64 = powers
            .iter()
            .zip(values)
            .map(|(power, value)| power * f64::from(value[dim]))
            .sum();
        (sum / total) as f32
    };
    (0..query.len()).map(mixed).collect()
}

/// Rotates a head by the half-split rotary embedding: element `i` pairs with `i + head_dim / 2`.
pub fn rotate(head: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let (first, second) = head.split_at(head.len() / 2);
    let low = first
        .iter()
        .zip(second)
        .zip(cos.iter().zip(sin))
        .map(|((&a, &b), (&cos, &sin))| a * cos - b * sin);
    let high = first
        .iter()
        .zip(second)
        .zip(cos.iter().zip(sin))
        .map(|((&a, &b), (&cos, &sin))| b * cos + a * sin);
    low.chain(high).collect()
}

/// The token of a row and its log-probability; `None` where the logits are not numbers. `logits` change as the row's
/// penalties, bias, grammar and stops say.
pub fn sample(logits: &mut [f32], row: &SampleRow<'_>) -> Option<(u32, f32)> {
    edit(logits, row);
    let sound = argmax(logits)?;
    let kept = logits.to_vec();
    for &stop in row.stops {
        if let Some(logit) = logits.get_mut(stop as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    let best = argmax(logits).unwrap_or_else(|| {
        logits.copy_from_slice(&kept);
        sound
    });
    let max = logits[best];
    let id = match row.temperature > 0.0 {
        true => draw(logits, max, row),
        false => best,
    };
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    Some((id as u32, logits[id] - max - sum.ln() as f32))
}

fn edit(logits: &mut [f32], row: &SampleRow<'_>) {
    let [repetition, presence, frequency] = row.penalties;
    for &(id, count) in row.seen {
        let logit = &mut logits[id as usize];
        *logit = if *logit > 0.0 {
            *logit / repetition
        } else {
            *logit * repetition
        };
        if count > 0 {
            *logit -= presence + frequency * count as f32;
        }
    }
    for &(id, bias) in row.bias {
        logits[id as usize] += bias;
    }
    if let Some(mask) = row.mask {
        for (id, logit) in logits.iter_mut().enumerate() {
            if mask[id / 32] >> (id % 32) & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

fn argmax(logits: &[f32]) -> Option<usize> {
    let best = (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best })?;
    let sound = logits.iter().all(|logit| !logit.is_nan()) && logits[best].is_finite();
    sound.then_some(best)
}

fn draw(logits: &[f32], max: f32, row: &SampleRow<'_>) -> usize {
    let floor = if row.min_p > 0.0 { row.min_p.ln() } else { -104.0 };
    let mut candidates: Vec<usize> = (0..logits.len())
        .filter(|&id| logits[id] >= max + floor * row.temperature)
        .collect();
    let likelier_first = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    candidates.sort_by(likelier_first);
    if row.top_k > 0 {
        candidates.truncate(row.top_k);
    }
    let weight = |id: usize| f64::from(((logits[id] - max) / row.temperature).exp());
    let total = |candidates: &[usize]| candidates.iter().map(|&id| weight(id)).sum::<f64>();
    if row.top_p < 1.0 {
        let (mass, mut sum) = (f64::from(row.top_p) * total(&candidates), 0.0);
        let last = candidates.iter().position(|&id| {
            sum += weight(id);
            sum >= mass
        });
        candidates.truncate(last.map_or(candidates.len(), |last| last + 1));
    } else {
        candidates.sort_unstable();
    }
    let (target, mut sum) = (row.uniform * total(&candidates), 0.0);
    let drawn = candidates.iter().copied().find(|&id| {
        sum += weight(id);
        sum > target
    });
    drawn.unwrap_or(candidates[candidates.len() - 1])
}

/// Rounds to bf16 and back.
pub fn round_bf16(values: &[f32]) -> Vec<f32> {
    values
        .iter()
        .map(|&value| bf16::from_f32(value).to_f32())
        .collect()
}

/// `len` numbers between -1 and 1 that depend on `seed` alone (SplitMix64).
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Asserts that all elements agree to `tolerance`, relative to the expected one or to 1, whichever is larger.
///
/// # Panics
/// They do not.
pub fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(close, "element {at}: {found} instead of {expected}");
    }
}
