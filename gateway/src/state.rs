//! The last good view on disk, so that a gateway serves without a control plane.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use penstock_client::View;
use penstock_plan::{EndpointSet, Snapshot, SnapshotError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Name of the file in the state directory.
const FILE: &str = "view.json";

/// A directory that holds the view.
#[derive(Debug, Clone)]
pub(crate) struct StateDir(PathBuf);

/// Why the state cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The directory or the file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not what a gateway wrote.
    #[error("{path} is not a gateway's state ({source}): move it away, and the gateway starts without")]
    Json {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The snapshot in it makes no sense.
    #[error(
        "{path} holds a snapshot that cannot be served ({source}): move it away, and the gateway starts without"
    )]
    Snapshot {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: SnapshotError,
    },
}

#[derive(Serialize)]
struct Written<'v> {
    snapshot: Option<&'v Snapshot>,
    endpoints: &'v EndpointSet,
}

#[derive(Deserialize)]
struct Read {
    snapshot: Option<Snapshot>,
    endpoints: EndpointSet,
}

impl StateDir {
    /// Opens the directory, which is made if need be.
    pub(crate) fn open(path: &Path) -> Result<Self, StateError> {
        fs::create_dir_all(path).map_err(io_error(path))?;
        Ok(Self(path.to_owned()))
    }

    /// What was saved last; nothing in a new directory.
    pub(crate) fn load(&self) -> Result<View, StateError> {
        let path = self.0.join(FILE);
        let Some(read) = self.read::<Read>(FILE)? else {
            return Ok(View::default());
        };
        if let Some(snapshot) = &read.snapshot {
            snapshot
                .validate()
                .map_err(|source| StateError::Snapshot { path, source })?;
        }
        Ok(View {
            snapshot: read.snapshot.map(Arc::new),
            endpoints: Arc::new(read.endpoints),
            connected: false,
        })
    }

    /// Saves a view.
    pub(crate) fn save(&self, view: &View) -> Result<(), StateError> {
        let written = Written {
            snapshot: view.snapshot.as_deref(),
            endpoints: &view.endpoints,
        };
        self.write(FILE, &written)
    }

    /// What a file holds; nothing if there is none.
    pub(crate) fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.0.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(&path)(error)),
        };
        serde_json::from_slice(&text).map_err(|source| StateError::Json { path, source })
    }

    /// Writes a file. Whatever happens, it holds this or what it held before, whole.
    pub(crate) fn write(&self, name: &str, value: &impl Serialize) -> Result<(), StateError> {
        let (path, next) = (self.0.join(name), self.0.join(format!("{name}.next")));
        let text = serde_json::to_vec_pretty(value).map_err(|source| StateError::Json {
            path: next.clone(),
            source,
        })?;
        let write = || {
            let mut file = File::create(&next)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&next, &path)?;
            File::open(&self.0)?.sync_all()
        };
        write().map_err(io_error(&next))
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { path, source }
}
