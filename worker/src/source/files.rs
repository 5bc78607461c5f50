//! Which files of a place make the checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    FetchError,
    download::{Downloads, Retries, patient},
    is_file_name,
    remote::Remote,
};

/// Names of the shards.
const INDEX: &str = "model.safetensors.index.json";
/// The tensors in one file.
const SINGLE: &str = "model.safetensors";
/// What cannot be loaded without, unless a GGUF file holds it.
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// What some checkpoints have.
const OPTIONAL: [&str; 4] = [
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
];

/// A file to download.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wanted {
    pub name: String,
    /// Bytes, where a listing told.
    pub size: Option<u64>,
    /// Whether the checkpoint is none without it.
    pub required: bool,
}

/// What a place holds, name by name with the size in bytes, if it tells.
pub(super) type Listing = Option<BTreeMap<String, Option<u64>>>;

/// The index of a checkpoint in shards.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Asks the place what it holds.
pub(super) async fn list(
    remote: &mut Remote,
    uri: &str,
    backoff: std::time::Duration,
) -> Result<Listing, FetchError> {
    let mut retries = Retries::new(backoff);
    loop {
        match patient(remote.list()).await {
            Ok(listing) => return Ok(listing),
            Err(source) => {
                if !retries.again(&source).await {
                    let uri = uri.to_owned();
                    return Err(FetchError::List { uri, source });
                }
            }
        }
    }
}

/// The files to download. Of a place that tells what it holds these are all that count for the digest, so that it is
/// that of the directory as it was published. The index of the shards, where there is one, is downloaded already.
pub(super) async fn wanted(
    downloads: &Downloads<'_>,
    gguf: Option<&str>,
    listing: &Listing,
) -> Result<BTreeSet<Wanted>, FetchError> {
    let mut names: BTreeMap<String, bool> = BTreeMap::new();
    names.extend(OPTIONAL.map(|name| (name.to_owned(), false)));
    names.extend(REQUIRED.map(|name| (name.to_owned(), gguf.is_none())));
    match gguf {
        Some(gguf) => drop(names.insert(gguf.to_owned(), true)),
        None => {
            for name in listing.iter().flat_map(BTreeMap::keys) {
                if name.ends_with(".safetensors") {
                    names.insert(safe(downloads.uri, name)?, true);
                }
            }
            let tensors = match index(downloads, listing).await? {
                Some(shards) => shards,
                None => BTreeSet::from([SINGLE.to_owned()]),
            };
            names.extend(tensors.into_iter().map(|name| (name, true)));
        }
    }
    let Some(listing) = listing else {
        let unlisted = |(name, required)| Wanted {
            name,
            size: None,
            required,
        };
        return Ok(names.into_iter().map(unlisted).collect());
    };
    let mut wanted = BTreeSet::new();
    for (name, required) in names {
        match listing.get(&name) {
            Some(&size) => drop(wanted.insert(Wanted { name, size, required })),
            None if required => return Err(missing(downloads.uri, &name)),
            None => {}
        }
    }
    Ok(wanted)
}

/// Downloads the index of the shards and reads it; `None` where there is none.
async fn index(downloads: &Downloads<'_>, listing: &Listing) -> Result<Option<BTreeSet<String>>, FetchError> {
    if listing
        .as_ref()
        .is_some_and(|listing| !listing.contains_key(INDEX))
    {
        return Ok(None);
    }
    if !downloads.optional(INDEX, None).await? {
        return Ok(None);
    }
    let path = downloads.dir.join(INDEX);
    let text = tokio::fs::read(&path).await.map_err(FetchError::write(&path))?;
    let index: Index = serde_json::from_slice(&text).map_err(|source| FetchError::Index {
        uri: downloads.uri.to_owned(),
        source,
    })?;
    let names = index.weight_map.values();
    names
        .map(|name| safe(downloads.uri, name))
        .collect::<Result<_, _>>()
        .map(Some)
}

/// A name that may be written and asked for.
fn safe(uri: &str, name: &str) -> Result<String, FetchError> {
    if is_file_name(name) {
        return Ok(name.to_owned());
    }
    Err(FetchError::UnsafeName {
        uri: uri.to_owned(),
        name: name.to_owned(),
    })
}

/// The error of a file that must be there.
fn missing(uri: &str, file: &str) -> FetchError {
    FetchError::Missing {
        uri: uri.to_owned(),
        file: file.to_owned(),
    }
}
