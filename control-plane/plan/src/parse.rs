//! Reading a plan from YAML or JSON.

use crate::{
    Manifest,
    lint::{Finding, Severity},
};

/// Where each path of a manifest stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lines;

impl Lines {
    /// The line of a path, from 1; 0 where it is not known.
    pub fn line(&self, _: &str) -> u32 {
        0
    }
}

/// Reads a plan.
///
/// # Errors
/// It is no YAML, or no plan: what is wrong, where.
pub fn parse(text: &str) -> Result<(Manifest, Lines), Vec<Finding>> {
    let read = serde_path_to_error::deserialize(serde_norway::Deserializer::from_str(text));
    read.map(|manifest| (manifest, Lines)).map_err(|error| {
        let line = error.inner().location().map_or(0, |at| at.line());
        vec![Finding {
            severity: Severity::Error,
            path: error.path().to_string(),
            line: u32::try_from(line).unwrap_or(u32::MAX),
            code: "unreadable",
            message: error.inner().to_string(),
        }]
    })
}
