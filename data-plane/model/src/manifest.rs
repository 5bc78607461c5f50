//! What identifies a checkpoint.

use std::{
    fs::{self, File},
    path::Path,
};

use crate::LoadError;

/// Files that make a revision what it is, beside all of its `*.safetensors` and `*.gguf`.
const FILES: [&str; 5] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// BLAKE3, in hex, over the manifest of `dir`: for each file that makes the revision what it is (its
/// configurations, tokenizer, template, `*.safetensors` and `*.gguf`), sorted by name, a line of the name, the size
/// in bytes and the BLAKE3 of the content. A `dir` that is one GGUF file is that line alone. Other files in the directory do not count, nor do times and permissions.
///
/// # Errors
/// The directory or a file in it cannot be read.
pub fn manifest_digest(dir: &Path) -> Result<String, LoadError> {
    let read = |source| LoadError::Read {
        path: dir.to_owned(),
        source,
    };
    if dir.is_file() {
        let mut manifest = blake3::Hasher::new();
        manifest.update(line(dir)?.as_bytes());
        return Ok(manifest.finalize().to_hex().to_string());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        // A name that is no Unicode is none of ours.
        let Some(name) = name.to_str() else { continue };
        if FILES.contains(&name) || name.ends_with(".safetensors") || name.ends_with(".gguf") {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    let mut manifest = blake3::Hasher::new();
    for name in names {
        manifest.update(line(&dir.join(&name))?.as_bytes());
    }
    Ok(manifest.finalize().to_hex().to_string())
}

/// A file's line: name, size, BLAKE3.
fn line(path: &Path) -> Result<String, LoadError> {
    let mut content = blake3::Hasher::new();
    let size = File::open(path).and_then(|file| {
        let size = file.metadata()?.len();
        content.update_reader(file)?;
        Ok(size)
    });
    let size = size.map_err(|source| LoadError::Read {
        path: path.to_owned(),
        source,
    })?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(format!("{name}\t{size}\t{}\n", content.finalize().to_hex()))
}
