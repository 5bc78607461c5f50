//! JSON pointers, and what `$ref` refers to.

use serde_json::Value;

use crate::error::GrammarError;

/// `pointer` with one more step.
pub(super) fn step(pointer: &str, name: &str) -> String {
    format!("{pointer}/{}", name.replace('~', "~0").replace('/', "~1"))
}

/// The pointer that `reference`, found at `pointer`, stands for in the document `root`.
///
/// # Errors
/// A reference out of the document, or to nothing in it.
pub(super) fn resolve(root: &Value, reference: &str, pointer: &str) -> Result<String, GrammarError> {
    let fail = |message: String| GrammarError::InvalidKeyword {
        keyword: "$ref".into(),
        pointer: pointer.into(),
        message,
    };
    let own = root
        .get("$id")
        .and_then(Value::as_str)
        .map(|id| id.trim_end_matches('#'));
    let fragment = match reference.split_once('#') {
        Some((base, fragment)) if base.is_empty() || Some(base) == own => fragment,
        None if Some(reference) == own => "",
        _ => {
            return Err(GrammarError::Unsupported {
                keyword: "$ref".into(),
                pointer: pointer.into(),
                remedy: format!(
                    "{reference:?} is outside the schema; put it into $defs and refer to it by #/$defs/…"
                ),
            });
        }
    };
    let fragment = unescape(fragment).ok_or_else(|| fail(format!("{reference:?} is not a URI")))?;
    let target = match fragment.starts_with('/') || fragment.is_empty() {
        true => root.pointer(&fragment).map(|_| fragment),
        false => anchor(root, "", &fragment),
    };
    target.ok_or_else(|| fail(format!("{reference:?} refers to nothing in the schema")))
}

/// `%41` for `A`.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok()
}

/// Where `$anchor` is `name`.
fn anchor(value: &Value, pointer: &str, name: &str) -> Option<String> {
    let is_here = |value: &Value| value.get("$anchor").and_then(Value::as_str) == Some(name);
    walk(value, pointer, &is_here)
}

/// The first place of a schema that has `keyword`.
pub(super) fn pointer_to(value: &Value, keyword: &str) -> Option<String> {
    walk(value, "", &|value| value.get(keyword).is_some()).map(|pointer| step(&pointer, keyword))
}

/// The first place, parents before children, where `is_here`.
fn walk(value: &Value, pointer: &str, is_here: &dyn Fn(&Value) -> bool) -> Option<String> {
    if is_here(value) {
        return Some(pointer.to_owned());
    }
    match value {
        Value::Object(members) => members
            .iter()
            .find_map(|(name, value)| walk(value, &step(pointer, name), is_here)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(index, value)| walk(value, &step(pointer, &index.to_string()), is_here)),
        _ => None,
    }
}
