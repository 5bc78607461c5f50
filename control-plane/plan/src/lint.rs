//! Checking a plan before it is applied.

use crate::{Manifest, parse::Lines};

/// Whether a finding keeps the plan from being applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// It does.
    Error,
    /// It is told, and nothing else.
    Warning,
}

/// Something that is wrong with a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// E.g. `match[2].priority`.
    pub path: String,
    /// Line of the manifest, from 1; 0 where it is not known.
    pub line: u32,
    /// Stable name of the rule.
    pub code: &'static str,
    /// What is wrong, with the bad value and the remedy.
    pub message: String,
}

/// What is known beside the plan.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LintContext {
    /// Requests a second of the model.
    pub requests_per_second: Option<f64>,
}

/// Checks a plan.
pub fn lint(manifest: &Manifest, lines: &Lines, _: &LintContext) -> Vec<Finding> {
    let alpha = manifest.analysis.alpha;
    let mut findings = Vec::new();
    if !(alpha > 0.0 && alpha <= 0.5) {
        findings.push(Finding {
            severity: Severity::Error,
            path: "analysis.alpha".into(),
            line: lines.line("analysis.alpha"),
            code: "bad-alpha",
            message: format!("{alpha} is no level of a test: write a number above 0 and up to 0.5"),
        });
    }
    findings
}
