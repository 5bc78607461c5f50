//! Plans in files: apply, diff and lint.

use super::Command;
use crate::{
    config::{Apply, Diff, Lint},
    conflict::{Asked, Seen, moved_on, unified},
    console::Console,
    converge::{Goal, Outcome},
    error::CtlError,
    output::{Format, View, emit},
};
use penstock_plan::{lint, parse};
use penstock_proto::v1::{self, ApplyRolloutRequest, ApplyRolloutResponse};
use serde::Serialize;
use std::{io::Read as _, path::Path};
use tokio::time::Instant;
use tonic::Code;

impl Command<'_> {
    pub(super) async fn apply(&mut self, args: Apply) -> Result<(), CtlError> {
        let Apply { file, change, expect } = args;
        let text = read(&file)?;
        let started = Instant::now();
        let request = ApplyRolloutRequest {
            manifest: text.clone(),
            expect_revision: expect.expect_revision,
            dry_run: change.dry_run,
            reason: change.reason.clone(),
            actor: change.actor.clone(),
        };
        let reply = match self.admin.rpc.apply_rollout(request).await {
            Ok(reply) => reply.into_inner(),
            Err(status) if status.code() == Code::Aborted => {
                return Err(self.overtaken(status, &text, expect.expect_revision).await);
            }
            Err(status) => return Err(self.admin.failed(status)),
        };
        let path = shown(&file);
        let findings = Findings::new(&path, &reply.findings);
        if !findings.findings.is_empty() {
            self.console.progress(findings.table().trim_end());
        }
        findings.refused()?;
        if change.dry_run {
            return self.would_apply(&path, &text, reply);
        }
        let written = reply
            .rollout
            .ok_or_else(|| self.admin.nonsense("an applied manifest without its rollout"))?;
        super::name_span(&written.model);
        let settled = match reply.outcome.as_str() {
            // The rollout that is there goes on, or makes way; what was asked for comes after it.
            "unchanged" | "queued" | "superseding" => Outcome::written(Goal::Followed, &written),
            _ => self.arrived(Goal::Followed, written, started, &change).await?,
        };
        let applied = Applied {
            outcome: reply.outcome,
            findings: findings.findings,
            rollout: settled,
        };
        emit(self.console, self.output, &applied)
    }

    /// The conflict that a lost compare-and-swap is.
    async fn overtaken(&mut self, status: tonic::Status, text: &str, expect: Option<u64>) -> CtlError {
        let model = serde_norway::from_str::<penstock_plan::Manifest>(text).map(|manifest| manifest.model);
        let now = self.rollout(model.ok()).await;
        match (now, expect) {
            (Ok(now), Some(expected)) => {
                let asked = Asked {
                    what: "apply",
                    share: None,
                    manifest: Some(text),
                };
                moved_on(self.console, &Seen::unknown(expected), &now, &asked)
            }
            // Without a revision there is nothing to compare with but the server's own words.
            _ => self.admin.failed(status),
        }
    }

    fn would_apply(&mut self, path: &str, text: &str, reply: ApplyRolloutResponse) -> Result<(), CtlError> {
        let planned = WouldApply {
            diff: difference(path, text, &reply.previous),
            findings: Findings::new(path, &reply.findings).findings,
            outcome: reply.outcome,
        };
        emit(self.console, self.output, &planned)
    }

    pub(super) async fn diff(&mut self, args: Diff) -> Result<(), CtlError> {
        let path = shown(&args.file);
        let text = read(&args.file)?;
        let reply = self.checked(&text).await?;
        let findings = Findings::new(&path, &reply.findings);
        if findings.errors() > 0 {
            self.console.progress(findings.table().trim_end());
            findings.refused()?;
        }
        let diff = difference(&path, &text, &reply.previous);
        let differs = !diff.is_empty();
        emit(self.console, self.output, &Difference { differs, diff })?;
        if differs { Err(CtlError::Differs) } else { Ok(()) }
    }

    /// What the control plane says of a manifest, which it does not write.
    async fn checked(&mut self, text: &str) -> Result<ApplyRolloutResponse, CtlError> {
        let request = ApplyRolloutRequest {
            manifest: text.to_owned(),
            dry_run: true,
            ..ApplyRolloutRequest::default()
        };
        let reply = self.admin.rpc.apply_rollout(request).await;
        Ok(reply.map_err(|status| self.admin.failed(status))?.into_inner())
    }
}

