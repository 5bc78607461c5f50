//! Who changed what, when and why: written in the same transaction as the change.

use penstock_plan::Rollout;
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
