//! Who changed what.

use super::explain::moment;
use crate::output::{View, columns};
use penstock_proto::v1;
use serde::Serialize;

/// `audit` and `rollout history`.
#[derive(Debug, Serialize)]
pub(crate) struct Audit {
    records: Vec<Record>,
}

#[derive(Debug, Serialize)]
struct Record {
    at: String,
    at_ms: u64,
    id: String,
    operation: String,
    model: String,
    actor: String,
    reason: String,
    change: String,
    rollout_uid: String,
    generation: u64,
}

impl From<v1::ListAuditResponse> for Audit {
    fn from(reply: v1::ListAuditResponse) -> Self {
        let record = |r: v1::AuditRecord| Record {
            at: moment(r.at_ms),
            at_ms: r.at_ms,
            id: r.id,
            operation: r.operation,
            model: r.model,
            actor: r.actor,
            reason: r.reason,
            change: r.change,
            rollout_uid: r.rollout_uid,
            generation: r.generation,
        };
        Self {
            records: reply.records.into_iter().map(record).collect(),
        }
    }
}

impl View for Audit {
    fn table(&self) -> String {
        let row = |r: &Record| {
            [
                r.at.clone(),
                r.operation.clone(),
                r.model.clone(),
                r.actor.clone(),
                r.change.clone(),
                r.reason.clone(),
            ]
        };
        let rows: Vec<_> = self.records.iter().map(row).collect();
        columns(["TIME", "OPERATION", "MODEL", "ACTOR", "CHANGE", "REASON"], &rows)
    }
}
