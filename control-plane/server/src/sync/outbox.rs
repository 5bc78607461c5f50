//! What one gateway is to be told next.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use penstock_proto::v1::{self, push::Resource};

use crate::world::Target;

/// Pushes whose answer may still come; older ones count as unanswered.
const UNANSWERED: usize = 64;

/// Compares what a gateway was sent with what it should have. It queues nothing: whoever asks late is told the
/// newest state only.
#[derive(Debug)]
pub(super) struct Outbox {
    nonce: u64,
    unanswered: VecDeque<Unanswered>,
    /// Digest of the snapshot that the gateway has or was sent last: the same bytes are never sent again.
    digest: Arc<str>,
    /// Version of the endpoints sent last. Versions begin anew with each control plane, so that what a Hello says
    /// of them is of no use.
    endpoints: Option<u64>,
    heartbeat: bool,
}

/// A push that waits for its answer.
#[derive(Debug)]
pub(super) struct Unanswered {
    nonce: u64,
    /// Epoch of the snapshot pushed; `None` for endpoints.
    pub(super) epoch: Option<u64>,
    pub(super) at: Instant,
}

// === impl Outbox ===

impl Outbox {
    /// For a gateway in which the snapshot of this digest is in force; empty for none.
    pub(super) fn new(digest: String) -> Self {
        Self {
            nonce: 0,
            unanswered: VecDeque::new(),
            digest: digest.into(),
            endpoints: None,
            heartbeat: false,
        }
    }

    /// A heartbeat is due.
    pub(super) fn heartbeat(&mut self) {
        self.heartbeat = true;
    }

    /// Whether there is anything to tell.
    pub(super) fn has_news(&self, target: &Target) -> bool {
        self.heartbeat || self.wants_endpoints(target) || self.wants_snapshot(target)
    }

    /// The next push. Endpoints go first, so that a gateway can reach whatever the snapshot names.
    pub(super) fn next(&mut self, target: &Target) -> Option<v1::Push> {
        if self.wants_endpoints(target) {
            self.endpoints = Some(target.endpoints.version);
            let resource = Resource::Endpoints((&*target.endpoints).into());
            return Some(self.push(resource, None, ""));
        }
        if self.wants_snapshot(target) {
            self.digest = target.digest.clone();
            let snapshot = v1::Snapshot {
                digest: target.digest.to_string(),
                ..(&*target.snapshot).into()
            };
            let epoch = Some(target.snapshot.epoch);
            return Some(self.push(Resource::Snapshot(snapshot), epoch, &target.traceparent));
        }
        std::mem::take(&mut self.heartbeat).then(|| v1::Push {
            nonce: 0,
            resource: Some(Resource::Heartbeat(v1::Heartbeat {
                epoch: target.snapshot.epoch,
                endpoints_version: target.endpoints.version,
            })),
            traceparent: String::new(),
        })
    }

    /// The push that a nonce answers.
    pub(super) fn answered(&mut self, nonce: u64) -> Option<Unanswered> {
        let index = self.unanswered.iter().position(|push| push.nonce == nonce)?;
        self.unanswered.remove(index)
    }

    fn wants_endpoints(&self, target: &Target) -> bool {
        self.endpoints != Some(target.endpoints.version)
    }

    fn wants_snapshot(&self, target: &Target) -> bool {
        target.snapshot.epoch > 0 && self.digest != target.digest
    }

    fn push(&mut self, resource: Resource, epoch: Option<u64>, traceparent: &str) -> v1::Push {
        self.nonce += 1;
        let (nonce, at) = (self.nonce, Instant::now());
        self.unanswered.push_back(Unanswered { nonce, epoch, at });
        if self.unanswered.len() > UNANSWERED {
            self.unanswered.pop_front();
        }
        v1::Push {
            nonce,
            resource: Some(resource),
            traceparent: traceparent.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_plan::{EndpointSet, Snapshot};

    fn target(epoch: u64, version: u64) -> Target {
        let snapshot = Snapshot {
            epoch,
            ..Snapshot::default()
        };
        Target {
            digest: snapshot.digest().into(),
            snapshot: Arc::new(snapshot),
            endpoints: Arc::new(EndpointSet {
                version,
                endpoints: Vec::new(),
            }),
            traceparent: format!("trace of {epoch}").into(),
            ..Target::default()
        }
    }

    fn told(outbox: &mut Outbox, target: &Target) -> Vec<String> {
        let mut told = Vec::new();
        while outbox.has_news(target) {
            let push = outbox.next(target).expect("news");
            told.push(match push.resource.expect("something") {
                Resource::Snapshot(snapshot) => format!("epoch {} {}", snapshot.epoch, push.traceparent),
                Resource::Endpoints(endpoints) => format!("endpoints {}", endpoints.version),
                Resource::Heartbeat(heartbeat) => format!("alive at {}", heartbeat.epoch),
                Resource::Placement(_) => "a placement".to_owned(),
            });
        }
        told
    }

    #[test]
    fn endpoints_come_before_the_snapshot_that_needs_them() {
        let mut outbox = Outbox::new(String::new());
        assert_eq!(
            told(&mut outbox, &target(3, 1)),
            ["endpoints 1", "epoch 3 trace of 3"]
        );
    }

    #[test]
    fn a_slow_gateway_is_told_the_newest_state_alone() {
        let mut outbox = Outbox::new(String::new());
        told(&mut outbox, &target(1, 1));
        // Nobody asked while epochs 2 to 9 were the newest.
        assert_eq!(told(&mut outbox, &target(10, 1)), ["epoch 10 trace of 10"]);
    }

    #[test]
    fn what_a_gateway_has_is_not_sent_again() {
        let target = target(3, 1);
        let mut outbox = Outbox::new(target.digest.to_string());
        assert_eq!(told(&mut outbox, &target), ["endpoints 1"]);
        outbox.heartbeat();
        assert_eq!(told(&mut outbox, &target), ["alive at 3"]);
    }

    #[test]
    fn an_answer_finds_its_push_once() {
        let mut outbox = Outbox::new(String::new());
        told(&mut outbox, &target(3, 1));
        assert_eq!(outbox.answered(2).and_then(|push| push.epoch), Some(3));
        assert!(outbox.answered(2).is_none());
        assert!(outbox.answered(7).is_none());
    }

    #[test]
    fn a_gateway_that_never_answers_takes_no_more_room() {
        let mut outbox = Outbox::new(String::new());
        for epoch in 1..1000 {
            told(&mut outbox, &target(epoch, 1));
        }
        assert_eq!(outbox.unanswered.len(), UNANSWERED);
    }
}
