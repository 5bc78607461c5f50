//! Applying plans, and the operators' other changes of a rollout.

use penstock_plan::{Change, CreateRollout, Manifest, Ppm, Queued, Rollout, RolloutError, lint, parse};
use penstock_proto::{convert, v1};
use penstock_store::{Key, Precondition};
use tonic::{Request, Response, Status};

use super::{AdminService, Who, change, lost_race, refusal};
use crate::{audit::Record, now_ms, world::Stored};

impl AdminService {
    /// One of the changes that differ by nothing but what they do to the rollout.
    pub(super) async fn operate(
        &self,
        operation: &'static str,
        request: Request<v1::ChangeRolloutRequest>,
        replace: impl Fn(&Rollout, Change) -> Result<Rollout, RolloutError>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        let who = Who {
            actor: request.actor,
            reason: request.reason,
            dry_run: request.dry_run,
        };
        let uid = request.uid;
        let work = self.change(
            operation,
            &request.model,
            request.expect_revision,
            who,
            |rollout, change| {
                if !uid.is_empty() && uid != rollout.uid {
                    let (model, expected, found) = (rollout.model.clone(), uid.clone(), rollout.uid.clone());
                    return Err(refusal(&RolloutError::OtherUid {
                        model,
                        expected,
                        found,
                    }));
                }
                let next = replace(rollout, change).map_err(|error| refusal(&error))?;
                self.reachable(rollout.share, &next).map(|()| next)
            },
        );
        self.call(operation, &metadata, work).await
    }

    /// Creates or changes a rollout from its manifest.
    pub(super) async fn apply(
        &self,
        request: v1::ApplyRolloutRequest,
    ) -> Result<v1::ApplyRolloutResponse, Status> {
        let (manifest, findings) = self.read(&request.manifest);
        let Some(manifest) = manifest else {
            return Ok(v1::ApplyRolloutResponse {
                outcome: "refused".into(),
                findings,
                ..v1::ApplyRolloutResponse::default()
            });
        };
        let stable = manifest.stable.clone().unwrap_or_default();
        let (model, stable) = self.revisions(&manifest.model, &stable, &manifest.canary.revision)?;
        let before = self.stored(&model).await?;
        if let (Some(expected), Some(before)) = (request.expect_revision, &before)
            && expected != before.mod_revision
        {
            return Err(lost_race(before, expected));
        }
        let who = Who {
            actor: request.actor,
            reason: request.reason,
            dry_run: request.dry_run,
        };
        let previous = before.as_ref().map(|stored| &stored.value);
        who.reason_for(previous)?;
        let (after, outcome) =
            applied(previous, manifest, stable, change(&who)).map_err(|error| refusal(&error))?;
        let mut rollout = convert::rollout(
            &after,
            before.as_ref().map_or(0, |stored| stored.mod_revision),
            "",
        );
        if outcome != "unchanged" && !who.dry_run {
            rollout = self.write(before.as_ref(), &after).await?;
        }
        Ok(v1::ApplyRolloutResponse {
            rollout: Some(rollout),
            outcome: outcome.into(),
            findings,
            previous: previous.map(manifest_text).unwrap_or_default(),
        })
    }

    /// Reads and checks a manifest; none where there is an error among the findings.
    fn read(&self, text: &str) -> (Option<Manifest>, Vec<v1::Finding>) {
        let wire = |findings: Vec<lint::Finding>| findings.iter().map(finding).collect();
        let (manifest, lines) = match parse::parse(text) {
            Ok(parsed) => parsed,
            Err(findings) => return (None, wire(findings)),
        };
        let rate = self.observed.requests_per_second(&manifest.model, now_ms());
        let context = lint::LintContext {
            requests_per_second: (rate > 0.0).then_some(rate),
        };
        let findings = lint::lint(&manifest, &lines, &context);
        let refused = findings
            .iter()
            .any(|finding| finding.severity == lint::Severity::Error);
        ((!refused).then_some(manifest), wire(findings))
    }

    async fn write(&self, before: Option<&Stored<Rollout>>, after: &Rollout) -> Result<v1::Rollout, Status> {
        let record = Record {
            operation: "ApplyRollout",
            before: before.map(|stored| &stored.value),
            after,
        };
        let key = Key::Rollout(after.model.clone());
        let precondition = match before {
            Some(before) => Precondition::ModRevision(key, before.mod_revision),
            None => Precondition::Absent(key),
        };
        match self.commit(precondition, after, &record).await? {
            Some(revision) => Ok(convert::rollout(after, revision, "")),
            None => Err(Status::aborted(format!(
                "somebody else changed the rollout of {} just now; look at it and apply again",
                after.model
            ))),
        }
    }
}

/// What applying a manifest makes of the rollout that is there.
fn applied(
    before: Option<&Rollout>,
    manifest: Manifest,
    stable: String,
    change: Change,
) -> Result<(Rollout, &'static str), RolloutError> {
    let under_way = before.filter(|rollout| !rollout.phase.is_final());
    let Some(before_it) = under_way else {
        let new = CreateRollout {
            uid: uuid::Uuid::now_v7().to_string(),
            model: manifest.model.clone(),
            stable,
            canary: manifest.canary.revision.clone(),
            share: Ppm::ZERO,
            plan: manifest,
        };
        return Ok((Rollout::create(new, before, change)?, "created"));
    };
    if before_it.canary == manifest.canary.revision {
        if before_it.plan == manifest {
            return Ok((before_it.clone(), "unchanged"));
        }
        return Ok((before_it.amend(manifest, change)?, "updated"));
    }
    let queued = Queued {
        uid: uuid::Uuid::now_v7().to_string(),
        plan: manifest,
        actor: change.actor.clone(),
        reason: change.reason.clone(),
    };
    before_it.follow_by(queued, change)
}

fn manifest_text(rollout: &Rollout) -> String {
    convert::rollout(rollout, 0, "").manifest
}

fn finding(finding: &lint::Finding) -> v1::Finding {
    v1::Finding {
        severity: match finding.severity {
            lint::Severity::Error => "error",
            lint::Severity::Warning => "warning",
        }
        .into(),
        path: finding.path.clone(),
        line: finding.line,
        code: finding.code.into(),
        message: finding.message.clone(),
    }
}
