//! `config.json`: what the decoder looks like.

use std::path::Path;

use penstock_kernels::MAX_HEAD_DIM;
use serde_json::{Map, Value};

use crate::{
    Dtype, LoadError,
    gguf::{self, Gguf},
};

mod fields;
mod rope;
mod window;
use fields::Fields;
pub(crate) use fields::read_object;
use rope::Rope;
pub use rope::RopeScaling;

/// The decoder families. They are one decoder with switches: see [`ModelConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`: Llama with biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: Llama with an RMSNorm over each head of q and k.
    Qwen3,
}

/// What a checkpoint's `config.json` (and `generation_config.json`, for the end ids) says, validated.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Decoder family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Longest sequence. Where the frequencies are stretched by more than the checkpoint's own number allows for
    /// ([`RopeScaling::Yarn`], [`RopeScaling::Dynamic`]), as long as they are stretched to.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Positions that a token sees in each layer, its own included; `None`: all up to its own.
    pub attention_windows: Vec<Option<usize>>,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Whether each head of q and k is normalised.
    pub qk_norm: bool,
    /// Ids that end a reply, each once.
    pub eos_token_ids: Vec<u32>,
    /// What the checkpoint says it should be computed in; `None` where it does not say.
    pub checkpoint_dtype: Option<Dtype>,
}

/// Largest width, head count or layer count that is believed. Every limit here only keeps nonsense from being
/// multiplied; the largest published models stay a factor of 4 below.
const MAX_DIMENSION: usize = 1 << 20;
/// Most layers that are believed.
const MAX_LAYERS: usize = 4096;
/// Largest vocabulary that is believed.
const MAX_VOCABULARY: usize = 1 << 24;
/// Longest context that is believed.
const MAX_CONTEXT: usize = 1 << 28;

// === impl Architecture ===

