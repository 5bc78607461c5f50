//! GGUF files: llama.cpp's format, which holds configuration, tokenizer and weights in one file.
//!
//! Its names are translated into those of Hugging Face's checkpoints, so that one loader serves both. Quantized
//! weights are widened as they are read and packed like any others (`LoadOptions::dtype`).

use std::{
    fs,
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use candle_core::quantized::{
    GgmlDType,
    gguf_file::{Content, Value},
};
use penstock_kernels::MappedFile;
use serde_json::{Map, json};

use crate::{Dtype, LoadError, ModelConfig};

mod names;
mod text;

pub(crate) use names::Translated;
pub use text::{GgufText, TokenKind};

/// An opened file.
pub(crate) struct Gguf {
    path: PathBuf,
    map: MappedFile,
    content: Content,
    architecture: String,
}

/// A tensor of it.
pub(crate) struct Block<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) dtype: GgmlDType,
    pub(crate) shape: Vec<usize>,
    /// Width of the heads whose rows are laid out in pairs, for rotary embeddings that turn neighbours.
    pub(crate) paired: Option<usize>,
}

/// The GGUF file that `path` is, or the only one in it where it holds no `config.json`.
///
/// # Errors
/// There are several.
pub(crate) fn find(path: &Path) -> Result<Option<PathBuf>, LoadError> {
    let is_gguf = |path: &Path| {
        path.extension()
            .is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
    };
    if is_gguf(path) && !path.is_dir() {
        return Ok(Some(path.to_owned()));
    }
    if path.join("config.json").exists() {
        return Ok(None);
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| is_gguf(path))
        .collect();
    if files.len() > 1 {
        return Err(LoadError::SeveralGguf {
            dir: path.to_owned(),
            count: files.len(),
        });
    }
    Ok(files.pop())
}

// === impl Gguf ===

