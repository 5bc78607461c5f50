//! One file, over a connection that may break.

use std::{
    io::SeekFrom,
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::{
    fs::File,
    io::{AsyncSeekExt, AsyncWriteExt, BufWriter},
    time::{sleep, timeout},
};

use super::{
    FetchError, FetchProgress, RemoteError,
    remote::{Body, Remote, Resume},
};

/// Retries of one request after failures that may pass.
const RETRIES: u32 = 3;
/// No wait between retries is longer.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// A server that sends nothing for so long has failed.
const STALL: Duration = Duration::from_secs(60);
/// Bytes that are gathered before they are written.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// The observer is told about every so many bytes.
const REPORT_BYTES: u64 = 1 << 20;

/// What the downloads of one checkpoint share.
pub(super) struct Downloads<'a> {
    pub remote: &'a Remote,
    /// The source, for messages.
    pub uri: &'a str,
    /// Where the files go.
    pub dir: &'a Path,
    /// The wait before the first retry, at most.
    pub backoff: Duration,
    pub tally: Tally<'a>,
}

/// Counts bytes and tells the observer.
pub(super) struct Tally<'a> {
    observer: &'a (dyn Fn(FetchProgress) + Send + Sync),
    fetched: AtomicU64,
    total: AtomicU64,
}

/// A file that is being written.
struct Part<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    written: u64,
    /// Tag of the content that was written.
    etag: Option<String>,
}

/// The retries of one request.
pub(super) struct Retries {
    backoff: Duration,
    made: u32,
}

/// Why an attempt failed.
enum Failure {
    Remote(RemoteError),
    /// Trying again does not help.
    Write(Box<FetchError>),
}

// === impl Downloads ===