impl Architecture {
    const ALL: [(&'static str, Self); 4] = [
        ("LlamaForCausalLM", Self::Llama),
        ("MistralForCausalLM", Self::Mistral),
        ("Qwen2ForCausalLM", Self::Qwen2),
        ("Qwen3ForCausalLM", Self::Qwen3),
    ];

    fn parse(fields: &Fields<'_>) -> Result<Self, LoadError> {
        let Some(name) = fields
            .raw("architectures")
            .and_then(|names| names.get(0))
            .and_then(Value::as_str)
        else {
            return Err(fields.error(
                "architectures",
                "must be a list with the name of one architecture",
            ));
        };
        let known = Self::ALL.iter().find(|(known, _)| *known == name);
        known
            .map(|&(_, architecture)| architecture)
            .ok_or_else(|| LoadError::Architecture {
                path: fields.path().to_owned(),
                architecture: name.to_owned(),
                supported: Self::ALL.map(|(name, _)| name).join(", "),
            })
    }
}

// === impl ModelConfig ===

impl ModelConfig {
    /// Reads `config.json` in `dir`, and the end ids of `generation_config.json` where there is one; or the metadata of
    /// the GGUF file that `dir` is or holds.
    ///
    /// # Errors
    /// A file is unreadable or no JSON, or a field is missing, out of range or asks for what is not supported.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        if let Some(file) = gguf::find(dir)? {
            return Gguf::open(file)?.config();
        }
        let path = dir.join("config.json");
        let document = fields::read_object(&path)?;
        let mut config = Self::parse(&path, &document)?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            let document = fields::read_object(&path)?;
            config.add_eos(&Fields::new(&path, "", &document))?;
        }
        Ok(config)
    }

    pub(crate) fn parse(path: &Path, document: &Map<String, Value>) -> Result<Self, LoadError> {
        let fields = Fields::new(path, "", document);
        let architecture = Architecture::parse(&fields)?;
        check_supported(&fields)?;
        let hidden_size = fields.size("hidden_size", MAX_DIMENSION)?;
        let num_heads = fields.size("num_attention_heads", MAX_DIMENSION)?;
        let num_kv_heads = fields
            .optional_size("num_key_value_heads", MAX_DIMENSION)?
            .unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            let problem = format!("is {num_kv_heads}, which does not divide the {num_heads} attention heads");
            return Err(fields.error("num_key_value_heads", problem));
        }
        let num_layers = fields.size("num_hidden_layers", MAX_LAYERS)?;
        let rope = Rope::parse(&fields)?;
        let says_bias = fields.flag("attention_bias")?.unwrap_or(false);
        let attention_bias = says_bias && architecture != Architecture::Mistral;
        let mut config = Self {
            architecture,
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim: head_dim(&fields, hidden_size, num_heads)?,
            intermediate_size: fields.size("intermediate_size", MAX_DIMENSION)?,
            vocab_size: fields.size("vocab_size", MAX_VOCABULARY)?,
            max_position_embeddings: rope.context,
            rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
            attention_windows: window::attention_windows(&fields, architecture, num_layers)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: attention_bias || architecture == Architecture::Qwen2,
            output_bias: attention_bias && architecture != Architecture::Qwen2,
            mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false) && architecture == Architecture::Llama,
            qk_norm: architecture == Architecture::Qwen3,
            eos_token_ids: Vec::new(),
            checkpoint_dtype: checkpoint_dtype(&fields)?,
        };
        config.add_eos(&fields)?;
        Ok(config)
    }

    /// What the model computes in where the caller does not say.
    pub fn default_dtype(&self) -> Dtype {
        self.checkpoint_dtype.unwrap_or(Dtype::F32)
    }

    /// Elements of all matrices.
    pub fn parameters(&self) -> u64 {
        let (hidden, inner) = (self.hidden_size as u64, self.intermediate_size as u64);
        let heads = (2 * (self.num_heads + self.num_kv_heads) * self.head_dim) as u64;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        self.num_layers as u64 * hidden * (heads + 3 * inner) + tables * self.vocab_size as u64 * hidden
    }

    /// Query heads that share one key and value head.
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    fn add_eos(&mut self, fields: &Fields<'_>) -> Result<(), LoadError> {
        let field = "eos_token_id";
        let listed = match fields.raw(field) {
            None => return Ok(()),
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
        };
        for id in listed {
            let known = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let Some(id) = known.filter(|&id| (id as usize) < self.vocab_size) else {
                let problem = format!(
                    "has {id}, which is no id below the vocabulary size {}",
                    self.vocab_size
                );
                return Err(fields.error(field, problem));
            };
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }
}

/// Refuses what would silently be computed wrongly.
fn check_supported(fields: &Fields<'_>) -> Result<(), LoadError> {
    if let Some(activation) = fields.raw("hidden_act")
        && activation.as_str() != Some("silu")
    {
        return Err(fields.error(
            "hidden_act",
            format!("is {activation}; only \"silu\" is supported"),
        ));
    }
    if fields.raw("quantization_config").is_some() {
        return Err(fields.error(
            "quantization_config",
            "is set; quantized checkpoints are not supported",
        ));
    }
    Ok(())
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, num_heads: usize) -> Result<usize, LoadError> {
    let head_dim = match fields.optional_size("head_dim", MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let problem = format!("is {num_heads}, which does not divide the hidden size {hidden_size}");
            return Err(fields.error("num_attention_heads", problem));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(fields.error(
            "head_dim",
            format!("is {head_dim}; rotary embeddings need it even"),
        ));
    }
    Ok(head_dim)
}

fn checkpoint_dtype(fields: &Fields<'_>) -> Result<Option<Dtype>, LoadError> {
    // transformers 5 writes `dtype` where it wrote `torch_dtype` before.
    for field in ["torch_dtype", "dtype"] {
        return Ok(match fields.raw(field).map(Value::as_str) {
            None => continue,
            Some(Some("bfloat16")) => Some(Dtype::Bf16),
            Some(Some("float32" | "float16")) => Some(Dtype::F32),
            Some(_) => return Err(fields.error(field, "must be \"bfloat16\", \"float16\" or \"float32\"")),
        });
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
