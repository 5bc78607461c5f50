//! Sampling parameters.

/// How the next token is chosen from the logits. Defaults leave the distribution as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1].
    pub top_p: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens at least this share as likely as the likeliest, in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or reply; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens seen in the reply.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the reply.
    pub frequency_penalty: f32,
    /// Added to logits, as (id, bias in [-100, 100]).
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens before which nothing ends the reply but its grammar and its length.
    pub min_tokens: usize,
    /// Random numbers are hash(seed, token index).
    pub seed: u64,
}

/// A sampling parameter out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} must be {range}, not {value}")]
pub struct SamplingParamsError {
    /// Name of the parameter.
    pub field: &'static str,
    /// What it may be.
    pub range: &'static str,
    /// What it was.
    pub value: String,
}

// === impl SamplingParams ===

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Checks every range.
    ///
    /// # Errors
    /// The first parameter out of its range.
    pub fn validate(&self) -> Result<(), SamplingParamsError> {
        let check = |holds: bool, field, range, value: f32| match holds {
            true => Ok(()),
            false => Err(SamplingParamsError {
                field,
                range,
                value: value.to_string(),
            }),
        };
        let Self {
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ..
        } = *self;
        check(
            (0.0..=100.0).contains(&temperature),
            "temperature",
            "from 0 to 100",
            temperature,
        )?;
        check(
            top_p > 0.0 && top_p <= 1.0,
            "top_p",
            "above 0 and at most 1",
            top_p,
        )?;
        check((0.0..=1.0).contains(&min_p), "min_p", "from 0 to 1", min_p)?;
        check(
            repetition_penalty > 0.0 && repetition_penalty <= 10.0,
            "repetition_penalty",
            "above 0 and at most 10",
            repetition_penalty,
        )?;
        check(
            (-2.0..=2.0).contains(&presence_penalty),
            "presence_penalty",
            "from -2 to 2",
            presence_penalty,
        )?;
        check(
            (-2.0..=2.0).contains(&frequency_penalty),
            "frequency_penalty",
            "from -2 to 2",
            frequency_penalty,
        )?;
        self.logit_bias.iter().try_for_each(|&(_, bias)| {
            check(
                (-100.0..=100.0).contains(&bias),
                "logit_bias",
                "from -100 to 100",
                bias,
            )
        })
    }

    /// Whether logits depend on the tokens seen before.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_named_with_its_value() {
        let ok = SamplingParams::default();
        assert_eq!(ok.validate(), Ok(()));
        for (bad, field, value) in [
            (
                SamplingParams {
                    temperature: -1.0,
                    ..ok.clone()
                },
                "temperature",
                "-1",
            ),
            (
                SamplingParams {
                    temperature: f32::NAN,
                    ..ok.clone()
                },
                "temperature",
                "NaN",
            ),
            (
                SamplingParams {
                    top_p: 0.0,
                    ..ok.clone()
                },
                "top_p",
                "0",
            ),
            (
                SamplingParams {
                    min_p: 1.5,
                    ..ok.clone()
                },
                "min_p",
                "1.5",
            ),
            (
                SamplingParams {
                    repetition_penalty: 0.0,
                    ..ok.clone()
                },
                "repetition_penalty",
                "0",
            ),
            (
                SamplingParams {
                    presence_penalty: 3.0,
                    ..ok.clone()
                },
                "presence_penalty",
                "3",
            ),
            (
                SamplingParams {
                    frequency_penalty: f32::INFINITY,
                    ..ok.clone()
                },
                "frequency_penalty",
                "inf",
            ),
            (
                SamplingParams {
                    logit_bias: vec![(3, 1.0), (4, -101.0)],
                    ..ok.clone()
                },
                "logit_bias",
                "-101",
            ),
        ] {
            let error = bad.validate().unwrap_err();
            assert_eq!((error.field, error.value.as_str()), (field, value));
        }
    }
}
