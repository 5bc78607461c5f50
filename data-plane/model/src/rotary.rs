//! The table of rotary angles.

use crate::{ModelConfig, RopeScaling};

/// `[positions][cos of head_dim / 2, then sin of head_dim / 2]`.
pub(crate) fn angles(config: &ModelConfig, positions: usize) -> Vec<f32> {
    let frequencies = frequencies(config);
    let mut table = Vec::with_capacity(positions * config.head_dim);
    for position in 0..positions {
        // The product is rounded to f32 because that is what the models are trained with.
        let angle = |frequency: &f32| position as f32 * frequency;
        table.extend(frequencies.iter().map(|frequency| angle(frequency).cos()));
        table.extend(frequencies.iter().map(|frequency| angle(frequency).sin()));
    }
    table
}

/// Radians a position of each pair of a head: `theta^(-2i / head_dim)`, scaled as transformers does.
fn frequencies(config: &ModelConfig) -> Vec<f32> {
    let unscaled = |pair: usize| {
        let exponent = 2.0 * pair as f64 / config.head_dim as f64;
        f64::from(config.rope_theta).powf(-exponent) as f32
    };
    (0..config.head_dim / 2)
        .map(|pair| scale(unscaled(pair), config.rope_scaling))
        .collect()
}

fn scale(frequency: f32, scaling: Option<RopeScaling>) -> f32 {
    match scaling {
        None => frequency,
        Some(RopeScaling::Linear { factor }) => frequency / factor,
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        }) => {
            let wavelength = std::f32::consts::TAU / frequency;
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
    }
}
