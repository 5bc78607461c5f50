//! Checkpoints in the Hugging Face layout, and the decoder families that run them over a paged KV pool.
//!
//! [`Model::load`] reads `config.json` and the safetensors files of one revision; [`Model::forward`] runs a ragged
//! [`Batch`] of prefill chunks and decodes. Tensors and devices are candle's; what computes is a set of in-place
//! candle operations over `penstock-kernels`, one per step of the decoder, so that another device adds its own
//! implementation to the same operations.
//!
//! ```text
//! dir ─▶ ModelConfig ─▶ Checkpoint (mapped) ─▶ Decoder (packed) ─▶ Model::forward(Batch) ─▶ logits
//!                                                   KvCache ◀────────────┘
//! ```
//!
//! ```no_run
//! use penstock_model::{Batch, CacheLayout, Device, LoadOptions, Model, TensorParallel};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let cache = CacheLayout { page_size: 16, num_pages: 64 };
//! let options = LoadOptions {
//!     dtype: None,
//!     cache,
//!     device: Device::Cpu,
//!     tensor_parallel: TensorParallel::default(),
//!     progress: &|_| {},
//! };
//! let mut model = Model::load("checkpoint".as_ref(), options)?;
//! let (mut batch, mut logits) = (Batch::default(), Vec::new());
//! batch.push(&[5, 6, 7], 0, &[0], true); // a prompt of three tokens, whose KV goes to page 0
//! model.forward(&batch, &mut logits)?;
//! assert_eq!(logits.len(), model.config().vocab_size);
//! # Ok(())
//! # }
//! ```
//!
//! It refuses to know scheduling (who gets which page), sampling and text. A broken checkpoint is an error that
//! names the file, the tensor or the field, never a panic.

mod batch;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod gguf;
mod manifest;
mod model;
mod ops;
mod parallel;
mod ranks;
mod rotary;

pub use batch::{Batch, BatchSequence};
pub use candle_core::Device;
pub use config::{Architecture, ModelConfig, RopeScaling};
pub use error::{LoadError, ModelError};
pub use gguf::{GgufText, TokenKind};
pub use manifest::manifest_digest;
pub use model::{CacheLayout, Dtype, LoadOptions, LoadProgress, Model, TensorParallel};
pub use penstock_kernels::{Collective, CollectiveError, LocalCollective};
