//! Files as slices of memory.

use std::{fs::File, io, ops::Deref, path::Path};

/// A file mapped read-only. Whoever shortens the file while it is mapped makes reads past its new end fault, so
/// hold one only while a checkpoint is being read.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// It cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the mapping is private and read-only. That nobody changes the file meanwhile cannot be enforced;
        // checkpoints are immutable once published, and every reader here treats the bytes as plain numbers.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        // Files are read once, from the start to the end; failing advice costs only speed.
        let _ = map.advise(memmap2::Advice::Sequential);
        Ok(Self(map))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
