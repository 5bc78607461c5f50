//! What the fake remembers.

use penstock_proto::v1::*;
use tonic::{Code, Status};

/// What the fake remembers and how it misbehaves.
pub(crate) struct State {
    pub(crate) rollout: Rollout,
    /// What a status says besides the rollout and its acknowledgements.
    pub(crate) detail: RolloutStatus,
    /// What lint finds in the next manifest.
    pub(crate) findings: Vec<Finding>,
    /// What comes of an applied manifest.
    pub(crate) outcome: &'static str,
    pub(crate) last_apply: Option<ApplyRolloutRequest>,
    /// Verbs of the amendments, with the uid that they name.
    pub(crate) amended: Vec<(String, String)>,
    pub(crate) last_publish: Option<PublishModelRequest>,
    /// States of v3 on the worker, one for each look at the models.
    pub(crate) placements: Vec<revision_state::State>,
    /// Operations address of worker and gateway.
    pub(crate) ops_address: String,
    pub(crate) last_feedback: Option<FeedbackRequest>,
    pub(crate) last_set: Option<SetRolloutRequest>,
    pub(crate) aborted_uid: Option<String>,
    pub(crate) last_generate: Option<String>,
    pub(crate) traceparents: Vec<Option<String>>,
    /// Somebody writes before the next set: the controller, or an operator with this share.
    pub(crate) interfere: Option<Option<u32>>,
    /// The second gateway refuses every epoch.
    pub(crate) refuses: bool,
    /// Somebody aborts after the next change.
    pub(crate) aborts: bool,
    /// A watch ends after its statuses instead of staying open.
    pub(crate) ends_watch: bool,
    /// Every admin call fails so.
    pub(crate) fails: Option<Code>,
}

impl State {
    pub(super) fn new() -> Self {
        let rollout = Rollout {
            uid: "r-1".into(),
            model: "demo".into(),
            stable: "v1".into(),
            canary: "v2".into(),
            canary_ppm: 10_000,
            phase: Phase::Paused.into(),
            generation: 3,
            store_revision: 7,
            ..Rollout::default()
        };
        Self {
            rollout,
            detail: RolloutStatus::default(),
            findings: Vec::new(),
            outcome: "updated",
            last_apply: None,
            amended: Vec::new(),
            last_publish: None,
            placements: Vec::new(),
            ops_address: String::new(),
            last_feedback: None,
            last_set: None,
            aborted_uid: None,
            last_generate: None,
            traceparents: Vec::new(),
            interfere: None,
            refuses: false,
            aborts: false,
            ends_watch: false,
            fails: None,
        }
    }

    pub(super) fn compare(&self, expected: Option<u64>) -> Result<(), Status> {
        match expected {
            Some(expected) if expected != self.rollout.store_revision => Err(Status::aborted("it moved")),
            _ => Ok(()),
        }
    }

    pub(super) fn change(&mut self, phase: Phase, ppm: u32) -> Rollout {
        self.rollout.canary_ppm = ppm;
        self.rollout.generation += 1;
        self.rollout.store_revision += 1;
        self.rollout.set_phase(phase);
        self.rollout.clone()
    }

    pub(super) fn status(&self, acknowledged: u32) -> RolloutStatus {
        let nack = GatewayNack {
            gateway: "gw-2".into(),
            epoch: 8,
            code: "canary_unreachable".into(),
            message: "no endpoint of v2".into(),
        };
        RolloutStatus {
            rollout: Some(self.rollout.clone()),
            epoch: 8,
            live_gateways: 2,
            acknowledged,
            pending: if acknowledged < 2 {
                vec!["gw-2".into()]
            } else {
                Vec::new()
            },
            nacks: if self.refuses { vec![nack] } else { Vec::new() },
            stable_endpoints: 2,
            canary_endpoints: 2,
            ..self.detail.clone()
        }
    }

    pub(super) fn settle(&mut self) {
        let settled = match self.rollout.phase() {
            _ if self.aborts => Phase::Aborting,
            Phase::Converging => Phase::Paused,
            Phase::Promoting => Phase::Succeeded,
            Phase::Aborting => Phase::RolledBack,
            phase => phase,
        };
        self.rollout.set_phase(settled);
    }
}
