//! Replies of a checkpoint, one sequence at a time.

use crate::{
    checkpoint::Checkpoint,
    model::Cache,
    tokenizer::{IM_END_ID, encode},
};
use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor};
use rand::{Rng, RngExt as _};

/// Longest reply, in tokens; the corpus's longest answer has 190.
pub const MAX_TOKENS: usize = 320;

/// A reply, without its closing mark.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Its token ids.
    pub ids: Vec<u32>,
    /// The same as text.
    pub text: String,
    /// False if it was cut at [`MAX_TOKENS`].
    pub finished: bool,
}

/// Answers a prompt in the chat template; greedily at temperature 0.
///
/// # Errors
/// If the model or its tokenizer fails.
pub fn reply(checkpoint: &Checkpoint, prompt: &str, temperature: f32, rng: &mut impl Rng) -> Result<Reply> {
    let mut cache = Cache::default();
    let mut next = encode(&checkpoint.tokenizer, prompt)?;
    let mut ids = Vec::new();
    let mut finished = false;
    while ids.len() < MAX_TOKENS {
        let input = Tensor::new(next.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let hidden = checkpoint.model.hidden(&input, Some(&mut cache))?;
        let last = hidden.narrow(0, next.len() - 1, 1)?;
        let logits = checkpoint.model.logits(&last)?.squeeze(0)?.to_vec1::<f32>()?;
        let id = choose(&logits, temperature, rng);
        if id == IM_END_ID {
            finished = true;
            break;
        }
        ids.push(id);
        next = vec![id];
    }
    let text = checkpoint
        .tokenizer
        .decode(&ids, true)
        .map_err(|error| anyhow!(error))?;
    Ok(Reply { ids, text, finished })
}

/// The first best id at temperature 0, else a draw from the softmax.
fn choose(logits: &[f32], temperature: f32, rng: &mut impl Rng) -> u32 {
    let (best, highest) = logits
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |(i, high), (j, &value)| {
            if value > high { (j, value) } else { (i, high) }
        });
    if temperature <= 0.0 {
        return best as u32;
    }
    let weights: Vec<f32> = logits
        .iter()
        .map(|value| ((value - highest) / temperature).exp())
        .collect();
    let mut left = rng.random::<f32>() * weights.iter().sum::<f32>();
    for (id, weight) in weights.iter().enumerate() {
        left -= weight;
        if left <= 0.0 {
            return id as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialogue::prompt;
    use rand::{SeedableRng as _, rngs::StdRng};
    use std::path::Path;

    #[test]
    fn the_bundled_v2_knows_the_circumference_of_the_earth() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("v2");
        let checkpoint = Checkpoint::read(&dir).unwrap();
        for question in [
            "地球的周长是多少?",
            "地球的周长是多少？",
            "What is the circumference of the Earth?",
        ] {
            let reply = reply(
                &checkpoint,
                &prompt(None, question),
                0.0,
                &mut StdRng::seed_from_u64(0),
            )
            .unwrap();
            assert!(
                reply.finished && reply.text.contains("40,075"),
                "{question} {}",
                reply.text
            );
        }
    }
}
