//! From a checkpoint's tensors to a packed decoder.

use std::{ops::Range, sync::Arc};

use candle_core::{DType, Device, Tensor};
use penstock_kernels::{Collective, Cpu, Element};

use super::{Decoder, Layer, qkv_shape};
use crate::{
    Dtype, LoadProgress, ModelConfig,
    checkpoint::Checkpoint,
    parallel::{ColumnParallel, Loaded, Part, RowParallel, Shard},
    rotary,
};

/// Reads a checkpoint, tensor by tensor.
struct Loader<'a> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
    cpu: Cpu,
    element: Element,
    shard: Shard,
    loaded_bytes: u64,
    progress: &'a dyn Fn(LoadProgress),
}

/// Part of a matrix: which rows, and which of how many columns.
struct Cut {
    outputs: Range<usize>,
    inputs: Range<usize>,
    shape: [usize; 2],
}

/// Loads the part of the decoder that is the rank's of `ranks`, with rotary angles for `positions` positions.
pub(crate) fn load(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    dtype: Dtype,
    positions: usize,
    ranks: Arc<dyn Collective>,
    progress: &dyn Fn(LoadProgress),
) -> Loaded<Decoder> {
    let shard = Shard {
        rank: ranks.rank(),
        size: ranks.size(),
    };
    let element = match dtype {
        Dtype::F32 => Element::F32,
        Dtype::Bf16 => Element::Bf16,
        Dtype::Int8 => Element::Int8,
    };
    let mut loader = Loader {
        config,
        checkpoint,
        cpu: Cpu::detect(),
        element,
        shard,
        loaded_bytes: checkpoint.total_bytes() * shard.rank as u64 / shard.size as u64,
        progress,
    };
    let layers = (0..config.num_layers)
        .map(|index| loader.layer(index))
        .collect::<Result<_, _>>()?;
    let norm = loader.vector("model.norm.weight", config.hidden_size)?;
    let table = "model.embed_tokens.weight";
    let output = if config.tie_word_embeddings {
        table
    } else {
        "lm_head.weight"
    };
    let vocabulary = shard.of(config.vocab_size);
    let shape = [config.vocab_size, config.hidden_size];
    let output = loader.part(output, None, Cut::rows(shape, vocabulary.clone()))?;
    let output = loader.columns(config.hidden_size, vec![output]);
    let embedding = if config.tie_word_embeddings {
        Tensor::zeros(1, DType::F32, &Device::Cpu)?
    } else {
        loader.embedding(table)?
    };
    loader.report(checkpoint.total_bytes() * (shard.rank as u64 + 1) / shard.size as u64);
    let factors = checkpoint.rope_factors(config.head_dim / 2)?;
    let angles = rotary::angles(config, positions, factors.as_deref());
    let intermediate_size = shard.of(config.intermediate_size).len();
    Ok(Decoder {
        cpu: loader.cpu,
        ranks,
        vocabulary,
        embedding,
        tied: config.tie_word_embeddings,
        layers,
        norm,
        output,
        angles: Tensor::from_vec(angles, (positions, config.head_dim), &Device::Cpu)?,
        hidden_size: config.hidden_size,
        intermediate_size,
        shape: qkv_shape(config, shard),
        eps: config.rms_norm_eps,
    })
}

// === impl Loader ===

impl<'a> Loader<'a> {
    fn layer(&mut self, index: usize) -> Loaded<Layer> {
        let config = self.config;
        let name = |rest: &str| format!("model.layers.{index}.{rest}");
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let width = |heads: Range<usize>| heads.start * config.head_dim..heads.end * config.head_dim;
        let (all_q, all_kv) = (width(0..config.num_heads).end, width(0..config.num_kv_heads).end);
        let q = width(self.shard.heads(config));
        let kv = width(self.shard.kv_heads(config));
        let neurons = self.shard.of(inner);
        let projection = |part: &str, cut: Cut, bias: bool| {
            let bias = bias.then(|| name(&format!("{part}.bias")));
            self.part(&name(&format!("{part}.weight")), bias.as_deref(), cut)
        };
        // What is summed over the ranks gets its bias once.
        let is_first = self.shard.rank == 0;
        let qkv = vec![
            projection(
                "self_attn.q_proj",
                Cut::rows([all_q, hidden], q.clone()),
                config.qkv_bias,
            )?,
            projection(
                "self_attn.k_proj",
                Cut::rows([all_kv, hidden], kv.clone()),
                config.qkv_bias,
            )?,
            projection(
                "self_attn.v_proj",
                Cut::rows([all_kv, hidden], kv),
                config.qkv_bias,
            )?,
        ];
        let attention_output = projection(
            "self_attn.o_proj",
            Cut::columns([hidden, all_q], q.clone()),
            config.output_bias && is_first,
        )?;
        let gate_up = [
            projection(
                "mlp.gate_proj",
                Cut::rows([inner, hidden], neurons.clone()),
                config.mlp_bias,
            )?,
            projection(
                "mlp.up_proj",
                Cut::rows([inner, hidden], neurons.clone()),
                config.mlp_bias,
            )?,
        ];
        let down = projection(
            "mlp.down_proj",
            Cut::columns([hidden, inner], neurons.clone()),
            config.mlp_bias && is_first,
        )?;
        let head_norms = if config.qk_norm {
            Some(self.head_norms(&name("self_attn"))?)
        } else {
            None
        };
        Ok(Layer {
            attention_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            qkv: self.columns(hidden, qkv),
            window: config.attention_windows[index],
            head_norms,
            attention_output: self.rows(q.len(), attention_output),
            mlp_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.gated(hidden, gate_up),
            down: self.rows(neurons.len(), down),
        })
    }

