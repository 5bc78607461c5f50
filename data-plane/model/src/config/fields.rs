//! Reading fields of a JSON object with errors that name them.

use std::path::Path;

use serde_json::{Map, Value};

use crate::LoadError;

/// A JSON object of a file. A field that is `null` counts as absent, as in transformers.
pub(super) struct Fields<'a> {
    path: &'a Path,
    prefix: &'a str,
    object: &'a Map<String, Value>,
}

/// Reads a file that holds one JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, LoadError> {
    let read = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    let text = std::fs::read(path).map_err(read)?;
    let json = |source| LoadError::Json {
        path: path.to_owned(),
        source,
    };
    serde_json::from_slice(&text).map_err(json)
}

// === impl Fields ===

impl<'a> Fields<'a> {
    /// The fields of `object`, which is the field `prefix` of the file (or all of it).
    pub(super) fn new(path: &'a Path, prefix: &'a str, object: &'a Map<String, Value>) -> Self {
        Self { path, prefix, object }
    }

    pub(super) fn path(&self) -> &Path {
        self.path
    }

    pub(super) fn error(&self, field: &str, problem: impl Into<String>) -> LoadError {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        let field = format!("{}{dot}{field}", self.prefix);
        LoadError::Field {
            path: self.path.to_owned(),
            field,
            problem: problem.into(),
        }
    }

    pub(super) fn raw(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is not there at all, not even as `null`.
    pub(super) fn is_absent(&self, field: &str) -> bool {
        !self.object.contains_key(field)
    }

    pub(super) fn object(&self, field: &'static str) -> Result<Option<Fields<'a>>, LoadError> {
        match self.raw(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields::new(self.path, field, object))),
            Some(_) => Err(self.error(field, "must be an object")),
        }
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>, LoadError> {
        match self.raw(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => Err(self.error(field, format!("is {value}; it must be true or false"))),
        }
    }

    /// A whole number from 1 to `most`.
    pub(super) fn size(&self, field: &str, most: usize) -> Result<usize, LoadError> {
        self.optional_size(field, most)?
            .ok_or_else(|| self.error(field, "is missing"))
    }

    /// A whole number from 1 to `most`, if it is there.
    pub(super) fn optional_size(&self, field: &str, most: usize) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.raw(field) else {
            return Ok(None);
        };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size.filter(|&size| (1..=most).contains(&size)) {
            Some(size) => Ok(Some(size)),
            None => Err(self.error(
                field,
                format!("is {value}; it must be a whole number from 1 to {most}"),
            )),
        }
    }

    /// A finite number above 0.
    pub(super) fn required_positive(&self, field: &str) -> Result<f32, LoadError> {
        self.positive(field)?
            .ok_or_else(|| self.error(field, "is missing"))
    }

    /// A finite number above 0, if it is there.
    pub(super) fn positive(&self, field: &str) -> Result<Option<f32>, LoadError> {
        let Some(value) = self.raw(field) else {
            return Ok(None);
        };
        // Narrowing is meant: transformers computes in f32 as well.
        let number = value.as_f64().map(|number| number as f32);
        match number.filter(|number| number.is_finite() && *number > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(field, format!("is {value}; it must be a number above 0"))),
        }
    }
}
