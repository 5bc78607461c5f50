//! Who changed what, when and why: written in the same transaction as the change.

use penstock_plan::Rollout;
use penstock_proto::v1;
use penstock_store::{Key, Operation};
use serde::Serialize;

/// One change of a rollout.
#[derive(Debug, Serialize)]
pub(crate) struct Record<'a> {
    /// E.g. `SetRollout`, or `controller` for a phase that follows by itself.
    pub(crate) operation: &'a str,
    pub(crate) before: Option<&'a Rollout>,
    pub(crate) after: &'a Rollout,
}

impl Record<'_> {
    /// The write that keeps it.
    pub(crate) fn operation(&self, now_ms: u64) -> Operation {
        let value = serde_json::to_vec(self).expect("a record is plain data with string keys");
        let id = uuid::Uuid::new_v4().simple().to_string();
        Operation::Put {
            key: Key::Audit { time_ms: now_ms, id },
            value: value.into(),
            lease: None,
        }
    }
}

/// The record of an emergency override, under a key that is the override's own: written once however often a gateway
/// tells of it.
pub(crate) fn override_record(gateway: &str, record: &v1::OverrideRecord) -> Operation {
    let ended = record.ended_ms > 0;
    let (time_ms, operation) = match ended {
        true => (record.ended_ms, "OverrideEnded"),
        false => (record.since_ms, "Override"),
    };
    let value = serde_json::json!({
        "operation": operation,
        "gateway": gateway,
        "model": record.model,
        "revision": record.revision,
        "actor": record.actor,
        "reason": record.reason,
        "until_ms": record.until_ms,
    });
    Operation::Put {
        key: Key::Audit {
            time_ms,
            id: format!("override-{}-{}", record.id, if ended { "end" } else { "start" }),
        },
        value: value.to_string().into_bytes().into(),
        lease: None,
    }
}
