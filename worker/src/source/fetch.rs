//! From a source to a directory of this machine.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};

use super::{
    FetchError, Place, RemoteError, Source, SourceConfig,
    download::{Downloads, Tally},
    files::{self, Wanted},
    remote::Remote,
};

/// Files that are downloaded at once.
const PARALLEL: usize = 4;
/// The finished checkpoint, in the directory of its source.
const FINISHED: &str = "checkpoint";
/// What is unfinished begins with this.
const PARTIAL: &str = ".partial-";
/// How often a lock that another process holds is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(200);

/// How far fetching is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchProgress {
    /// Bytes that have come. Falls where a file must begin anew.
    pub fetched_bytes: u64,
    /// Bytes of all files. Of a web server, which cannot be listed, only of those that were begun.
    pub total_bytes: u64,
}

/// Gives the directory of the checkpoint at `source`. A directory of this machine is used in place; anything else is
/// downloaded into `cache_dir` once, and appears there whole or not at all. Without `expected_digest` (see
/// [`penstock_model::manifest_digest`]) a finished download is taken as it is, though the source may have changed;
/// with one it is used only if it has that digest, and is replaced otherwise.
///
/// Any number of calls and of processes may share a `cache_dir`; one downloads, the others wait. Dropping the future
/// removes what was unfinished.
///
/// # Errors
/// See [`FetchError`]; the cache then holds what it held before.
pub async fn fetch(
    source: &Source,
    config: &SourceConfig,
    cache_dir: &Path,
    expected_digest: Option<&str>,
    progress: &(dyn Fn(FetchProgress) + Send + Sync),
) -> Result<PathBuf, FetchError> {
    let uri = source.to_string();
    if let Place::Directory(path) = &source.place {
        if !path.is_dir() {
            return Err(FetchError::NoDirectory { path: path.clone() });
        }
        check(&uri, path, expected_digest).await?;
        return Ok(path.clone());
    }
    let home = cache_dir.join(&blake3::hash(uri.as_bytes()).to_hex()[..32]);
    tokio::fs::create_dir_all(&home)
        .await
        .map_err(FetchError::write(&home))?;
    let _lock = lock(&home).await?;
    remove_unfinished(&home).map_err(FetchError::write(&home))?;
    let finished = home.join(FINISHED);
    if finished.is_dir() {
        match check(&uri, &finished, expected_digest).await {
            Ok(()) => return Ok(finished),
            Err(error) => tracing::info!(uri, %error, "the cached checkpoint is not the published one"),
        }
    }
    let partial = Partial::create(&home)?;
    download(source, config, &uri, &partial.path, progress).await?;
    check(&uri, &partial.path, expected_digest).await?;
    partial.publish(&finished)?;
    Ok(finished)
}

/// Downloads all files of the checkpoint into `dir`.
async fn download(
    source: &Source,
    config: &SourceConfig,
    uri: &str,
    dir: &Path,
    progress: &(dyn Fn(FetchProgress) + Send + Sync),
) -> Result<(), FetchError> {
    let mut remote = Remote::new(&source.place, config).map_err(|source| FetchError::Client {
        uri: uri.to_owned(),
        source,
    })?;
    let listing = files::list(&mut remote, uri, config.retry_backoff).await?;
    let downloads = Downloads {
        remote: &remote,
        uri,
        dir,
        backoff: config.retry_backoff,
        tally: Tally::new(progress),
    };
    let wanted = files::wanted(&downloads, source.gguf.as_deref(), &listing).await?;
    downloads
        .tally
        .expect(wanted.iter().filter_map(|file| file.size).sum());
    downloads.tally.report();
    // Gathered first, as the future would not be `Send` over a closure that borrows.
    let jobs: Vec<_> = wanted.into_iter().map(|file| one(&downloads, file)).collect();
    stream::iter(jobs)
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await?;
    downloads.tally.report();
    Ok(())
}

async fn one(downloads: &Downloads<'_>, file: Wanted) -> Result<(), FetchError> {
    if !file.required {
        return downloads.optional(&file.name, file.size).await.map(drop);
    }
    match downloads.file(&file.name, file.size).await {
        Err(FetchError::Download {
            uri,
            file,
            source: RemoteError::NotFound,
        }) => Err(FetchError::Missing { uri, file }),
        result => result,
    }
}

/// Compares the digest of the checkpoint in `dir` with the one that was published, if one was.
async fn check(uri: &str, dir: &Path, expected: Option<&str>) -> Result<(), FetchError> {
    let Some(expected) = expected else {
        return Ok(());
    };
    let hashed = dir.to_owned();
    // Gigabytes are read, so the runtime's threads are left alone.
    let actual = tokio::task::spawn_blocking(move || penstock_model::manifest_digest(&hashed)).await;
    let actual = actual
        .map_err(|error| FetchError::Hashing(error.to_string()))?
        .map_err(|source| FetchError::Unreadable {
            uri: uri.to_owned(),
            source,
        })?;
    if actual == expected {
        return Ok(());
    }
    Err(FetchError::Digest {
        uri: uri.to_owned(),
        expected: expected.to_owned(),
        actual,
    })
}

/// Waits until no other call and no other process downloads into `home`. The lock ends with the file.
async fn lock(home: &Path) -> Result<File, FetchError> {
    let path = home.join(".lock");
    let file = File::create(&path).map_err(FetchError::write(&path))?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_INTERVAL).await,
            Err(TryLockError::Error(error)) => return Err(FetchError::write(&path)(error)),
        }
    }
}

/// Removes what a process that crashed left. The lock must be held, as another's download looks the same.
fn remove_unfinished(home: &Path) -> io::Result<()> {
    for entry in fs::read_dir(home)? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PARTIAL.as_bytes())
        {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// A directory that is removed unless it is published.
struct Partial {
    path: PathBuf,
}

// === impl Partial ===

impl Partial {
    fn create(home: &Path) -> Result<Self, FetchError> {
        let path = home.join(format!("{PARTIAL}{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&path).map_err(FetchError::write(&path))?;
        Ok(Self { path })
    }

    /// Makes this directory, whose files are durable, the finished one. What was finished before is removed; an
    /// engine that has mapped its files keeps them until it lets go.
    fn publish(&self, finished: &Path) -> Result<(), FetchError> {
        let error = || FetchError::write(finished);
        sync_dir(&self.path).map_err(FetchError::write(&self.path))?;
        let old = self.path.with_extension("old");
        if finished.exists() {
            fs::rename(finished, &old).map_err(error())?;
        }
        fs::rename(&self.path, finished).map_err(error())?;
        if let Some(home) = finished.parent() {
            sync_dir(home).map_err(FetchError::write(home))?;
        }
        // What stays now is removed by the next call.
        let _ = fs::remove_dir_all(old);
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // It is gone if it was published; if it cannot be removed, the next call tries again.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Makes the names in a directory durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
