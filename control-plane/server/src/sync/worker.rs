//! One worker's stream: placements go out, reports come in.

use std::sync::Arc;

use penstock_proto::v1::{self, node_message::Message, push::Resource};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{HEARTBEAT_EVERY, SyncService, replaced};
use crate::{
    leader::Speaking,
    now_ms,
    observed::Observed,
    world::{Target, World},
};

/// One worker's stream.
pub(super) struct WorkerStream {
    id: String,
    boot_id: String,
    observed: Arc<Observed>,
    world: Arc<World>,
    speaks: Speaking,
    target: watch::Receiver<Target>,
    pushes: mpsc::Sender<Result<v1::Push, Status>>,
    nonce: u64,
    /// Version of the placement sent last.
    sent: Option<u64>,
    heartbeat: bool,
}

// === impl WorkerStream ===

impl WorkerStream {
    pub(super) fn new(
        service: &SyncService,
        hello: &v1::Hello,
        pushes: mpsc::Sender<Result<v1::Push, Status>>,
    ) -> Self {
        tracing::info!(worker = hello.node, boot_id = hello.boot_id, "worker connected");
        Self {
            id: hello.node.clone(),
            boot_id: hello.boot_id.clone(),
            observed: service.observed.clone(),
            world: service.world.clone(),
            speaks: service.speaks.clone(),
            target: service.world.target(),
            pushes,
            nonce: 0,
            sent: None,
            heartbeat: false,
        }
    }

    pub(super) async fn run(mut self, mut inbound: Streaming<v1::NodeMessage>, stop: CancellationToken) {
        self.serve(&mut inbound, &stop).await;
        tracing::info!(worker = self.id, "worker disconnected");
    }

    /// Pushes and listens until the stream ends. What to push is chosen only when there is room for it, so that a
    /// slow worker gets the newest placement.
    async fn serve(&mut self, inbound: &mut Streaming<v1::NodeMessage>, stop: &CancellationToken) {
        let mut heartbeat = tokio::time::interval(HEARTBEAT_EVERY);
        let mut speaks = self.speaks.clone();
        let mut target = self.target.clone();
        let mut placement = target.borrow_and_update().placement.clone();
        let pushes = self.pushes.clone();
        loop {
            tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(message)) => self.hear(message),
                    Ok(None) | Err(_) => return,
                },
                room = pushes.reserve(), if self.heartbeat || self.sent != Some(placement.version) => {
                    let Ok(room) = room else { return };
                    room.send(Ok(self.next(&placement)));
                }
                changed = target.changed() => match changed {
                    Ok(()) => placement = target.borrow_and_update().placement.clone(),
                    Err(_) => return,
                },
                _ = heartbeat.tick() => self.heartbeat = true,
                () = replaced(&mut speaks) => {
                    return self.end(Status::unavailable("this control plane leads no longer; connect again"));
                }
                () = stop.cancelled() => return self.end(Status::unavailable("the control plane shuts down")),
            }
        }
    }

    fn next(&mut self, placement: &v1::Placement) -> v1::Push {
        let resource = match self.sent.replace(placement.version) {
            Some(sent) if sent == placement.version => {
                self.heartbeat = false;
                Resource::Heartbeat(v1::Heartbeat::default())
            }
            _ => {
                self.nonce += 1;
                Resource::Placement(placement.clone())
            }
        };
        v1::Push {
            nonce: self.nonce,
            resource: Some(resource),
            traceparent: String::new(),
        }
    }

    fn hear(&self, message: v1::NodeMessage) {
        match message.message {
            Some(Message::Worker(report)) => {
                self.observed
                    .hear_worker(&self.id, &self.boot_id, report, now_ms());
                self.world.touch();
            }
            Some(Message::Nack(nack)) => {
                tracing::warn!(
                    worker = self.id,
                    code = nack.code,
                    message = nack.message,
                    "worker refused a placement"
                );
            }
            _ => {}
        }
    }

    /// Says why the stream ends, unless the worker is too slow to hear it.
    fn end(&self, status: Status) {
        if self.pushes.try_send(Err(status)).is_err() {
            tracing::debug!(worker = self.id, "a stream ends without a word");
        }
    }
}