/// Checks a manifest without asking anybody.
pub(super) fn check(args: &Lint, output: Format, console: &mut Console) -> Result<(), CtlError> {
    let path = shown(&args.file);
    let context = lint::LintContext {
        requests_per_second: args.rate,
    };
    let found = match parse::parse(&read(&args.file)?) {
        Ok((manifest, lines)) => lint::lint(&manifest, &lines, &context),
        Err(findings) => findings,
    };
    let findings = found.iter().map(Finding::from).collect();
    let findings = Findings { path, findings };
    emit(console, output, &findings)?;
    findings.refused()
}

fn difference(path: &str, text: &str, previous: &str) -> String {
    if previous.is_empty() {
        return unified(("nothing in force", ""), (path, text));
    }
    unified(("in force", previous), (path, text))
}

/// The file's text; `-` is stdin.
pub(super) fn read(file: &Path) -> Result<String, CtlError> {
    let text = if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    text.map_err(|source| CtlError::Read {
        path: shown(file),
        source,
    })
}

pub(super) fn shown(file: &Path) -> String {
    if file == Path::new("-") {
        "stdin".to_owned()
    } else {
        file.display().to_string()
    }
}

/// What is wrong or doubtful in a manifest.
#[derive(Debug, Serialize)]
struct Findings {
    path: String,
    findings: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Finding {
    severity: String,
    /// From 1; 0 where it is not known.
    line: u32,
    path: String,
    code: String,
    message: String,
}

impl From<&v1::Finding> for Finding {
    fn from(found: &v1::Finding) -> Self {
        Self {
            severity: found.severity.clone(),
            line: found.line,
            path: found.path.clone(),
            code: found.code.clone(),
            message: found.message.clone(),
        }
    }
}

impl From<&lint::Finding> for Finding {
    fn from(found: &lint::Finding) -> Self {
        let severity = match found.severity {
            lint::Severity::Error => "error",
            lint::Severity::Warning => "warning",
        };
        Self {
            severity: severity.to_owned(),
            line: found.line,
            path: found.path.clone(),
            code: found.code.to_owned(),
            message: found.message.clone(),
        }
    }
}

impl Findings {
    fn new(path: &str, findings: &[v1::Finding]) -> Self {
        Self {
            path: path.to_owned(),
            findings: findings.iter().map(Finding::from).collect(),
        }
    }

    fn errors(&self) -> usize {
        self.findings.iter().filter(|f| f.severity == "error").count()
    }

    fn refused(&self) -> Result<(), CtlError> {
        let errors = match self.errors() {
            0 => return Ok(()),
            1 => "an error".to_owned(),
            errors => format!("{errors} errors"),
        };
        let path = self.path.clone();
        Err(CtlError::Findings { path, errors })
    }
}

/// As compilers write them, so that editors find the line.
impl View for Findings {
    fn table(&self) -> String {
        let line = |f: &Finding| {
            let at = match f.line {
                0 => self.path.clone(),
                line => format!("{}:{line}", self.path),
            };
            let field = if f.path.is_empty() {
                String::new()
            } else {
                format!("{}: ", f.path)
            };
            format!("{at}: {}[{}]: {field}{}\n", f.severity, f.code, f.message)
        };
        if self.findings.is_empty() {
            return format!("{}: nothing to find fault with\n", self.path);
        }
        self.findings.iter().map(line).collect()
    }
}

/// What came of an applied manifest.
#[derive(Debug, Serialize)]
struct Applied {
    outcome: String,
    findings: Vec<Finding>,
    rollout: Outcome,
}

impl View for Applied {
    fn table(&self) -> String {
        match self.outcome.as_str() {
            "unchanged" => "unchanged: the manifest says what is in force\n".to_owned(),
            outcome => format!("{outcome}: {}", self.rollout.table()),
        }
    }
}

/// What would come of a manifest; the answer to `--dry-run`.
#[derive(Debug, Serialize)]
struct WouldApply {
    outcome: String,
    findings: Vec<Finding>,
    diff: String,
}

impl View for WouldApply {
    fn table(&self) -> String {
        format!("{}would be {}; nothing is written\n", self.diff, self.outcome)
    }
}

#[derive(Debug, Serialize)]
struct Difference {
    differs: bool,
    diff: String,
}

impl View for Difference {
    fn table(&self) -> String {
        self.diff.clone()
    }
}
