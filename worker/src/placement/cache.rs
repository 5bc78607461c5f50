//! The last placement on disk, so that a worker that restarts serves it without a control plane.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use penstock_proto::v1;
use prost::Message as _;

/// Where a worker keeps its placement.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    path: PathBuf,
}

/// Why a placement cannot be kept or found again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a worker's placement: move it away", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: prost::DecodeError,
    },
}

// === impl Cache ===

impl Cache {
    /// In `directory`, for the worker `id` alone.
    pub(crate) fn new(directory: &Path, id: &str) -> Self {
        Self {
            path: directory.join(format!("placement-{id}.pb")),
        }
    }

    /// What was kept last, if anything.
    pub(crate) fn load(&self) -> Result<Option<v1::Placement>, CacheError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io(error)),
        };
        let placement = v1::Placement::decode(&*bytes).map_err(|source| CacheError::Unreadable {
            path: self.path.clone(),
            source,
        })?;
        Ok(Some(placement))
    }

    /// Keeps a placement. Whatever happens, the file holds this one or the one before, whole.
    pub(crate) fn save(&self, placement: &v1::Placement) -> Result<(), CacheError> {
        let next = self.path.with_extension("next");
        let write = || {
            if let Some(directory) = self.path.parent() {
                fs::create_dir_all(directory)?;
            }
            let mut file = File::create(&next)?;
            file.write_all(&placement.encode_to_vec())?;
            file.sync_all()?;
            fs::rename(&next, &self.path)?;
            // The rename itself lasts only once the directory is on disk.
            match self.path.parent() {
                Some(directory) => File::open(directory)?.sync_all(),
                None => Ok(()),
            }
        };
        write().map_err(|error| self.io(error))
    }

    fn io(&self, source: io::Error) -> CacheError {
        CacheError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(version: u64) -> v1::Placement {
        v1::Placement {
            version,
            ..Default::default()
        }
    }

    #[test]
    fn the_last_placement_is_found_again_by_its_worker_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let cache = Cache::new(&path, "worker-1");
        assert_eq!(cache.load().unwrap(), None);
        cache.save(&placement(1)).unwrap();
        cache.save(&placement(2)).unwrap();
        assert_eq!(cache.load().unwrap(), Some(placement(2)));
        assert_eq!(Cache::new(&path, "worker-2").load().unwrap(), None);
    }

    #[test]
    fn a_file_that_is_no_placement_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path(), "w");
        fs::write(directory.path().join("placement-w.pb"), [0xFF; 9]).unwrap();
        assert!(cache.load().unwrap_err().to_string().contains("placement-w.pb"));
    }
}
