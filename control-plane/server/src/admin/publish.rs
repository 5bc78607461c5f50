//! Publishing and retiring revisions, and the audit log.

use penstock_plan::PublishedRevision;
use penstock_proto::v1;
use penstock_store::{CommitError, Key, Operation, Precondition, Prefix, Transaction};
use serde_json::{Value, json};
use tonic::Status;

use super::{AdminService, unavailable};
use crate::{controller::fence, now_ms, status};

/// Records given where no limit is.
const RECORDS: usize = 100;
/// Most warm-up prompts of a revision, and their bytes.
const WARM_PREFIXES: usize = 64;
const WARM_PREFIX_BYTES: usize = 1 << 20;

impl AdminService {
    /// Makes a checkpoint known; workers load it.
    pub(super) async fn publish(
        &self,
        request: v1::PublishModelRequest,
    ) -> Result<v1::PublishedRevision, Status> {
        for (field, value) in [
            ("model", &request.model),
            ("revision", &request.revision),
            ("source", &request.source),
        ] {
            if value.is_empty() {
                return Err(Status::invalid_argument(format!("{field}: it is missing")));
            }
        }
        let digest = request.digest.to_ascii_lowercase();
        if !digest.is_empty() && (digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit())) {
            let why = format!("digest: {digest:?} is not a BLAKE3 digest of 64 hexadecimal digits");
            return Err(Status::invalid_argument(why));
        }
        let bytes: usize = request.warm_prefixes.iter().map(String::len).sum();
        if request.warm_prefixes.len() > WARM_PREFIXES || bytes > WARM_PREFIX_BYTES {
            let why =
                format!("warm_prefixes: at most {WARM_PREFIXES} prompts of 1 MiB together are replayed");
            return Err(Status::invalid_argument(why));
        }
        let key = revision_key(&request.model, &request.revision);
        let known = self
            .world
            .state()
            .revision(&request.model, &request.revision)
            .cloned();
        let same = |known: &PublishedRevision| {
            digest.is_empty() || known.digest.is_empty() || known.digest == digest
        };
        if let Some(known) = known
            .as_ref()
            .filter(|known| !known.value.retired && !same(&known.value))
        {
            return Err(Status::already_exists(format!(
                "{}@{} is published with digest {}; give the other checkpoint a name of its own",
                request.model, request.revision, known.value.digest
            )));
        }
        let (operation, actor, reason) = ("PublishModel", request.actor, request.reason);
        let published = PublishedRevision {
            model: request.model,
            revision: request.revision,
            digest: known
                .as_ref()
                .map(|known| known.value.digest.clone())
                .filter(|_| digest.is_empty())
                .unwrap_or(digest),
            source: request.source,
            warm_prefixes: request.warm_prefixes,
            retired: false,
            published_ms: now_ms(),
        };
        let precondition = match &known {
            Some(known) => Precondition::ModRevision(key, known.mod_revision),
            None => Precondition::Absent(key),
        };
        self.write_revision(operation, precondition, published, &actor, &reason)
            .await
    }

    /// Takes a revision out of service on every worker.
    pub(super) async fn retire(
        &self,
        request: v1::RetireModelRequest,
    ) -> Result<v1::PublishedRevision, Status> {
        let (model, revision) = (request.model, request.revision);
        let (known, used) = {
            let state = self.world.state();
            let route = state
                .newest_snapshot()
                .and_then(|snapshot| snapshot.routes.get(&model));
            let used = route.and_then(|route| match &route.canary {
                _ if route.stable.name == revision => Some("stable"),
                Some(canary) if canary.revision.name == revision => Some("the canary of a rollout"),
                _ => None,
            });
            (state.revision(&model, &revision).cloned(), used)
        };
        let Some(known) = known else {
            return Err(Status::not_found(format!("{model}@{revision} is not published")));
        };
        if let Some(used) = used {
            let why = format!("{model}@{revision} is {used} and gets traffic; move that first");
            return Err(Status::failed_precondition(why));
        }
        let key = revision_key(&model, &revision);
        let retired = PublishedRevision {
            retired: true,
            ..known.value
        };
        let precondition = Precondition::ModRevision(key, known.mod_revision);
        self.write_revision(
            "RetireModel",
            precondition,
            retired,
            &request.actor,
            &request.reason,
        )
        .await
    }

    async fn write_revision(
        &self,
        operation: &str,
        precondition: Precondition,
        revision: PublishedRevision,
        actor: &str,
        reason: &str,
    ) -> Result<v1::PublishedRevision, Status> {
        let term = self.term().await?;
        let record = json!({
            "operation": operation,
            "actor": actor,
            "reason": reason,
            "model": revision.model,
            "revision": revision.revision,
            "source": revision.source,
        });
        let audit = Key::Audit {
            time_ms: now_ms(),
            id: uuid::Uuid::new_v4().simple().to_string(),
        };
        let put = |key, value: Vec<u8>| Operation::Put {
            key,
            value: value.into(),
            lease: None,
        };
        let value = serde_json::to_vec(&revision).expect("a revision is plain data with string keys");
        let key = revision_key(&revision.model, &revision.revision);
        let transaction = Transaction {
            preconditions: vec![precondition, fence(term)],
            operations: vec![put(key, value), put(audit, record.to_string().into_bytes())],
        };
        match self.store.commit(transaction).await {
            Ok(written) => self.known(written).await,
            Err(CommitError::Conflict { key: Key::Leader }) => return Err(self.world.not_leading()),
            Err(CommitError::Conflict { .. }) => {
                let why = format!(
                    "{}@{} was changed just now; look and try again",
                    revision.model, revision.revision
                );
                return Err(Status::aborted(why));
            }
            Err(CommitError::Store(error)) => return Err(unavailable(&error)),
            Err(error) => return Err(Status::unavailable(error.to_string())),
        }
        let models = status::models(&self.world.state(), &self.observed);
        let mut revisions = models
            .into_iter()
            .filter(|model| model.name == revision.model)
            .flat_map(|m| m.revisions);
        revisions
            .find(|published| published.name == revision.revision)
            .ok_or_else(|| Status::unavailable("it is written, and the store has not told of it yet"))
    }

    /// The newest records of the audit log.
    pub(super) async fn audit(
        &self,
        request: &v1::ListAuditRequest,
    ) -> Result<v1::ListAuditResponse, Status> {
        let listing = self
            .store
            .list(Prefix::Audit)
            .await
            .map_err(|error| unavailable(&error))?;
        let limit = match request.limit {
            0 => RECORDS,
            limit => limit as usize,
        };
        let mut records: Vec<v1::AuditRecord> = listing
            .entries
            .iter()
            .filter_map(|entry| match &entry.key {
                Key::Audit { time_ms, id } => {
                    Some(record(*time_ms, id, &serde_json::from_slice(&entry.value).ok()?))
                }
                _ => None,
            })
            .filter(|record| request.model.is_empty() || record.model == request.model)
            .collect();
        records.sort_by(|a, b| (b.at_ms, &b.id).cmp(&(a.at_ms, &a.id)));
        records.truncate(limit);
        Ok(v1::ListAuditResponse { records })
    }
}

