//! What can be wrong with a checkpoint's text files, or with a text.

use std::path::PathBuf;

/// Why a tokenizer or chat template could not be loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {field}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field at fault, or `file` for the whole of it.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// The tokenizer refused a text.
    #[error("cannot tokenize the text: {0}")]
    Encode(String),
    /// The chat template refused the messages (`raise_exception`) or failed on them.
    #[error("the chat template refused the messages: {0}")]
    Render(String),
}

impl TextError {
    pub(crate) fn invalid(path: &std::path::Path, field: &str, message: impl ToString) -> Self {
        Self::Invalid {
            path: path.into(),
            field: field.into(),
            message: message.to_string(),
        }
    }
}

/// Reads a whole text file.
pub(crate) fn read(path: &std::path::Path) -> Result<String, TextError> {
    std::fs::read_to_string(path).map_err(|source| TextError::Read {
        path: path.into(),
        source,
    })
}
