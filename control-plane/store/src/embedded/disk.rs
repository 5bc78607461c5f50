//! The redb file behind the embedded store.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableError};

use super::OpenError;
use crate::{Entry, Key, StoreError};

const FILE: &str = "penstock.redb";
/// Key → create revision, mod revision, value.
const ENTRIES: TableDefinition<'_, &str, (u64, u64, &[u8])> = TableDefinition::new("entries");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";

/// An entry as it lies on disk.
pub(super) struct Stored {
    pub(super) create_revision: u64,
    pub(super) mod_revision: u64,
    pub(super) value: Bytes,
}

/// The file.
pub(super) struct Disk(Database);

impl Disk {
    /// Opens or creates the file; returns the revision and the entries in it.
    pub(super) fn open(directory: &Path) -> Result<(Self, u64, BTreeMap<String, Entry>), OpenError> {
        let path = directory.join(FILE);
        let unreadable = |reason: String| OpenError::Unreadable {
            path: path.clone(),
            reason,
        };
        let open = || {
            let database = Database::create(&path).map_err(|error| match error {
                DatabaseError::DatabaseAlreadyOpen => OpenError::Locked(directory.to_owned()),
                other => unreadable(other.to_string()),
            })?;
            let disk = Self(database);
            let (revision, entries) = disk.read().map_err(|error| unreadable(error.to_string()))?;
            Ok((disk, revision, entries))
        };
        // redb takes for granted that its pages are whole: some damage makes it panic. Nothing outlives that.
        catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|_| Err(unreadable("it is damaged".into())))
    }

    fn read(&self) -> Result<(u64, BTreeMap<String, Entry>), Box<dyn std::error::Error>> {
        let transaction = self.0.begin_read()?;
        let revision = match transaction.open_table(META) {
            Ok(meta) => meta.get(REVISION)?.map_or(0, |value| value.value()),
            Err(TableError::TableDoesNotExist(_)) => return Ok((0, BTreeMap::new())),
            Err(error) => return Err(error.into()),
        };
        let mut entries = BTreeMap::new();
        for row in transaction.open_table(ENTRIES)?.iter()? {
            let (text, stored) = row?;
            let (create_revision, mod_revision, value) = stored.value();
            let key: Key = text.value().parse()?;
            let value = Bytes::copy_from_slice(value);
            let entry = Entry {
                key,
                value,
                mod_revision,
                create_revision,
                lease: None,
            };
            entries.insert(text.value().to_owned(), entry);
        }
        Ok((revision, entries))
    }

    /// Writes one transaction; it is on disk when this returns.
    pub(super) fn write(
        &self,
        revision: u64,
        changes: &[(String, Option<Stored>)],
    ) -> Result<(), StoreError> {
        self.try_write(revision, changes)
            .map_err(|error| StoreError::Failed(error.to_string()))
    }

    fn try_write(&self, revision: u64, changes: &[(String, Option<Stored>)]) -> Result<(), redb::Error> {
        let transaction = self.0.begin_write()?;
        {
            let mut entries = transaction.open_table(ENTRIES)?;
            for (key, change) in changes {
                match change {
                    Some(stored) => {
                        let row = (stored.create_revision, stored.mod_revision, stored.value.as_ref());
                        entries.insert(key.as_str(), row)?;
                    }
                    None => drop(entries.remove(key.as_str())?),
                }
            }
            transaction.open_table(META)?.insert(REVISION, revision)?;
        }
        transaction.commit()?;
        Ok(())
    }
}
