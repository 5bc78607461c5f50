//! Checks a Lark grammar before llguidance reads it.

use crate::{error::GrammarError, schema};

/// Deeper brackets would take llguidance's recursive parser too far down the stack.
const DEEPEST: usize = 128;

/// The grammar, with each schema in it (`%json {…}`) checked and written anew as [`schema::prepare`] does.
///
/// # Errors
/// Brackets nested too deeply, and what schemas are refused for.
pub(crate) fn prepare(text: &str) -> Result<String, GrammarError> {
    let mut written = String::with_capacity(text.len());
    let mut rest = text;
    let mut depth = 0_usize;
    while let Some(next) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("%json") {
            let mut values = serde_json::Deserializer::from_str(after).into_iter::<serde_json::Value>();
            if let Some(Ok(value)) = values.next() {
                rest = &after[values.byte_offset()..];
                written.push_str("%json ");
                written.push_str(&schema::prepare_value(&value)?.to_string());
                continue;
            }
        }
        let taken = match next {
            '"' | '\'' => quoted(rest, next),
            '/' if rest.starts_with("//") => line(rest),
            '/' => quoted(rest, '/'),
            '#' => line(rest),
            '(' | '[' | '{' => {
                depth += 1;
                if depth > DEEPEST {
                    return Err(GrammarError::TooComplex {
                        message: format!("its brackets are nested more than {DEEPEST} deep"),
                    });
                }
                1
            }
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                1
            }
            next => next.len_utf8(),
        };
        written.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    Ok(written)
}

/// Bytes of the literal that `text` begins with, or of its first line where it never ends.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (index, character) in text.char_indices().skip(1) {
        match character {
            '\n' => return index,
            '\\' if !escaped => escaped = true,
            character if character == quote && !escaped => return index + character.len_utf8(),
            _ => escaped = false,
        }
    }
    text.len()
}

/// Bytes up to the end of the line.
fn line(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}
