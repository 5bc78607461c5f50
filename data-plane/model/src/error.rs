//! What can go wrong, by operation.

use std::path::PathBuf;

/// Why a checkpoint cannot be loaded. Every message names the file, the tensor or the field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{} is not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A field of the configuration is missing, of the wrong kind or out of range.
    #[error("{}: field `{field}` {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, dotted where it is nested.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The architecture is none that this crate runs.
    #[error("{}: architecture `{architecture}` is not supported; supported are {supported}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// What the file says.
        architecture: String,
        /// What could be said instead.
        supported: String,
    },
    /// There are no weights in the directory.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json nor a .gguf file", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// A weight file is not valid safetensors, e.g. cut short.
    #[error("{} is not a complete safetensors file ({bytes} bytes)", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: usize,
        /// What is wrong with it.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A file is no GGUF that can be read, e.g. cut short.
    #[error("{} is no complete GGUF file ({bytes} bytes): {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Which of several GGUF files is meant?
    #[error("{} holds {count} GGUF files: name one of them", dir.display())]
    SeveralGguf {
        /// The directory.
        dir: PathBuf,
        /// How many.
        count: usize,
    },
    /// A tensor that the configuration asks for is in no file.
    #[error("tensor `{tensor}` is missing from {}", path.display())]
    MissingTensor {
        /// The tensor.
        tensor: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A tensor has another shape than the configuration says.
    #[error(
        "tensor `{tensor}` in {} has shape {found:?}, but the configuration says {expected:?}",
        path.display()
    )]
    Shape {
        /// The tensor.
        tensor: String,
        /// The file.
        path: PathBuf,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's elements are of a kind that this crate does not read.
    #[error("tensor `{tensor}` in {} is {found}; supported are BF16, F16 and F32", path.display())]
    TensorDtype {
        /// The tensor.
        tensor: String,
        /// The file.
        path: PathBuf,
        /// Kind in the file.
        found: String,
    },
    /// A weight is not a number, or infinite.
    #[error("tensor `{tensor}` in {} holds a weight that is not finite, the first at element {index}", path.display())]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The file.
        path: PathBuf,
        /// Index of the first one, row-major.
        index: usize,
    },
    /// The KV cache cannot be had.
    #[error("cannot reserve {bytes} bytes for the KV cache of {num_pages} pages of {page_size} tokens")]
    Cache {
        /// Bytes asked for; 0 where the number of pages or the page size is 0 or too large to count.
        bytes: u64,
        /// Pages asked for.
        num_pages: usize,
        /// Tokens a page.
        page_size: usize,
    },
    /// The model cannot be split over so many ranks.
    #[error(
        "tensor parallelism over {size} ranks does not divide {heads} heads and {kv_heads} KV heads: give a size that \
         divides the heads, and divides the KV heads or is a multiple of them"
    )]
    TensorParallel {
        /// Ranks asked for.
        size: usize,
        /// Query heads of the model.
        heads: usize,
        /// KV heads of the model.
        kv_heads: usize,
    },
    /// A rank's thread cannot be started.
    #[error("cannot start the thread of tensor-parallel rank {rank}")]
    Rank {
        /// Which.
        rank: usize,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The device has no kernels for this.
    #[error("models run on the CPU only so far, not on {device}")]
    Device {
        /// The device asked for.
        device: String,
    },
    /// A tensor operation failed.
    #[error("a tensor operation failed")]
    Tensor(#[from] candle_core::Error),
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The batch contradicts itself or the model's limits; nothing was computed.
    #[error("invalid batch: {0}")]
    Batch(String),
    /// A tensor operation failed.
    #[error("a tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A rank failed or is stuck. KV that the step was to write is undefined.
    #[error("{0}")]
    Rank(String),
}
