//! The base of the rotary frequencies and how they are stretched.

use super::{Fields, LoadError, MAX_CONTEXT};

/// How rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// Unchanged up to `original_context`; beyond, the base grows with the position. In transformers it grows with
    /// the sequence; taking each position for the length, as transformers does when it generates token by token,
    /// is what leaves the keys of a prefix valid.
    Dynamic {
        /// At least 1.
        factor: f32,
        /// Context that the model was first trained with.
        original_context: usize,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, those between interpolated.
    Llama3 {
        /// At least 1.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are stretched in full.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context that the model was first trained with.
        original_context: usize,
    },
    /// YaRN (arXiv 2309.00071): as Llama 3, with a ramp over the pairs of a head, and sharper attention.
    Yarn {
        /// At least 1.
        factor: f32,
        /// Factor of rotated queries and keys.
        attention_factor: f32,
        /// Pairs that turn more often than this in the original context are kept.
        beta_fast: f32,
        /// Pairs that turn less often than this in the original context are stretched in full.
        beta_slow: f32,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
        /// Context that the model was first trained with.
        original_context: usize,
    },
}

/// What a configuration says about positions.
pub(super) struct Rope {
    pub(super) theta: f32,
    pub(super) scaling: Option<RopeScaling>,
    /// Longest sequence.
    pub(super) context: usize,
}

// === impl Rope ===

impl Rope {
    /// From `rope_theta` and `rope_scaling`, or from `rope_parameters` as transformers 5 writes them.
    pub(super) fn parse(fields: &Fields<'_>) -> Result<Self, LoadError> {
        const DEFAULT_THETA: f32 = 10_000.0;
        let context = fields.size("max_position_embeddings", MAX_CONTEXT)?;
        check_whole(fields)?;
        let theta = fields.positive("rope_theta")?;
        for name in ["rope_parameters", "rope_scaling"] {
            if let Some(nested) = fields.object(name)? {
                check_whole(&nested)?;
                let theta = nested.positive("rope_theta")?.or(theta).unwrap_or(DEFAULT_THETA);
                let scaling = scaling(&nested, theta, context)?;
                return Ok(Self {
                    theta,
                    scaling,
                    context: stretched(context, scaling),
                });
            }
        }
        Ok(Self {
            theta: theta.unwrap_or(DEFAULT_THETA),
            scaling: None,
            context,
        })
    }
}

/// Refuses heads of which only a part is rotated.
fn check_whole(fields: &Fields<'_>) -> Result<(), LoadError> {
    let field = "partial_rotary_factor";
    match fields.positive(field)? {
        Some(part) if part != 1.0 => Err(fields.error(field, format!("is {part}; only 1 is supported"))),
        _ => Ok(()),
    }
}

/// The longest sequence that the frequencies are stretched to, at least `context`.
fn stretched(context: usize, scaling: Option<RopeScaling>) -> usize {
    match scaling {
        Some(
            RopeScaling::Dynamic {
                factor,
                original_context,
            }
            | RopeScaling::Yarn {
                factor,
                original_context,
                ..
            },
        ) => {
            let longest = (f64::from(factor) * original_context as f64) as usize;
            longest.min(MAX_CONTEXT).max(context)
        }
        _ => context,
    }
}

fn scaling(fields: &Fields<'_>, theta: f32, context: usize) -> Result<Option<RopeScaling>, LoadError> {
    let kind = fields.raw("rope_type").or_else(|| fields.raw("type"));
    let Some(kind) = kind else { return Ok(None) };
    match kind.as_str().unwrap_or("not a string") {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear {
            factor: factor(fields)?,
        })),
        "dynamic" => Ok(Some(RopeScaling::Dynamic {
            factor: factor(fields)?,
            original_context: context,
        })),
        "llama3" => llama3(fields).map(Some),
        "yarn" => yarn(fields, theta, context).map(Some),
        kind => Err(fields.error(
            "rope_type",
            format!("is {kind}; supported are default, linear, dynamic, llama3 and yarn"),
        )),
    }
}

fn factor(fields: &Fields<'_>) -> Result<f32, LoadError> {
    let factor = fields.required_positive("factor")?;
    if factor < 1.0 {
        return Err(fields.error("factor", format!("is {factor}; it must be at least 1")));
    }
    Ok(factor)
}

fn llama3(fields: &Fields<'_>) -> Result<RopeScaling, LoadError> {
    let low_freq_factor = fields.required_positive("low_freq_factor")?;
    let high_freq_factor = fields.required_positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let problem = format!("is {high_freq_factor}; it must exceed low_freq_factor ({low_freq_factor})");
        return Err(fields.error("high_freq_factor", problem));
    }
    Ok(RopeScaling::Llama3 {
        factor: factor(fields)?,
        low_freq_factor,
        high_freq_factor,
        original_context: fields.size("original_max_position_embeddings", MAX_CONTEXT)?,
    })
}

fn yarn(fields: &Fields<'_>, theta: f32, context: usize) -> Result<RopeScaling, LoadError> {
    if theta <= 1.0 {
        return Err(fields.error("rope_theta", format!("is {theta}; yarn needs it above 1")));
    }
    let factor = factor(fields)?;
    let beta_fast = fields.positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = fields.positive("beta_slow")?.unwrap_or(1.0);
    if beta_fast <= beta_slow {
        let problem = format!("is {beta_fast}; it must exceed beta_slow ({beta_slow})");
        return Err(fields.error("beta_fast", problem));
    }
    let sharpness = |scale: f32| 0.1 * scale * factor.ln() + 1.0;
    let attention_factor = match fields.positive("attention_factor")? {
        Some(attention_factor) => attention_factor,
        None => match (fields.positive("mscale")?, fields.positive("mscale_all_dim")?) {
            (Some(scale), Some(all)) => sharpness(scale) / sharpness(all),
            _ => sharpness(1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor,
        beta_fast,
        beta_slow,
        truncate: fields.flag("truncate")?.unwrap_or(true),
        original_context: fields
            .optional_size("original_max_position_embeddings", MAX_CONTEXT)?
            .unwrap_or(context),
    })
}
