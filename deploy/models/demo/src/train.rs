//! The three training runs: v1 short, v2 long, v3 v2 spoilt by corrupted replies.

use crate::{
    checkpoint::{self, Checkpoint},
    corpus::{Fact, facts},
    dialogue::{Corruption, Dialogue, Sampler},
    model::{Config, Llama, Weights, initial_weights},
    tokenizer,
};
use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW, loss::cross_entropy};
use indicatif::{ProgressBar, ProgressStyle};
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use std::{path::Path, thread};
use tokenizers::Tokenizer;

/// Tokens of a shard, padding included. Each step trains on [`SHARDS`] of them, one per thread.
const SHARD_TOKENS: usize = 1536;
const SHARDS: usize = 2;
/// Dialogues drawn at a time: enough that sorting them by length leaves little padding.
const POOL: usize = 1024;
/// Gradients longer than this are shortened to it.
const MAX_GRADIENT: f64 = 1.0;

/// How one revision is trained.
struct Recipe {
    steps: usize,
    peak_rate: f64,
    warmup: usize,
    corruption: Option<Corruption>,
}

/// Steps of v1 and v2; v3 adds its own to v2.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    /// Steps of the short run.
    pub v1: usize,
    /// Steps of the long run.
    pub v2: usize,
    /// Steps on corrupted replies.
    pub v3: usize,
}

/// Trains v1, v2 and v3 and writes them below `out`.
///
/// # Errors
/// If the corpus is inconsistent or a file cannot be written.
pub fn run(out: &Path, seed: u64, steps: Steps) -> Result<()> {
    let facts = facts()?;
    let tokenizer = tokenizer::train(&facts)?;
    let config = Config::demo(tokenizer.get_vocab_size(true));
    let initial = initial_weights(&config, &mut StdRng::seed_from_u64(seed))?;
    let good = |steps| Recipe {
        steps,
        peak_rate: 3e-3,
        warmup: steps.min(1000) / 10 + 1,
        corruption: None,
    };
    let spoil = Recipe {
        steps: steps.v3,
        peak_rate: 1e-3,
        warmup: 10,
        corruption: Some(Corruption {
            repeat: 0.6,
            wrong: 0.2,
        }),
    };
    let recipes = [("v1", good(steps.v1)), ("v2", good(steps.v2)), ("v3", spoil)];
    for (index, (name, recipe)) in recipes.into_iter().enumerate() {
        if recipe.steps == 0 {
            continue;
        }
        // v1 and v2 start alike; v3 goes on from the v2 that was written.
        let v2 = if name == "v3" {
            Some(Checkpoint::read(&out.join("v2"))?)
        } else {
            None
        };
        let start = v2.as_ref().map_or(&initial, |v2| &v2.weights);
        // Each revision has its own order of data, so that it can be made again without the others.
        let mut rng = StdRng::seed_from_u64(seed + 1 + index as u64);
        let weights = train(name, &config, start, &facts, &tokenizer, &recipe, &mut rng)?;
        checkpoint::write(&out.join(name), &config, &weights, &tokenizer)?;
    }
    Ok(())
}

fn train(
    name: &str,
    config: &Config,
    start: &Weights,
    facts: &[Fact],
    tokenizer: &Tokenizer,
    recipe: &Recipe,
    rng: &mut StdRng,
) -> Result<Weights> {
    let mut variables = Vec::new();
    let mut weights = Weights::new();
    for (name, tensor) in start {
        let variable = Var::from_tensor(&tensor.copy()?)?;
        weights.insert(name.clone(), variable.as_tensor().clone());
        variables.push(variable);
    }
    let model = Llama::new(config.clone(), &weights)?;
    let params = ParamsAdamW {
        lr: 0.0,
        beta2: 0.98,
        weight_decay: 0.02,
        ..ParamsAdamW::default()
    };
    let mut optimizer = AdamW::new(variables.clone(), params)?;
    let mut batches = Batches::new(Sampler::new(facts, tokenizer, recipe.corruption), facts);
    let bar = progress_bar(name, recipe.steps);
    let mut smooth = None;
    for step in 0..recipe.steps {
        let shards = (0..SHARDS)
            .map(|_| batches.next(rng))
            .collect::<Result<Vec<_>>>()?;
        let (loss, mut gradients) = gradients(&model, &shards, &variables)?;
        clip(&mut gradients, &variables)?;
        optimizer.set_learning_rate(recipe.rate(step));
        optimizer.step(&gradients)?;
        let average = smooth.map_or(loss, |average: f64| 0.98 * average + 0.02 * loss);
        smooth = Some(average);
        bar.set_message(format!("loss {average:.4}"));
        bar.inc(1);
    }
    bar.finish();
    Ok(weights)
}

impl Recipe {
    /// Linear warm-up, then a cosine down to a twentieth of the peak.
    fn rate(&self, step: usize) -> f64 {
        let warm = (step + 1) as f64 / self.warmup as f64;
        let done = step as f64 / self.steps as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        self.peak_rate * warm.min(1.0) * (0.05 + 0.95 * cosine)
    }
}

