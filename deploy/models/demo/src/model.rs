//! The Llama decoder in plain candle operations, so that candle can differentiate it.
//!
//! The numerics are those of transformers' `LlamaForCausalLM`: rotate-half RoPE, RMSNorm in f32 with
//! `rms_norm_eps` under the root, SwiGLU, grouped-query attention, embeddings tied with the head.

use anyhow::{Context as _, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{
    ops::{silu, softmax},
    rotary_emb::rope_slow,
};
use rand::{Rng, RngExt as _};
use std::collections::BTreeMap;

/// The sizes, named as in config.json.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, each shared by several query heads.
    pub num_key_value_heads: usize,
    /// Longest context, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
}

impl Config {
    /// The demo model's sizes for a vocabulary.
    pub fn demo(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            hidden_size: 128,
            intermediate_size: 384,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 1024,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
        }
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Names and shapes of all tensors; a linear's shape is `[out, in]`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        let kv = self.num_key_value_heads * self.head_dim();
        let mut tensors = vec![
            (
                "model.embed_tokens.weight".to_owned(),
                vec![self.vocab_size, hidden],
            ),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        for layer in 0..self.num_hidden_layers {
            let parts = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![mlp, hidden]),
                ("mlp.up_proj", vec![mlp, hidden]),
                ("mlp.down_proj", vec![hidden, mlp]),
            ];
            tensors.extend(
                parts
                    .into_iter()
                    .map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
            );
        }
        tensors
    }
}

/// Tensors by the names of Hugging Face's Llama.
pub type Weights = BTreeMap<String, Tensor>;

