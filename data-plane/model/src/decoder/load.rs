//! From a checkpoint's tensors to a packed decoder.

use candle_core::{DType, Device, Tensor};
use penstock_kernels::{Cpu, Element};

use super::{Decoder, Layer, qkv_shape};
use crate::{
    Dtype, LoadProgress, ModelConfig,
    checkpoint::Checkpoint,
    parallel::{ColumnParallel, Loaded, Part, RowParallel},
    rotary,
};

/// Reads a checkpoint, tensor by tensor.
struct Loader<'a> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
    cpu: Cpu,
    element: Element,
    loaded_bytes: u64,
    progress: &'a dyn Fn(LoadProgress),
}

/// Loads the decoder, with rotary angles for `positions` positions.
pub(crate) fn load(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    dtype: Dtype,
    positions: usize,
    progress: &dyn Fn(LoadProgress),
) -> Loaded<Decoder> {
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
        loaded_bytes: 0,
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
    let output = loader.part(output, None, config.vocab_size, config.hidden_size)?;
    let output = loader.columns(config.hidden_size, vec![output]);
    let embedding = if config.tie_word_embeddings {
        Tensor::zeros(1, DType::F32, &Device::Cpu)?
    } else {
        loader.embedding(table)?
    };
    loader.report(checkpoint.total_bytes());
    let angles = rotary::angles(config, positions);
    Ok(Decoder {
        cpu: loader.cpu,
        embedding,
        tied: config.tie_word_embeddings,
        layers,
        norm,
        output,
        angles: Tensor::from_vec(angles, (positions, config.head_dim), &Device::Cpu)?,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        shape: qkv_shape(config),
        eps: config.rms_norm_eps,
    })
}

// === impl Loader ===

impl<'a> Loader<'a> {
    fn layer(&mut self, index: usize) -> Loaded<Layer> {
        let config = self.config;
        let name = |rest: &str| format!("model.layers.{index}.{rest}");
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        );
        let projection = |part: &str, outputs: usize, inputs: usize, bias: bool| {
            let bias = bias.then(|| name(&format!("{part}.bias")));
            self.part(&name(&format!("{part}.weight")), bias.as_deref(), outputs, inputs)
        };
        let qkv = vec![
            projection("self_attn.q_proj", q, hidden, config.qkv_bias)?,
            projection("self_attn.k_proj", kv, hidden, config.qkv_bias)?,
            projection("self_attn.v_proj", kv, hidden, config.qkv_bias)?,
        ];
        let attention_output = projection("self_attn.o_proj", hidden, q, config.output_bias)?;
        let gate_up = [
            projection("mlp.gate_proj", inner, hidden, config.mlp_bias)?,
            projection("mlp.up_proj", inner, hidden, config.mlp_bias)?,
        ];
        let down = projection("mlp.down_proj", hidden, inner, config.mlp_bias)?;
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
            attention_output: self.rows(q, attention_output),
            mlp_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.gated(hidden, gate_up),
            down: self.rows(inner, down),
        })
    }

    /// A matrix and perhaps its bias, checked but not yet read.
    fn part(&self, weight: &str, bias: Option<&str>, outputs: usize, inputs: usize) -> Loaded<Part<'a>> {
        let bias = bias
            .map(|name| self.checkpoint.tensor(name, &[outputs]))
            .transpose()?;
        Ok(Part {
            outputs,
            weight: self.checkpoint.tensor(weight, &[outputs, inputs])?,
            bias,
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

    /// The embedding as a table of rows.
    fn embedding(&mut self, name: &str) -> Loaded<Tensor> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let weights = self.checkpoint.tensor(name, &[vocab, hidden])?;
        let table = weights.to_vec(vocab * hidden);
        let table = match self.element {
            Element::F32 => Tensor::from_vec(table, (vocab, hidden), &Device::Cpu)?,
            // A table is only read: rounding it to bytes would save no time.
            Element::Bf16 | Element::Int8 => {
                let table: Vec<half::bf16> = table.into_iter().map(half::bf16::from_f32).collect();
                Tensor::from_vec(table, (vocab, hidden), &Device::Cpu)?
            }
        };
        self.loaded(weights.bytes());
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