fn revision_key(model: &str, revision: &str) -> Key {
    Key::Model {
        model: model.to_owned(),
        revision: revision.to_owned(),
    }
}

/// A record as operators see it: of a rollout before and after, or of something else by itself.
fn record(at_ms: u64, id: &str, value: &Value) -> v1::AuditRecord {
    let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
    let operation = text(value, "operation");
    let after = &value["after"];
    let (of, change) = match after.is_object() {
        true => (after, changed(&value["before"], after)),
        false => (value, described(value)),
    };
    // What the controller does by itself is nobody's, whoever wrote the plan that it follows.
    let actor = if operation == "controller" {
        operation.clone()
    } else {
        text(of, "actor")
    };
    v1::AuditRecord {
        at_ms,
        id: id.to_owned(),
        model: text(of, "model"),
        actor,
        reason: text(of, "reason"),
        change,
        rollout_uid: text(of, "uid"),
        generation: of["generation"].as_u64().unwrap_or_default(),
        operation,
    }
}

/// What differs between two plans, in words.
fn changed(before: &Value, after: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let share = |plan: &Value| {
        let ppm = plan["share"].as_u64().unwrap_or_default();
        format!("{}%", ppm as f64 / 1e4)
    };
    let mut words = Vec::new();
    if before["uid"] != after["uid"] {
        words.push(format!(
            "{} against {}",
            text(&after["canary"]),
            text(&after["stable"])
        ));
    }
    // What is created at nothing has not changed its share.
    let moved = !before.is_null() || after["share"].as_u64() != Some(0);
    if before["share"] != after["share"] && moved {
        words.push(format!("share {} → {}", share(before), share(after)));
    }
    if before["phase"] != after["phase"] {
        let from = if before.is_object() {
            text(&before["phase"])
        } else {
            "nothing".into()
        };
        words.push(format!("{from} → {}", text(&after["phase"])));
    }
    if before["plan"] != after["plan"] && before.is_object() {
        words.push("plan changed".into());
    }
    if let Some(cause) = after["cause"]
        .as_str()
        .filter(|cause| !cause.is_empty() && before["cause"] != **cause)
    {
        words.push(cause.to_owned());
    }
    words.join(", ")
}

fn described(value: &Value) -> String {
    let known = ["gateway", "revision", "source"];
    let words = known.iter().filter_map(|field| {
        let text = value[*field].as_str().filter(|text| !text.is_empty())?;
        Some(format!("{field} {text}"))
    });
    words.collect::<Vec<_>>().join(", ")
}