/// Random initial weights in f32: normal for matrices, scaled by fan-in, and one for norms.
///
/// # Errors
/// Only out of memory.
pub fn initial_weights(config: &Config, rng: &mut impl Rng) -> Result<Weights> {
    let depth = (2.0 * config.num_hidden_layers as f64).sqrt();
    let mut weights = Weights::new();
    for (name, shape) in config.tensors() {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = match shape.as_slice() {
            [_] => vec![1.0; count],
            [_, fan_in] => {
                let scale = (*fan_in as f64).sqrt().recip();
                let residual = name.contains("o_proj") || name.contains("down_proj");
                let scale = if residual { scale / depth } else { scale };
                (0..count).map(|_| (normal(rng) * scale) as f32).collect()
            }
            _ => unreachable!("the model has vectors and matrices only"),
        };
        weights.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    Ok(weights)
}

/// Standard normal by Box and Muller.
fn normal(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// The decoder over a set of weights; cheap to clone, since tensors are shared.
#[derive(Debug, Clone)]
pub struct Llama {
    config: Config,
    embedding: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    cos: Tensor,
    sin: Tensor,
}

#[derive(Debug, Clone)]
struct Layer {
    attention_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    mlp_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// Keys and values of earlier positions, per layer `[batch, kv heads, positions, head dim]`.
#[derive(Debug, Default)]
pub struct Cache(Vec<(Tensor, Tensor)>);

impl Cache {
    fn len(&self) -> Result<usize> {
        Ok(self.0.first().map_or(Ok(0), |(keys, _)| keys.dim(2))?)
    }
}

impl Llama {
    /// A decoder over `weights`, which stay shared: training changes them in place.
    ///
    /// # Errors
    /// Names the tensor that is missing.
    pub fn new(config: Config, weights: &Weights) -> Result<Self> {
        let get = |name: &str| {
            weights
                .get(name)
                .cloned()
                .with_context(|| format!("the tensor {name} is missing"))
        };
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let get = |name: &str| get(&format!("model.layers.{layer}.{name}.weight"));
            layers.push(Layer {
                attention_norm: get("input_layernorm")?,
                q: get("self_attn.q_proj")?,
                k: get("self_attn.k_proj")?,
                v: get("self_attn.v_proj")?,
                o: get("self_attn.o_proj")?,
                mlp_norm: get("post_attention_layernorm")?,
                gate: get("mlp.gate_proj")?,
                up: get("mlp.up_proj")?,
                down: get("mlp.down_proj")?,
            });
        }
        let (cos, sin) = rotary_tables(&config)?;
        Ok(Self {
            embedding: get("model.embed_tokens.weight")?,
            norm: get("model.norm.weight")?,
            layers,
            cos,
            sin,
            config,
        })
    }

    /// Hidden states `[batch * length, hidden]` for ids `[batch, length]` at the positions after `cache`.
    ///
    /// # Errors
    /// If the positions go past `max_position_embeddings`.
    pub fn hidden(&self, ids: &Tensor, mut cache: Option<&mut Cache>) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let start = cache.as_deref().map_or(Ok(0), Cache::len)?;
        let rope = (
            self.cos.narrow(0, start, length)?,
            self.sin.narrow(0, start, length)?,
        );
        let mut x = self.embedding.index_select(&ids.flatten_all()?, 0)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = self.rms_norm(&x, &layer.attention_norm)?;
            let attended = self.attention(
                layer,
                index,
                &normed,
                (batch, length),
                &rope,
                cache.as_deref_mut(),
            )?;
            x = (x + attended)?;
            let normed = self.rms_norm(&x, &layer.mlp_norm)?;
            let gated = (silu(&linear(&normed, &layer.gate)?)? * linear(&normed, &layer.up)?)?;
            x = (x + linear(&gated, &layer.down)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// Logits `[rows, vocabulary]` of hidden states `[rows, hidden]`.
    ///
    /// # Errors
    /// If the width is not the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, &self.embedding)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let root = (x.sqr()?.mean_keepdim(D::Minus1)? + self.config.rms_norm_eps)?.sqrt()?;
        Ok(x.broadcast_div(&root)?.broadcast_mul(weight)?)
    }

    fn attention(
        &self,
        layer: &Layer,
        index: usize,
        x: &Tensor,
        (batch, length): (usize, usize),
        (cos, sin): &(Tensor, Tensor),
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let Config {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            ..
        } = self.config;
        let width = self.config.head_dim();
        let split = |x: Tensor, heads: usize| -> Result<Tensor> {
            Ok(x.reshape((batch, length, heads, width))?
                .transpose(1, 2)?
                .contiguous()?)
        };
        let q = rope_slow(&split(linear(x, &layer.q)?, heads)?, cos, sin)?;
        let mut k = rope_slow(&split(linear(x, &layer.k)?, kv_heads)?, cos, sin)?;
        let mut v = split(linear(x, &layer.v)?, kv_heads)?;
        if let Some(Cache(layers)) = cache {
            if let Some((keys, values)) = layers.get(index) {
                k = Tensor::cat(&[keys, &k], 2)?;
                v = Tensor::cat(&[values, &v], 2)?;
                layers[index] = (k.clone(), v.clone());
            } else {
                layers.push((k.clone(), v.clone()));
            }
        }
        // Query heads that share a key head are stacked along the positions: no key is copied.
        let group = heads / kv_heads;
        let context = k.dim(2)?;
        let q = (q.reshape((batch, kv_heads, group * length, width))? * (width as f64).sqrt().recip())?;
        let scores = q.matmul(&k.t()?)?.reshape((batch * heads, length, context))?;
        let scores = scores.broadcast_add(&causal_mask(length, context)?)?;
        let shares = softmax(&scores, D::Minus1)?.reshape((batch, kv_heads, group * length, context))?;
        let mixed = shares.matmul(&v)?.reshape((batch, heads, length, width))?;
        linear(
            &mixed.transpose(1, 2)?.reshape((batch * length, heads * width))?,
            &layer.o,
        )
    }
}

fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(x.matmul(&weight.t()?)?)
}

/// Zero where a query may look, minus infinity at later positions: `[length, context]`.
fn causal_mask(length: usize, context: usize) -> Result<Tensor> {
    let past = context - length;
    let values: Vec<f32> = (0..length * context)
        .map(|i| {
            if i % context > past + i / context {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    Ok(Tensor::from_vec(values, (length, context), &Device::Cpu)?)
}

/// Cosines and sines `[positions, head dim / 2]` of the rotary angles.
fn rotary_tables(config: &Config) -> Result<(Tensor, Tensor)> {
    let half = config.head_dim() / 2;
    let inverse: Vec<f32> = (0..half)
        .map(|i| 1.0 / (config.rope_theta as f32).powf(2.0 * i as f32 / config.head_dim() as f32))
        .collect();
    let inverse = Tensor::from_vec(inverse, (1, half), &Device::Cpu)?;
    let positions = Tensor::arange(0u32, config.max_position_embeddings as u32, &Device::Cpu)?;
    let angles = positions.to_dtype(DType::F32)?.unsqueeze(1)?.matmul(&inverse)?;
    Ok((angles.cos()?, angles.sin()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    #[test]
    fn decoding_token_by_token_equals_one_pass() {
        let config = Config {
            vocab_size: 50,
            hidden_size: 32,
            intermediate_size: 48,
            ..Config::demo(50)
        };
        let weights = initial_weights(&config, &mut StdRng::seed_from_u64(7)).unwrap();
        let model = Llama::new(config, &weights).unwrap();
        let ids = [3u32, 1, 4, 1, 5, 9, 2, 6];
        let whole = model
            .hidden(&Tensor::new(&[ids], &Device::Cpu).unwrap(), None)
            .unwrap();
        let mut cache = Cache::default();
        for (i, id) in ids.iter().enumerate() {
            let one = Tensor::new(&[[*id]], &Device::Cpu).unwrap();
            let step = model.hidden(&one, Some(&mut cache)).unwrap();
            let gap = (step - whole.narrow(0, i, 1).unwrap())
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap();
            assert!(gap.to_scalar::<f32>().unwrap() < 1e-4);
        }
    }
}
