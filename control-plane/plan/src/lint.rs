//! Checking a plan before it is applied.
//!
//! A finding has a stable code, the path of the value and its line. An error keeps the plan from being applied; a
//! warning is told. What can be applied but cannot do what it says, such as a rule that no request reaches or a hold
//! in which no metric could speak, is an error too.

use crate::{Manifest, parse::Lines};

mod holds;
mod metrics;
mod plan;
mod rules;
mod steps;

pub(crate) use holds::{Sight, median, sights, span};

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

/// Checks a plan. The findings are in the order of their lines.
pub fn lint(manifest: &Manifest, lines: &Lines, context: &LintContext) -> Vec<Finding> {
    let mut report = Report {
        lines,
        findings: Vec::new(),
    };
    plan::check(manifest, &mut report);
    rules::check(manifest, &mut report);
    steps::check(manifest, &mut report);
    metrics::check(manifest, &mut report);
    holds::check(manifest, context, &mut report);
    let mut findings = report.findings;
    findings.sort_by_key(|finding| finding.line);
    findings
}

/// What is found, as it is found.
struct Report<'a> {
    lines: &'a Lines,
    findings: Vec<Finding>,
}

// === impl Report ===

impl Report<'_> {
    fn error(&mut self, path: impl Into<String>, code: &'static str, message: impl Into<String>) {
        self.add(Severity::Error, path.into(), code, message.into());
    }

    fn warning(&mut self, path: impl Into<String>, code: &'static str, message: impl Into<String>) {
        self.add(Severity::Warning, path.into(), code, message.into());
    }

    fn add(&mut self, severity: Severity, path: String, code: &'static str, message: String) {
        self.findings.push(Finding {
            severity,
            line: self.lines.line(&path),
            path,
            code,
            message,
        });
    }
}

#[cfg(test)]
mod tests;