impl Gguf {
    pub(crate) fn open(path: PathBuf) -> Result<Self, LoadError> {
        let map = match MappedFile::open(&path) {
            Ok(map) => map,
            Err(source) => return Err(LoadError::Read { path, source }),
        };
        // The reader divides by an alignment that the file may say is 0.
        let read = || Content::read(&mut Cursor::new(&map[..]));
        let problem = match catch_unwind(AssertUnwindSafe(read)) {
            Ok(Ok(content)) => {
                let mut file = Self {
                    path,
                    map,
                    content,
                    architecture: String::new(),
                };
                file.architecture = file.text("general.architecture")?.to_owned();
                return Ok(file);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "its header makes no sense".into(),
        };
        Err(LoadError::Gguf {
            path,
            bytes: map.len(),
            problem,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// What `config.json` would say.
    pub(crate) fn config(&self) -> Result<ModelConfig, LoadError> {
        let architectures = match self.architecture.as_str() {
            "llama" => "LlamaForCausalLM",
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            other => {
                return Err(LoadError::Architecture {
                    path: self.path.clone(),
                    architecture: other.to_owned(),
                    supported: "llama, mistral, qwen2, qwen3".into(),
                });
            }
        };
        let mut document = Map::new();
        document.insert("architectures".into(), json!([architectures]));
        for (name, key) in [
            ("hidden_size", "embedding_length"),
            ("num_hidden_layers", "block_count"),
            ("intermediate_size", "feed_forward_length"),
            ("num_attention_heads", "attention.head_count"),
            ("max_position_embeddings", "context_length"),
        ] {
            document.insert(
                name.into(),
                self.own(key)?.ok_or_else(|| self.missing(&self.key(key)))?,
            );
        }
        for (name, key) in [
            ("num_key_value_heads", "attention.head_count_kv"),
            ("head_dim", "attention.key_length"),
            ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
            ("rope_theta", "rope.freq_base"),
        ] {
            if let Some(value) = self.own(key)? {
                document.insert(name.into(), value);
            }
        }
        if self.architecture == "mistral"
            && let Some(window) = self.own("attention.sliding_window")?
        {
            document.insert("sliding_window".into(), window);
        }
        if let Some(scaling) = self.rope_scaling()? {
            document.insert("rope_scaling".into(), scaling);
        }
        let vocabulary = self.content.tensor_infos.get("token_embd.weight");
        let rows = vocabulary.and_then(|info| info.shape.dims().first());
        let rows = rows.ok_or_else(|| self.no_tensor("token_embd.weight"))?;
        document.insert("vocab_size".into(), json!(rows));
        let tied = !self.content.tensor_infos.contains_key("output.weight");
        document.insert("tie_word_embeddings".into(), json!(tied));
        for (name, tensor) in [
            ("attention_bias", "blk.0.attn_output.bias"),
            ("mlp_bias", "blk.0.ffn_down.bias"),
        ] {
            document.insert(name.into(), json!(self.content.tensor_infos.contains_key(tensor)));
        }
        let mut ends: Vec<serde_json::Value> = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            ends.extend(self.value(key)?);
        }
        document.insert("eos_token_id".into(), json!(ends));
        let mut config = ModelConfig::parse(&self.path, &document)?;
        config.checkpoint_dtype = Some(self.dtype());
        Ok(config)
    }

    /// The tensor that `name`, in Hugging Face's words, is here.
    pub(crate) fn tensor(&self, name: &str) -> Result<Block<'_>, LoadError> {
        let Translated { name, paired } = names::translate(name);
        let info = self
            .content
            .tensor_infos
            .get(&name)
            .ok_or_else(|| self.no_tensor(&name))?;
        let broken = |problem: String| LoadError::Gguf {
            path: self.path.clone(),
            bytes: self.map.len(),
            problem: format!("tensor `{name}` {problem}"),
        };
        let shape = info.shape.dims().to_vec();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(info.ggml_dtype.block_size()) {
            let block = info.ggml_dtype.block_size();
            return Err(broken(format!(
                "has rows of {row} elements, which are no whole blocks of {block}"
            )));
        }
        let elements = shape
            .iter()
            .try_fold(1_usize, |product, &dim| product.checked_mul(dim));
        let bytes = elements.and_then(|elements| {
            (elements / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size())
        });
        let start = self.content.tensor_data_offset.checked_add(info.offset);
        let range = start.zip(bytes).and_then(|(start, bytes)| {
            let start = usize::try_from(start).ok()?;
            Some(start..start.checked_add(bytes)?)
        });
        // Blocks are read where they lie, and the file is mapped at the start of a page.
        if let Some(range) = &range
            && !range.start.is_multiple_of(8)
        {
            return Err(broken(format!(
                "starts at byte {}, which is not aligned",
                range.start
            )));
        }
        let data = range.and_then(|range| self.map.get(range));
        Ok(Block {
            data: data.ok_or_else(|| broken("lies beyond the end of the file".into()))?,
            dtype: info.ggml_dtype,
            shape,
            paired: self.pairs(paired)?,
        })
    }

    /// What the frequencies of rotary embeddings are divided by, if the file says so for each.
    pub(crate) fn has_rope_factors(&self) -> bool {
        self.content.tensor_infos.contains_key("rope_freqs.weight")
    }

    /// llama.cpp turns neighbours where the Llama family turns halves, and lays the rows of q and k out for that.
    fn pairs(&self, paired: bool) -> Result<Option<usize>, LoadError> {
        let turns_neighbours = matches!(self.architecture.as_str(), "llama" | "mistral");
        match paired && turns_neighbours {
            true => Ok(Some(self.config()?.head_dim)),
            false => Ok(None),
        }
    }

    /// What the weights are best kept in.
    fn dtype(&self) -> Dtype {
        let matrices = self
            .content
            .tensor_infos
            .iter()
            .filter(|(name, _)| name.starts_with("blk."));
        let matrices = matrices.filter(|(_, info)| info.shape.dims().len() == 2);
        let kinds: Vec<GgmlDType> = matrices.map(|(_, info)| info.ggml_dtype).collect();
        if kinds.iter().any(|kind| kind.block_size() > 1) {
            Dtype::Int8
        } else if kinds.contains(&GgmlDType::BF16) {
            Dtype::Bf16
        } else {
            Dtype::F32
        }
    }

    fn rope_scaling(&self) -> Result<Option<serde_json::Value>, LoadError> {
        let kind = self.key("rope.scaling.type");
        let kind = match self.content.metadata.get(&kind) {
            None => return Ok(None),
            Some(value) => value
                .to_string()
                .map_err(|_| self.wrong(&kind, "must be a text"))?,
        };
        let mut scaling = Map::new();
        match kind.as_str() {
            "none" => return Ok(None),
            "linear" | "yarn" => scaling.insert("rope_type".into(), json!(kind)),
            other => {
                let problem = format!("is {other:?}; supported are none, linear and yarn");
                return Err(self.wrong(&self.key("rope.scaling.type"), &problem));
            }
        };
        for (name, key) in [
            ("factor", "rope.scaling.factor"),
            (
                "original_max_position_embeddings",
                "rope.scaling.original_context_length",
            ),
        ] {
            if let Some(value) = self.own(key)? {
                scaling.insert(name.into(), value);
            }
        }
        Ok(Some(scaling.into()))
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// A number of the architecture.
    fn own(&self, key: &str) -> Result<Option<serde_json::Value>, LoadError> {
        self.value(&self.key(key))
    }

    fn value(&self, key: &str) -> Result<Option<serde_json::Value>, LoadError> {
        let number = match self.content.metadata.get(key) {
            None => return Ok(None),
            Some(Value::U8(n)) => json!(n),
            Some(Value::I8(n)) => json!(n),
            Some(Value::U16(n)) => json!(n),
            Some(Value::I16(n)) => json!(n),
            Some(Value::U32(n)) => json!(n),
            Some(Value::I32(n)) => json!(n),
            Some(Value::U64(n)) => json!(n),
            Some(Value::I64(n)) => json!(n),
            Some(Value::F32(n)) => json!(n),
            Some(Value::F64(n)) => json!(n),
            Some(_) => return Err(self.wrong(key, "must be a number")),
        };
        Ok(Some(number))
    }

    fn text(&self, key: &str) -> Result<&str, LoadError> {
        match self.content.metadata.get(key) {
            None => Err(self.missing(key)),
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(self.wrong(key, "must be a text")),
        }
    }

    fn missing(&self, key: &str) -> LoadError {
        self.wrong(key, "is missing")
    }

    fn wrong(&self, key: &str, problem: &str) -> LoadError {
        LoadError::Field {
            path: self.path.clone(),
            field: key.to_owned(),
            problem: problem.to_owned(),
        }
    }

    fn no_tensor(&self, name: &str) -> LoadError {
        LoadError::MissingTensor {
            tensor: name.to_owned(),
            path: self.path.clone(),
        }
    }
}