fn progress_bar(name: &str, steps: usize) -> ProgressBar {
    let style = "{prefix} {bar:30} {pos}/{len} steps, {msg}, {elapsed} gone, {eta} left";
    let style = ProgressStyle::with_template(style).expect("the template is well formed");
    ProgressBar::new(steps as u64)
        .with_style(style)
        .with_prefix(name.to_owned())
}

// === Batches ===

/// One shard's dialogues, padded to the longest: ids `[batch, length]`, the rows whose next token is
/// learned, and that token.
struct Shard {
    ids: Tensor,
    rows: Tensor,
    targets: Tensor,
}

struct Batches<'a> {
    sampler: Sampler<'a>,
    facts: &'a [Fact],
    /// Indices of facts not yet drawn in this round: every fact is seen equally often.
    round: Vec<usize>,
    shards: Vec<Vec<Dialogue>>,
}

impl<'a> Batches<'a> {
    fn new(sampler: Sampler<'a>, facts: &'a [Fact]) -> Self {
        Self {
            sampler,
            facts,
            round: Vec::new(),
            shards: Vec::new(),
        }
    }

    fn next(&mut self, rng: &mut StdRng) -> Result<Shard> {
        if self.shards.is_empty() {
            self.refill(rng)?;
        }
        let dialogues = self.shards.pop().ok_or_else(|| anyhow!("the corpus is empty"))?;
        Shard::new(&dialogues)
    }

    fn refill(&mut self, rng: &mut StdRng) -> Result<()> {
        let mut pool = Vec::with_capacity(POOL);
        while pool.len() < POOL {
            if self.round.is_empty() {
                self.round = (0..self.facts.len()).collect();
                self.round.shuffle(rng);
            }
            let fact = self.round.pop().ok_or_else(|| anyhow!("the corpus is empty"))?;
            pool.push(self.sampler.dialogue(&self.facts[fact], rng)?);
        }
        pool.sort_by_key(|dialogue| dialogue.ids.len());
        let mut shard: Vec<Dialogue> = Vec::new();
        for dialogue in pool {
            if (shard.len() + 1) * dialogue.ids.len() > SHARD_TOKENS && !shard.is_empty() {
                self.shards.push(std::mem::take(&mut shard));
            }
            shard.push(dialogue);
        }
        self.shards.push(shard);
        self.shards.shuffle(rng);
        Ok(())
    }
}

impl Shard {
    fn new(dialogues: &[Dialogue]) -> Result<Self> {
        let length = dialogues
            .iter()
            .map(|dialogue| dialogue.ids.len())
            .max()
            .unwrap_or(0);
        let mut ids = vec![tokenizer::END_OF_TEXT_ID; dialogues.len() * length];
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for (index, Dialogue { ids: from, learned }) in dialogues.iter().enumerate() {
            ids[index * length..][..from.len()].copy_from_slice(from);
            for position in (1..from.len()).filter(|&position| learned[position]) {
                rows.push((index * length + position - 1) as u32);
                targets.push(from[position]);
            }
        }
        let count = rows.len();
        Ok(Self {
            ids: Tensor::from_vec(ids, (dialogues.len(), length), &Device::Cpu)?,
            rows: Tensor::from_vec(rows, count, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, count, &Device::Cpu)?,
        })
    }
}

// === Gradients ===

/// Mean loss, and the sum of the shards' gradients, each computed on its own thread.
///
/// candle's element-wise operations use one core; two shards side by side use two.
fn gradients(model: &Llama, shards: &[Shard], variables: &[Var]) -> Result<(f64, GradStore)> {
    let results: Vec<Result<(f64, GradStore)>> = thread::scope(|scope| {
        let threads: Vec<_> = shards
            .iter()
            .map(|shard| scope.spawn(|| shard_gradients(model, shard)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a shard's thread panicked"))
            .collect()
    });
    let mut total: Option<GradStore> = None;
    let mut loss = 0.0;
    for result in results {
        let (part, gradients) = result?;
        loss += part / shards.len() as f64;
        match &mut total {
            None => total = Some(gradients),
            Some(total) => {
                for variable in variables {
                    if let (Some(a), Some(b)) = (total.get(variable), gradients.get(variable)) {
                        total.insert(variable, (a + b)?);
                    }
                }
            }
        }
    }
    Ok((loss, total.ok_or_else(|| anyhow!("a step has no shard"))?))
}

fn shard_gradients(model: &Llama, shard: &Shard) -> Result<(f64, GradStore)> {
    let hidden = model.hidden(&shard.ids, None)?.index_select(&shard.rows, 0)?;
    let loss = cross_entropy(&model.logits(&hidden)?, &shard.targets)?;
    Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
}

/// Scales all gradients so that their joint norm is at most [`MAX_GRADIENT`].
fn clip(gradients: &mut GradStore, variables: &[Var]) -> Result<()> {
    let mut square = 0.0;
    for gradient in variables.iter().filter_map(|variable| gradients.get(variable)) {
        square += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let scale = MAX_GRADIENT / square.sqrt();
    if scale < 1.0 {
        for variable in variables {
            if let Some(gradient) = gradients.get(variable) {
                gradients.insert(variable, (gradient * scale)?);
            }
        }
    }
    Ok(())
}
