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
