//! A loaded revision.

use std::path::Path;

use candle_core::Device;

use crate::{Batch, LoadError, ModelConfig, ModelError};

/// What weights and KV are kept in. Activations are f32 in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16: half the memory and its traffic; sums are taken in f32.
    Bf16,
}

/// Size of the KV pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLayout {
    /// Tokens a page.
    pub page_size: usize,
    /// Pages.
    pub num_pages: usize,
}

/// How far loading got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights read so far.
    pub loaded_bytes: u64,
    /// Bytes of weights in all.
    pub total_bytes: u64,
}

/// How to load a checkpoint.
pub struct LoadOptions<'a> {
    /// What to keep weights and KV in. `None`: as the checkpoint says (`torch_dtype`); f16 checkpoints are widened
    /// to f32, which loses nothing.
    pub dtype: Option<Dtype>,
    /// Size of the KV pool.
    pub cache: CacheLayout,
    /// Where to run.
    pub device: Device,
    /// Called after every tensor.
    pub progress: &'a dyn Fn(LoadProgress),
}

/// The weights of one revision and its paged KV.
pub struct Model {
    config: ModelConfig,
}

impl Model {
    /// Loads the checkpoint in `dir`.
    ///
    /// # Errors
    /// See [`LoadError`]; each names what is wrong and where.
    pub fn load(dir: &Path, options: LoadOptions<'_>) -> Result<Self, LoadError> {
        let _ = (dir, options);
        unimplemented!()
    }

    /// The checkpoint's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the model runs on, for people, e.g. `cpu (avx512, amx), bf16`.
    pub fn device(&self) -> String {
        unimplemented!()
    }

    /// Bytes of KV that one token takes.
    pub fn kv_bytes_per_token(config: &ModelConfig, dtype: Option<Dtype>) -> usize {
        let _ = (config, dtype);
        unimplemented!()
    }

    /// Runs one batch: writes the KV of its tokens into their pages, and fills `logits` with one row of
    /// `vocab_size` for each sequence that wants them, in the order of the batch.
    ///
    /// # Errors
    /// The batch contradicts itself or exceeds the model's limits; then nothing was written.
    pub fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let _ = (batch, logits);
        unimplemented!()
    }
}

/// What identifies a checkpoint: BLAKE3, in hex.
///
/// # Errors
/// A file cannot be read.
pub fn manifest_digest(dir: &Path) -> Result<String, LoadError> {
    let _ = dir;
    unimplemented!()
}