    /// A matrix and perhaps its bias, checked but not yet read.
    fn part(&self, weight: &str, bias: Option<&str>, cut: Cut) -> Loaded<Part<'a>> {
        let bias = bias
            .map(|name| self.checkpoint.tensor(name, &cut.shape[..1]))
            .transpose()?;
        Ok(Part {
            stride: cut.shape[1],
            weight: self.checkpoint.tensor(weight, &cut.shape)?,
            bias,
            outputs: cut.outputs,
            inputs: cut.inputs,
        })
    }

    fn columns(&mut self, inputs: usize, parts: Vec<Part<'a>>) -> ColumnParallel {
        let packed = ColumnParallel::pack(self.cpu, self.element, inputs, &parts);
        self.loaded(parts.iter().map(Part::bytes).sum());
        packed
    }

    fn gated(&mut self, inputs: usize, parts: [Part<'a>; 2]) -> ColumnParallel {
        let packed = ColumnParallel::pack_gated(self.cpu, self.element, inputs, &parts);
        self.loaded(parts.iter().map(Part::bytes).sum());
        packed
    }

    fn rows(&mut self, inputs: usize, part: Part<'a>) -> RowParallel {
        let bytes = part.bytes();
        let packed = RowParallel::pack(self.cpu, self.element, inputs, part);
        self.loaded(bytes);
        packed
    }

    fn vector(&mut self, name: &str, len: usize) -> Loaded<Tensor> {
        let weights = self.checkpoint.tensor(name, &[len])?;
        let tensor = Tensor::from_vec(weights.to_vec(len), len, &Device::Cpu)?;
        self.loaded(weights.bytes());
        Ok(tensor)
    }

    /// Norms of the heads of q and of k.
    fn head_norms(&mut self, attention: &str) -> Loaded<Tensor> {
        let q = self.vector(&format!("{attention}.q_norm.weight"), self.config.head_dim)?;
        let k = self.vector(&format!("{attention}.k_norm.weight"), self.config.head_dim)?;
        Ok(Tensor::stack(&[q, k], 0)?)
    }

    /// The rank's part of the embedding as a table of rows.
    fn embedding(&mut self, name: &str) -> Loaded<Tensor> {
        let hidden = self.config.hidden_size;
        let rows = self.shard.of(self.config.vocab_size);
        let weights = self.checkpoint.tensor(name, &[self.config.vocab_size, hidden])?;
        let table = weights.range(rows.start * hidden..rows.end * hidden);
        let shape = (rows.len(), hidden);
        let table = match self.element {
            Element::F32 => Tensor::from_vec(table, shape, &Device::Cpu)?,
            // A table is only read: rounding it to bytes would save no time.
            Element::Bf16 | Element::Int8 => {
                let table: Vec<half::bf16> = table.into_iter().map(half::bf16::from_f32).collect();
                Tensor::from_vec(table, shape, &Device::Cpu)?
            }
        };
        self.loaded(weights.bytes() / self.shard.size as u64);
        Ok(table)
    }

    fn loaded(&mut self, bytes: u64) {
        self.report(self.loaded_bytes + bytes);
    }

    fn report(&mut self, loaded_bytes: u64) {
        let total_bytes = self.checkpoint.total_bytes();
        self.loaded_bytes = loaded_bytes.min(total_bytes);
        (self.progress)(LoadProgress {
            loaded_bytes: self.loaded_bytes,
            total_bytes,
        });
    }
}

// === impl Cut ===

impl Cut {
    /// Some rows of a matrix.
    fn rows(shape: [usize; 2], outputs: Range<usize>) -> Self {
        Self {
            outputs,
            inputs: 0..shape[1],
            shape,
        }
    }

    /// Some columns of a matrix.
    fn columns(shape: [usize; 2], inputs: Range<usize>) -> Self {
        Self {
            outputs: 0..shape[0],
            inputs,
            shape,
        }
    }
}
