//! Reading a plan from YAML or JSON.
//!
//! A text is read twice: once for its shape, which gives every value its line and refuses what a plan has no use
//! for, and once for its meaning. After an error the offending value is left out and the rest is read again, so
//! that an operator is told of all that is wrong at once.

use std::{collections::BTreeMap, fmt::Write as _};

use crate::{
    Manifest,
    lint::{Finding, Severity},
};

mod document;
mod repair;

use document::{Document, Node};

/// Longest text that is read, in bytes.
const LONGEST: usize = 1 << 20;

/// Where each path of a manifest stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lines(BTreeMap<String, u32>);

// === impl Lines ===

impl Lines {
    /// The line of a path such as `match[2].priority`, from 1; of what holds it, where the path itself is not
    /// written; 0 where nothing is known.
    pub fn line(&self, path: &str) -> u32 {
        let mut path = path;
        loop {
            if let Some(line) = self.0.get(path) {
                return *line;
            }
            if path.is_empty() {
                return 0;
            }
            path = &path[..path.rfind(['.', '[']).unwrap_or(0)];
        }
    }
}

/// Reads a plan.
///
/// # Errors
/// It is no YAML, or no plan: what is wrong, where.
pub fn parse(text: &str) -> Result<(Manifest, Lines), Vec<Finding>> {
    if text.len() > LONGEST {
        let message = format!("{} bytes are too many: a plan has at most {LONGEST}", text.len());
        return Err(vec![finding("", 0, "too-large", message)]);
    }
    let Document { root, lines } = Document::read(text)?;
    match read(text) {
        Ok(manifest) => Ok((manifest, lines)),
        Err((path, message)) => {
            let mut findings = repair::findings(root, &lines);
            if findings.is_empty() {
                findings.push(finding(&path, lines.line(&path), "unreadable", message));
            }
            Err(findings)
        }
    }
}

/// Reads the meaning; the path and the reason where it has none.
fn read(text: &str) -> Result<Manifest, (String, String)> {
    let read = serde_path_to_error::deserialize(serde_norway::Deserializer::from_str(text));
    read.map_err(|error| {
        let path = match error.path().to_string() {
            root if root == "." => String::new(),
            path => path,
        };
        let message = bare(&error.inner().to_string());
        (path, message)
    })
}

/// A message of the YAML reader without the path and the place that it adds.
fn bare(message: &str) -> String {
    let message = match message.rfind(" at line ") {
        Some(at) => &message[..at],
        None => message,
    };
    let path = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.-[]?".contains(&b))
    };
    match message.split_once(": ") {
        Some((before, after)) if path(before) && after.contains(' ') && !before.contains("--") => {
            after.to_owned()
        }
        _ => message.to_owned(),
    }
}

fn finding(path: &str, line: u32, code: &'static str, message: String) -> Finding {
    Finding {
        severity: Severity::Error,
        path: path.to_owned(),
        line,
        code,
        message,
    }
}

/// A path one level deeper.
fn field(path: &str, key: &str) -> String {
    match path {
        "" => key.to_owned(),
        _ => format!("{path}.{key}"),
    }
}

/// A path to an item.
fn item(path: &str, index: usize) -> String {
    let mut path = path.to_owned();
    // Writing to a string cannot fail.
    let _ = write!(path, "[{index}]");
    path
}

#[cfg(test)]
mod tests;
