//! The table of rotary angles.

use std::f32::consts::TAU;

use crate::{ModelConfig, RopeScaling};

/// `[positions][cos of head_dim / 2, then sin of head_dim / 2]`. `factors` divide each frequency further.
pub(crate) fn angles(config: &ModelConfig, positions: usize, factors: Option<&[f32]>) -> Vec<f32> {
    let mut fixed = frequencies(config, f64::from(config.rope_theta));
    for (frequency, factor) in fixed.iter_mut().zip(factors.unwrap_or(&[])) {
        *frequency /= factor;
    }
    let length = match config.rope_scaling {
        Some(RopeScaling::Yarn { attention_factor, .. }) => attention_factor,
        _ => 1.0,
    };
    let mut table = Vec::with_capacity(positions * config.head_dim);
    for position in 0..positions {
        let grown = grown_base(config, position).map(|base| frequencies(config, base));
        let frequencies = grown.as_deref().unwrap_or(&fixed);
        // The product is rounded to f32 because that is what the models are trained with.
        let angle = |frequency: &f32| position as f32 * frequency;
        table.extend(
            frequencies
                .iter()
                .map(|frequency| length * angle(frequency).cos()),
        );
        table.extend(
            frequencies
                .iter()
                .map(|frequency| length * angle(frequency).sin()),
        );
    }
    table
}

/// The base for a position beyond the original context, where it grows.
fn grown_base(config: &ModelConfig, position: usize) -> Option<f64> {
    let Some(RopeScaling::Dynamic {
        factor,
        original_context,
    }) = config.rope_scaling
    else {
        return None;
    };
    let (factor, len) = (f64::from(factor), position + 1);
    (len > original_context).then(|| {
        let ratio = factor * len as f64 / original_context as f64 - (factor - 1.0);
        let width = config.head_dim as f64;
        f64::from(config.rope_theta) * ratio.powf(width / (width - 2.0))
    })
}

/// Radians a position of each pair of a head: `base^(-2i / head_dim)`, scaled as transformers does.
pub(crate) fn frequencies(config: &ModelConfig, base: f64) -> Vec<f32> {
    let unscaled = |pair: usize| {
        let exponent = 2.0 * pair as f64 / config.head_dim as f64;
        base.powf(-exponent) as f32
    };
    (0..config.head_dim / 2)
        .map(|pair| scale(config, pair, unscaled(pair)))
        .collect()
}

fn scale(config: &ModelConfig, pair: usize, frequency: f32) -> f32 {
    match config.rope_scaling {
        None | Some(RopeScaling::Dynamic { .. }) => frequency,
        Some(RopeScaling::Linear { factor }) => frequency / factor,
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        }) => {
            let wavelength = TAU / frequency;
            let turns = original_context as f32 / wavelength;
            if turns < low_freq_factor {
                frequency / factor
            } else if turns > high_freq_factor {
                frequency
            } else {
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
        Some(RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            original_context,
            ..
        }) => {
            let ends = [beta_fast, beta_slow].map(|turns| pair_that_turns(config, original_context, turns));
            let stretched = ramp(ends, truncate, config.head_dim, pair);
            frequency / factor * stretched + frequency * (1.0 - stretched)
        }
    }
}

/// The pair, in general not a whole one, that turns so often in `context` positions.
fn pair_that_turns(config: &ModelConfig, context: usize, turns: f32) -> f32 {
    let positions_a_radian = context as f32 / (turns * TAU);
    config.head_dim as f32 * positions_a_radian.ln() / (2.0 * config.rope_theta.ln())
}

/// How far `pair` has come from the first end to the second, from 0 to 1.
fn ramp([first, last]: [f32; 2], truncate: bool, head_dim: usize, pair: usize) -> f32 {
    let (first, last) = if truncate {
        (first.floor(), last.ceil())
    } else {
        (first, last)
    };
    let (first, last) = (first.max(0.0), last.min(head_dim as f32 - 1.0));
    // As in transformers, lest it be divided by 0.
    let last = if first == last { last + 0.001 } else { last };
    ((pair as f32 - first) / (last - first)).clamp(0.0, 1.0)
}
