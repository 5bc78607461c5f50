//! Checkpoints in Hugging Face's layout: written after training, read for the score.

use crate::{
    model::{Config, Llama, Weights},
    tokenizer::{self, END_OF_TEXT_ID, IM_END_ID},
};
use anyhow::{Context as _, Result, anyhow};
use candle_core::{DType, Device, safetensors};
use serde_json::{Value, json};
use std::{collections::HashMap, fs, path::Path};
use tokenizers::Tokenizer;

/// Writes the five files of a revision into `dir`, the weights in bf16.
///
/// # Errors
/// Names the file that cannot be written.
pub fn write(dir: &Path, config: &Config, weights: &Weights, tokenizer: &Tokenizer) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut tensors = HashMap::new();
    for (name, weight) in weights {
        tensors.insert(name.clone(), weight.to_dtype(DType::BF16)?);
    }
    // Transformers looks for the format in the file's metadata.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = dir.join("model.safetensors");
    let bytes = ::safetensors::serialize(tensors, Some(metadata))?;
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    write_json(dir, "config.json", &config_json(config)?)?;
    write_json(dir, "generation_config.json", &generation_json())?;
    write_json(
        dir,
        "tokenizer_config.json",
        &tokenizer::config(config.max_position_embeddings),
    )?;
    let text = tokenizer.to_string(false).map_err(|error| anyhow!(error))?;
    let path = dir.join("tokenizer.json");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn write_json(dir: &Path, name: &str, value: &Value) -> Result<()> {
    let path = dir.join(name);
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn config_json(config: &Config) -> Result<Value> {
    let mut value = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": IM_END_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "head_dim": config.head_dim(),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": false,
        "pretraining_tp": 1,
        "rope_scaling": null,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "use_cache": true
    });
    let sizes = serde_json::to_value(config)?;
    let (Value::Object(all), Value::Object(sizes)) = (&mut value, sizes) else {
        unreachable!("both are written as objects")
    };
    all.extend(sizes);
    Ok(value)
}

fn generation_json() -> Value {
    json!({
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": IM_END_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "do_sample": true,
        "temperature": 0.7
    })
}

/// A revision read back, in f32.
pub struct Checkpoint {
    /// The decoder.
    pub model: Llama,
    /// Its weights, for further training.
    pub weights: Weights,
    /// Its sizes.
    pub config: Config,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl Checkpoint {
    /// Reads the checkpoint in `dir`.
    ///
    /// # Errors
    /// Names the file that is missing or damaged.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: Config =
            serde_json::from_str(&text).with_context(|| format!("cannot read {}", path.display()))?;
        let path = dir.join("model.safetensors");
        let tensors = safetensors::load(&path, &Device::Cpu)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let weights = tensors
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)))
            .collect::<Result<Weights>>()?;
        let path = dir.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|error| anyhow!(error))
            .with_context(|| format!("cannot read {}", path.display()))?;
        let model = Llama::new(config.clone(), &weights)?;
        Ok(Self {
            model,
            weights,
            config,
            tokenizer,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_revisions_are_small_and_share_a_tokenizer() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let read = |revision: &str, name: &str| fs::read(root.join(revision).join(name)).unwrap();
        for revision in ["v1", "v2", "v3"] {
            let files = fs::read_dir(root.join(revision)).unwrap();
            let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
            assert!(bytes <= 4 << 20, "{revision} has {bytes} bytes");
            for name in [
                "config.json",
                "generation_config.json",
                "tokenizer.json",
                "tokenizer_config.json",
            ] {
                assert!(
                    read(revision, name) == read("v1", name),
                    "{name} of {revision} differs from v1's"
                );
            }
        }
    }

    #[test]
    fn a_written_checkpoint_reads_back() {
        let committed = Checkpoint::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("v2")).unwrap();
        let dir = std::env::temp_dir().join(format!("penstock-demo-model-{}", std::process::id()));
        write(&dir, &committed.config, &committed.weights, &committed.tokenizer).unwrap();
        let again = Checkpoint::read(&dir);
        fs::remove_dir_all(&dir).unwrap();
        let again = again.unwrap();
        assert_eq!(again.config, committed.config);
        for (name, weight) in &committed.weights {
            let (a, b) = (
                weight.flatten_all().unwrap(),
                again.weights[name].flatten_all().unwrap(),
            );
            assert_eq!(a.to_vec1::<f32>().unwrap(), b.to_vec1::<f32>().unwrap(), "{name}");
        }
    }
}
