//! Why a checkpoint cannot be had.

use std::{io, path::PathBuf};

/// Why a checkpoint cannot be fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// A local source is no directory.
    #[error("{} is not a directory: give the one that holds the checkpoint's config.json", path.display())]
    NoDirectory {
        /// What was given.
        path: PathBuf,
    },
    /// The client of a remote place cannot be set up.
    #[error(
        "cannot reach {uri}: check HF_ENDPOINT, HF_TOKEN, the AWS_* variables and the system's certificates"
    )]
    Client {
        /// The source.
        uri: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A remote place does not tell what it holds.
    #[error("cannot list {uri}")]
    List {
        /// The source.
        uri: String,
        /// Why.
        #[source]
        source: RemoteError,
    },
    /// A file that a checkpoint must have is not there.
    #[error(
        "{uri} has no {file}: a checkpoint is config.json, tokenizer.json and model.safetensors, or its shards \
             and model.safetensors.index.json"
    )]
    Missing {
        /// The source.
        uri: String,
        /// The file.
        file: String,
    },
    /// A file cannot be downloaded.
    #[error("cannot download {file} of {uri}")]
    Download {
        /// The source.
        uri: String,
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: RemoteError,
    },
    /// A file has a name that could lie outside of the checkpoint, or none that this crate would write.
    #[error(
        "{uri} names a file {name:?}: the files of a checkpoint lie side by side, and their names are letters, \
             digits and . _ - + only"
    )]
    UnsafeName {
        /// The source.
        uri: String,
        /// The name.
        name: String,
    },
    /// The index of the shards is none.
    #[error(
        "model.safetensors.index.json of {uri} has no weight_map from tensors to files: publish it again"
    )]
    Index {
        /// The source.
        uri: String,
        /// Why, where it is no JSON.
        #[source]
        source: serde_json::Error,
    },
    /// Another checkpoint is there than the one that was published.
    #[error(
        "{uri} has the digest {actual}, not {expected}: it changed after it was published, or was damaged; publish \
             it again under its present digest, or restore it"
    )]
    Digest {
        /// The source.
        uri: String,
        /// What was published.
        expected: String,
        /// What is there.
        actual: String,
    },
    /// The digest cannot be taken.
    #[error("cannot take the digest of {uri}")]
    Unreadable {
        /// The source.
        uri: String,
        /// Why.
        #[source]
        source: penstock_model::LoadError,
    },
    /// The thread that takes the digest panicked or was told to end.
    #[error("the thread that takes the digest failed: {0}")]
    Hashing(String),
    /// The cache cannot be written.
    #[error("cannot write {}: check the space and the permissions of the cache directory", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a remote place does not give a file or a listing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// 404, or what means the same.
    #[error("it is not there")]
    NotFound,
    /// 401 or 403.
    #[error("access is denied: {remedy}")]
    Denied {
        /// What to do.
        remedy: &'static str,
        /// What the server said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The connection broke, or the server has a passing problem.
    #[error("the connection or the server failed")]
    Transient(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Fewer bytes came than were announced, or more.
    #[error("{got} bytes came, {size} were announced")]
    Size {
        /// Bytes that came.
        got: u64,
        /// Bytes that were announced.
        size: u64,
    },
    /// Nothing came for a while.
    #[error("nothing came for {seconds} s")]
    Stalled {
        /// How long.
        seconds: u64,
    },
    /// The server answered what makes no sense here.
    #[error("the request failed")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
}

// === impl FetchError ===

impl FetchError {
    /// Whether the same call may succeed later without anybody doing something.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::List { source, .. } | Self::Download { source, .. } => source.is_retryable(),
            _ => false,
        }
    }

    /// The same with the cause that a write to `path` failed.
    pub(super) fn write(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Write { path, source }
    }
}

// === impl RemoteError ===

impl RemoteError {
    /// Whether the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Transient(_) | Self::Size { .. } | Self::Stalled { .. }
        )
    }

    /// What a status other than success means.
    pub(super) fn status(
        status: u16,
        remedy: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    ) -> Self {
        match status {
            404 | 410 => Self::NotFound,
            401 | 403 => Self::Denied { remedy, source },
            408 | 425 | 429 | 500.. => Self::Transient(source),
            _ => Self::Refused(source),
        }
    }
}
