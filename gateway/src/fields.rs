//! Reading JSON requests field by field, so that whatever is wrong is named. `null` counts as absent.

use serde_json::{Map, Value};
use tonic::Status;

use crate::error::bad_request;

/// An object of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'v>(&'v Map<String, Value>);

/// Reads a body.
pub(crate) fn parse(body: &[u8]) -> Result<Value, Status> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Status::invalid_argument(format!("the body is not JSON: {error}")))?;
    match value.is_object() {
        true => Ok(value),
        false => Err(Status::invalid_argument("the body is not a JSON object")),
    }
}

impl<'v> Fields<'v> {
    /// The fields of `map`.
    pub(crate) fn new(map: &'v Map<String, Value>) -> Self {
        Self(map)
    }

    /// The fields of `value`, if it is an object.
    pub(crate) fn of(value: &'v Value) -> Option<Self> {
        value.as_object().map(Self)
    }

    /// A field that is there.
    pub(crate) fn get(self, name: &str) -> Option<&'v Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn text(self, name: &str) -> Result<Option<&'v str>, Status> {
        self.read(name, "must be a string", Value::as_str)
    }

    pub(crate) fn flag(self, name: &str) -> Result<bool, Status> {
        Ok(self
            .read(name, "must be true or false", Value::as_bool)?
            .unwrap_or(false))
    }

    /// A number. One that 32 bits cannot hold becomes infinite, which no parameter may be.
    pub(crate) fn number(self, name: &str) -> Result<Option<f32>, Status> {
        self.read(name, "must be a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    /// A whole number between `least` and `most`.
    pub(crate) fn integer(self, name: &str, least: u32, most: u32) -> Result<Option<u32>, Status> {
        let why = match most {
            u32::MAX => format!("must be a whole number of at least {least}"),
            most => format!("must be a whole number from {least} to {most}"),
        };
        self.read(name, &why, |value| {
            value
                .as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .filter(|n| (least..=most).contains(n))
        })
    }

    pub(crate) fn signed(self, name: &str, least: i32, most: i32) -> Result<Option<i32>, Status> {
        let why = format!("must be a whole number from {least} to {most}");
        self.read(name, &why, |value| {
            value
                .as_i64()
                .and_then(|n| i32::try_from(n).ok())
                .filter(|n| (least..=most).contains(n))
        })
    }

    pub(crate) fn object(self, name: &str) -> Result<Option<Fields<'v>>, Status> {
        self.read(name, "must be an object", Fields::of)
    }

    pub(crate) fn list(self, name: &str) -> Result<Option<&'v Vec<Value>>, Status> {
        self.read(name, "must be a list", Value::as_array)
    }

    /// Any 64-bit integer; a negative one counts as its two's complement.
    pub(crate) fn seed(self, name: &str) -> Result<Option<u64>, Status> {
        self.read(name, "must be a whole number of 64 bits", |value| {
            value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned))
        })
    }

    /// A string or a list of at most `most` strings.
    pub(crate) fn texts(self, name: &str, most: usize) -> Result<Vec<String>, Status> {
        let why = format!("must be a string or a list of up to {most} strings");
        let texts = self.read(name, &why, |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) if list.len() <= most => {
                list.iter().map(|text| text.as_str().map(str::to_owned)).collect()
            }
            _ => None,
        })?;
        Ok(texts.unwrap_or_default())
    }

    /// Token ids.
    pub(crate) fn ids(self, name: &str) -> Result<Option<Vec<u32>>, Status> {
        self.read(name, "must be a list of token ids", ids)
    }

    /// Refuses a field unless `harmless` says that its value asks for nothing.
    pub(crate) fn refuse(self, name: &str, harmless: impl FnOnce(&Value) -> bool) -> Result<(), Status> {
        match self.get(name) {
            Some(value) if !harmless(value) => Err(bad_request(
                name,
                "is not supported with this value: leave it out",
            )),
            _ => Ok(()),
        }
    }

    fn read<T>(
        self,
        name: &str,
        why: &str,
        read: impl FnOnce(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, Status> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        read(value)
            .map(Some)
            .ok_or_else(|| bad_request(name, format!("{why}, not {}", brief(value))))
    }
}

/// Token ids of a list.
pub(crate) fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    value.as_array()?.iter().map(id).collect()
}

/// True for `[]`, `{}` and `""`.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// A value for a message to a person.
fn brief(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