impl Downloads<'_> {
    /// Downloads the file `name`, and makes it durable. `listed` is its size in bytes where a listing told and the
    /// tally counted it.
    ///
    /// # Errors
    /// [`FetchError::Download`] and [`FetchError::Write`].
    pub(super) async fn file(&self, name: &str, listed: Option<u64>) -> Result<(), FetchError> {
        let path = &self.dir.join(name);
        let mut part = Part::create(path).await?;
        let mut size = listed;
        let mut retries = Retries::new(self.backoff);
        while let Err(failure) = self.attempt(&mut part, name, &mut size).await {
            let source = match failure {
                Failure::Write(error) => return Err(*error),
                Failure::Remote(source) => source,
            };
            if !retries.again(&source).await {
                return Err(FetchError::Download {
                    uri: self.uri.to_owned(),
                    file: name.to_owned(),
                    source,
                });
            }
            tracing::debug!(uri = self.uri, file = name, error = %source, "the download broke, trying again");
        }
        part.finish().await
    }

    /// Like [`Downloads::file`], but gives `false` for a file that is not there.
    pub(super) async fn optional(&self, name: &str, listed: Option<u64>) -> Result<bool, FetchError> {
        match self.file(name, listed).await {
            Ok(()) => Ok(true),
            Err(FetchError::Download { source, .. }) if self.remote.is_absent(&source) => {
                let path = self.dir.join(name);
                let removed = tokio::fs::remove_file(&path).await;
                removed.map(|()| false).map_err(FetchError::write(&path))
            }
            Err(error) => Err(error),
        }
    }

    /// Reads from where `part` ends to the end of the file. `size` is what is known of the file's size.
    async fn attempt(&self, part: &mut Part<'_>, name: &str, size: &mut Option<u64>) -> Result<(), Failure> {
        let resume = part.etag.as_deref().map(|etag| Resume {
            offset: part.written,
            etag,
        });
        let resume = resume.filter(|resume| resume.offset > 0);
        let mut body = patient(self.remote.open(name, resume)).await?;
        if body.offset != part.written {
            self.tally.fetched.fetch_sub(part.written, Relaxed);
            part.restart().await?;
        }
        self.expect(size, &body)?;
        part.etag = body.etag.take();
        while let Some(bytes) = patient(async { body.stream.next().await.transpose() }).await? {
            part.write(&bytes).await?;
            self.tally.add(bytes.len() as u64);
        }
        match *size {
            Some(size) if size != part.written => Err(part.mismatch(size)),
            _ => Ok(()),
        }
    }

    /// Notes the size that the server told, which cannot be another one than it or a listing told before.
    fn expect(&self, size: &mut Option<u64>, body: &Body) -> Result<(), Failure> {
        match (*size, body.size) {
            (Some(known), Some(told)) if known != told => Err(Failure::Remote(RemoteError::Size {
                got: told,
                size: known,
            })),
            (None, Some(told)) => {
                *size = Some(told);
                self.tally.expect(told);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

// === impl Tally ===

impl<'a> Tally<'a> {
    pub(super) fn new(observer: &'a (dyn Fn(FetchProgress) + Send + Sync)) -> Self {
        Self {
            observer,
            fetched: AtomicU64::new(0),
            total: AtomicU64::new(0),
        }
    }

    /// Adds to what will come.
    pub(super) fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Relaxed);
    }

    /// Adds to what has come.
    fn add(&self, bytes: u64) {
        let before = self.fetched.fetch_add(bytes, Relaxed);
        if before / REPORT_BYTES != (before + bytes) / REPORT_BYTES {
            self.report();
        }
    }

    pub(super) fn report(&self) {
        (self.observer)(FetchProgress {
            fetched_bytes: self.fetched.load(Relaxed),
            total_bytes: self.total.load(Relaxed),
        });
    }
}

// === impl Part ===

impl<'a> Part<'a> {
    async fn create(path: &'a Path) -> Result<Self, FetchError> {
        let file = File::create(path).await.map_err(FetchError::write(path))?;
        Ok(Self {
            path,
            file: BufWriter::with_capacity(WRITE_BUFFER_BYTES, file),
            written: 0,
            etag: None,
        })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), FetchError> {
        let written = self.file.write_all(bytes).await;
        written.map_err(FetchError::write(self.path))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Empties the file.
    async fn restart(&mut self) -> Result<(), FetchError> {
        let error = || FetchError::write(self.path);
        // Seeking flushes first, so the truncation comes last.
        self.file.seek(SeekFrom::Start(0)).await.map_err(error())?;
        self.file.get_mut().set_len(0).await.map_err(error())?;
        self.written = 0;
        Ok(())
    }

    /// The failure of a file that did not become `size` bytes long.
    fn mismatch(&mut self, size: u64) -> Failure {
        if self.written > size {
            // There is no going on from here.
            self.etag = None;
        }
        Failure::Remote(RemoteError::Size {
            got: self.written,
            size,
        })
    }

    async fn finish(mut self) -> Result<(), FetchError> {
        let error = || FetchError::write(self.path);
        self.file.flush().await.map_err(error())?;
        self.file.get_ref().sync_all().await.map_err(error())
    }
}

// === impl Retries ===

impl Retries {
    pub(super) fn new(backoff: Duration) -> Self {
        Self { backoff, made: 0 }
    }

    /// Waits, and says whether to try again after `error`.
    pub(super) async fn again(&mut self, error: &RemoteError) -> bool {
        if self.made == RETRIES || !error.is_retryable() {
            return false;
        }
        sleep(full_jitter(self.backoff, self.made)).await;
        self.made += 1;
        true
    }
}

// === impl Failure ===

impl From<RemoteError> for Failure {
    fn from(error: RemoteError) -> Self {
        Self::Remote(error)
    }
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Write(Box::new(error))
    }
}

/// Waits for a server, but not for ever.
pub(super) async fn patient<T>(
    future: impl Future<Output = Result<T, RemoteError>>,
) -> Result<T, RemoteError> {
    let stalled = || RemoteError::Stalled {
        seconds: STALL.as_secs(),
    };
    timeout(STALL, future).await.unwrap_or_else(|_| Err(stalled()))
}

/// Any time up to an exponential bound, so that workers which failed together do not come back together
/// (<https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>).
fn full_jitter(backoff: Duration, retries: u32) -> Duration {
    let bound = backoff.saturating_mul(1 << retries).min(MAX_BACKOFF);
    bound.mul_f64(rand::random::<f64>())
}
