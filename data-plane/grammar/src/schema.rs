//! Reads a JSON schema, refuses what cannot be enforced, and writes what llguidance is to enforce.
//!
//! llguidance ignores keywords that it does not know; it takes the rest as draft 2020-12 has it. So the schema is
//! written anew, keyword by keyword, with nothing in it that is not understood. References are followed:
//! definitions that nothing refers to are not looked at.

use serde_json::{Map, Value};

use crate::{compiler::with_style, error::GrammarError};

mod keywords;
mod references;
mod rewrite;
mod spelling;

/// The schema that llguidance is to enforce.
///
/// # Errors
/// What is not JSON, not a schema, or not enforceable.
pub(crate) fn prepare(text: &str) -> Result<Value, GrammarError> {
    let schema: Value = serde_json::from_str(text).map_err(|error| GrammarError::NotJson {
        message: error.to_string(),
    })?;
    prepare_value(&schema)
}

/// As [`prepare`], of a schema that is parsed already.
pub(crate) fn prepare_value(schema: &Value) -> Result<Value, GrammarError> {
    rewrite::rewrite(schema).map(with_style)
}

/// Any JSON object.
pub(crate) fn object() -> Value {
    with_style(Map::from_iter([("type".to_owned(), "object".into())]))
}

/// Says where in the schema `text` the compiler's `message` may come from.
pub(crate) fn explain(text: &str, message: String) -> GrammarError {
    let keyword = match &message {
        message if message.contains("oneOf") => "oneOf",
        message if message.contains("min/maxProperties") => "maxProperties",
        message if message.contains("patternProp") => "patternProperties",
        _ => return GrammarError::Schema { message },
    };
    let schema = serde_json::from_str(text).unwrap_or(Value::Null);
    let remedy = match keyword {
        "oneOf" => {
            "its branches are not plainly disjoint; tell them apart by a required property with a const in \
             each, or use anyOf"
        }
        "maxProperties" => {
            "with optional properties only a bound of 1 can be enforced, and none beside patternProperties; make \
             them required"
        }
        _ => "its patterns must not overlap",
    };
    let others: &[&str] = match keyword {
        "maxProperties" => &["maxProperties", "minProperties"],
        "oneOf" => &["oneOf"],
        _ => &["patternProperties"],
    };
    let found = others
        .iter()
        .find_map(|keyword| Some((*keyword, references::pointer_to(&schema, keyword)?)));
    match found {
        Some((keyword, pointer)) => GrammarError::Unsupported {
            keyword: keyword.into(),
            pointer,
            remedy: remedy.into(),
        },
        None => GrammarError::Schema { message },
    }
}
