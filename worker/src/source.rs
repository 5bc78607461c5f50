//! Where checkpoints are published, and how they come to this machine.
//!
//! ```text
//! Source ─▶ fetch ─▶ list or probe ─▶ download (4 at a time, retries, resume) ─▶ fsync ─▶ digest ─▶ rename
//!                                      into CACHE/<hash of the URI>/.partial-*                CACHE/…/checkpoint
//! ```
//!
//! It refuses to load anything, to follow names out of the checkpoint's directory, and to hold credentials: those
//! are the environment's, never the URI's.

mod config;
mod download;
mod error;
mod fetch;
mod files;
mod remote;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use reqwest::Url;

pub use config::SourceConfig;
pub use error::{FetchError, RemoteError};
pub use fetch::{FetchProgress, fetch};

/// Where a checkpoint lies:
///
/// - a directory of this machine, or `file:///directory`, used in place;
/// - `hf://owner/name[@revision]`, by default the revision `main`;
/// - `s3://bucket[/prefix]`;
/// - `https://host/directory/`. A web server does not tell what it holds, so the files are those that a checkpoint
///   must have, those that `model.safetensors.index.json` names and the usual optional ones. Plain `http://` is for
///   loopback addresses only, as nothing else protects what comes without a digest.
///
/// Behind each of the last three may stand the name of one file that ends in `.gguf`, e.g.
/// `hf://owner/name/model-q4.gguf@main`; then it is fetched in place of the safetensors.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    place: Place,
    /// The one file that holds the tensors.
    gguf: Option<String>,
}

/// A `Source` without the file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Place {
    Directory(PathBuf),
    Hub {
        /// `owner/name`.
        repo: String,
        revision: Option<String>,
    },
    S3 {
        bucket: String,
        /// Without slashes at the ends; empty for the whole bucket.
        prefix: String,
    },
    /// A URL that ends in a slash.
    Web(String),
}

/// A source that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is no place of a checkpoint: {reason}; give a directory, file:///directory, hf://owner/name[@revision], \
     s3://bucket/prefix or https://host/directory/"
)]
pub struct SourceError {
    value: String,
    reason: &'static str,
}

// === impl Source ===

impl Source {
    /// The directory that is used in place; `None` where the checkpoint is fetched first.
    pub fn directory(&self) -> Option<&Path> {
        match &self.place {
            Place::Directory(path) => Some(path),
            _ => None,
        }
    }
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(value: &str) -> Result<Self, SourceError> {
        let parsed = match value.split_once("://") {
            None if value.is_empty() => Err("it is empty"),
            None => Ok(Place::Directory(value.into()).into()),
            Some(("file", _)) => file(value),
            Some(("hf", rest)) => hub(rest),
            Some(("s3", rest)) => s3(rest),
            Some(("https" | "http", _)) => web(value),
            Some(_) => Err("its scheme is unknown"),
        };
        parsed.map_err(|reason| SourceError {
            value: value.into(),
            reason,
        })
    }
}

impl From<Place> for Source {
    fn from(place: Place) -> Self {
        Self { place, gguf: None }
    }
}

/// The URI that gives the same source again.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Directory(path) => write!(f, "{}", path.display())?,
            Place::Hub { repo, .. } => write!(f, "hf://{repo}")?,
            Place::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}")?,
            Place::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}")?,
            Place::Web(base) => write!(f, "{base}")?,
        }
        if let Some(gguf) = &self.gguf {
            let slash = if matches!(self.place, Place::Web(_)) {
                ""
            } else {
                "/"
            };
            write!(f, "{slash}{gguf}")?;
        }
        match &self.place {
            Place::Hub {
                revision: Some(revision),
                ..
            } => write!(f, "@{revision}"),
            _ => Ok(()),
        }
    }
}

fn file(value: &str) -> Result<Source, &'static str> {
    let url = Url::parse(value).map_err(|_| "it is no URL")?;
    let path = url
        .to_file_path()
        .map_err(|()| "it names a host other than this machine")?;
    Ok(Place::Directory(path).into())
}

fn hub(rest: &str) -> Result<Source, &'static str> {
    let (path, revision) = match rest.split_once('@') {
        Some((path, revision)) => (path, Some(revision.to_owned())),
        None => (rest, None),
    };
    let is_revision = |revision: &String| revision.split('/').all(is_file_name);
    if !revision.as_ref().is_none_or(is_revision) {
        return Err("its revision is none");
    }
    let mut parts = path.trim_end_matches('/').split('/');
    let (owner, name, gguf) = (parts.next(), parts.next(), parts.next());
    let (Some(owner), Some(name), None) = (owner, name, parts.next()) else {
        return Err("it needs an owner and a name");
    };
    if !is_file_name(owner) || !is_file_name(name) {
        return Err("its owner or name is none");
    }
    if gguf.is_some_and(|file| !is_gguf(file)) {
        return Err("only a .gguf file may stand behind the name");
    }
    Ok(Source {
        place: Place::Hub {
            repo: format!("{owner}/{name}"),
            revision,
        },
        gguf: gguf.map(Into::into),
    })
}

fn s3(rest: &str) -> Result<Source, &'static str> {
    let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
    if !is_file_name(bucket) {
        return Err("it needs a bucket");
    }
    let (prefix, gguf) = split_file(path.trim_end_matches('/'))?;
    object_store::path::Path::parse(prefix).map_err(|_| "its prefix has empty or relative parts")?;
    Ok(Source {
        place: Place::S3 {
            bucket: bucket.into(),
            prefix: prefix.into(),
        },
        gguf,
    })
}

fn web(value: &str) -> Result<Source, &'static str> {
    let mut url = Url::parse(value).map_err(|_| "it is no URL")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a user or a password does not belong into it, as it is shown and stored");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("files cannot be named behind a ? or a #");
    }
    if url.scheme() == "http" && !url.host_str().is_some_and(is_loopback) {
        return Err("http:// is for loopback addresses only, use https://");
    }
    let path = url.path().trim_end_matches('/').to_owned();
    let (base, gguf) = split_file(&path)?;
    url.set_path(&format!("{}/", base.trim_end_matches('/')));
    Ok(Source {
        place: Place::Web(url.into()),
        gguf,
    })
}

/// Takes the file that holds the tensors from the end of a path.
fn split_file(path: &str) -> Result<(&str, Option<String>), &'static str> {
    let (base, last) = path.rsplit_once('/').unwrap_or(("", path));
    if is_gguf(last) {
        return Ok((base, Some(last.into())));
    }
    if last.ends_with(".safetensors") || last.ends_with(".json") || last.ends_with(".gguf") {
        return Err("it names a file where the directory of the checkpoint is wanted");
    }
    Ok((path, None))
}

fn is_gguf(name: &str) -> bool {
    name.ends_with(".gguf") && is_file_name(name)
}

/// Whether a name from elsewhere is safe to write, in a directory and into a URL. `..` and hidden files are not.
fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte))
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
