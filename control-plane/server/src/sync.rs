//! The Sync service: one stream per gateway and per worker.

use std::{pin::Pin, sync::Arc, time::Duration};

use penstock_proto::v1::{self, ack::Applied, node_message::Message, sync_server::Sync};
use penstock_telemetry::instruments::ControlPlaneMetrics;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    gateways::{Gateways, Session},
    leader::{ELECTION_TIMEOUT, Speaking},
    now_ms,
    observed::Observed,
    world::{Target, World},
};

mod outbox;
mod worker;

use outbox::Outbox;
use worker::WorkerStream;

/// A stream with nothing to push says that it lives.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// Pushes on their way to one gateway. The state that is pushed is always the newest, so that a slow gateway
/// skips what it missed instead of queueing it.
const IN_FLIGHT: usize = 4;
/// Longest that a gateway may take for its Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// The service.
#[derive(Clone)]
pub(crate) struct SyncService {
    pub(crate) world: Arc<World>,
    pub(crate) gateways: Arc<Gateways>,
    pub(crate) observed: Arc<Observed>,
    pub(crate) speaks: Speaking,
    pub(crate) metrics: ControlPlaneMetrics,
    pub(crate) streams: TaskTracker,
    pub(crate) stop: CancellationToken,
}

#[tonic::async_trait]
impl Sync for SyncService {
    type SyncStream = Pin<Box<dyn Stream<Item = Result<v1::Push, Status>> + Send>>;

    async fn sync(
        &self,
        request: Request<Streaming<v1::NodeMessage>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        if !self.elected().await {
            return Err(self.world.not_leading());
        }
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello within 10 s"))??;
        let Some(Message::Hello(hello)) = first.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("the first message must be a Hello"));
        };
        if hello.node.is_empty() {
            return Err(Status::invalid_argument("node: a node needs a name"));
        }
        let (pushes, outbound) = mpsc::channel(IN_FLIGHT);
        match hello.role() {
            v1::hello::Role::Gateway => {
                let stream = GatewayStream::new(self, hello, pushes);
                self.streams.spawn(stream.run(inbound, self.stop.clone()));
            }
            v1::hello::Role::Worker => {
                let stream = WorkerStream::new(self, &hello, pushes);
                self.streams.spawn(stream.run(inbound, self.stop.clone()));
            }
            v1::hello::Role::Unspecified => {
                return Err(Status::invalid_argument(format!(
                    "role {} is not known here",
                    hello.role
                )));
            }
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }
}

impl SyncService {
    /// Whether this control plane speaks to gateways. One that starts together with its gateways is asked before
    /// it is elected: the answer waits for a moment unless another leads.
    async fn elected(&self) -> bool {
        let mut speaks = self.speaks.clone();
        if *speaks.borrow() || self.world.other_leader().is_some() {
            return *speaks.borrow();
        }
        let elected = tokio::time::timeout(ELECTION_TIMEOUT, speaks.wait_for(|speaks| *speaks)).await;
        matches!(elected, Ok(Ok(_)))
    }
}

/// Completes when another control plane speaks.
async fn replaced(speaks: &mut Speaking) {
    // An error means that the controller has ended: nobody here speaks.
    let _ = speaks.wait_for(|speaks| !speaks).await;
}

/// One gateway's stream.
struct GatewayStream {
    session: Session,
    boot_id: String,
    gateways: Arc<Gateways>,
    observed: Arc<Observed>,
    world: Arc<World>,
    speaks: Speaking,
    metrics: ControlPlaneMetrics,
    target: watch::Receiver<Target>,
    pushes: mpsc::Sender<Result<v1::Push, Status>>,
    outbox: Outbox,
}

// === impl GatewayStream ===

impl GatewayStream {
    fn new(service: &SyncService, hello: v1::Hello, pushes: mpsc::Sender<Result<v1::Push, Status>>) -> Self {
        let epoch = service
            .world
            .known_epoch(hello.applied_epoch, &hello.applied_digest);
        let session = service.gateways.hello(&hello, epoch);
        service.world.touch();
        tracing::info!(
            node = hello.node,
            boot_id = hello.boot_id,
            epoch = hello.applied_epoch,
            "gateway connected"
        );
        Self {
            session,
            boot_id: hello.boot_id,
            gateways: service.gateways.clone(),
            observed: service.observed.clone(),
            world: service.world.clone(),
            speaks: service.speaks.clone(),
            metrics: service.metrics.clone(),
            target: service.world.target(),
            pushes,
            outbox: Outbox::new(hello.applied_digest),
        }
    }

    async fn run(mut self, mut inbound: Streaming<v1::NodeMessage>, stop: CancellationToken) {
        let in_order = self.serve(&mut inbound, &stop).await;
        self.gateways.disconnected(&self.session, in_order);
        self.world.touch();
        tracing::info!(node = self.session.node(), in_order, "gateway disconnected");
    }

    /// Pushes and listens until the stream ends; true if the gateway closed it in good order.
    ///
    /// What to push is chosen only when there is room for it, so that a slow gateway gets the newest state, and
    /// is listened to all the while.
    async fn serve(&mut self, inbound: &mut Streaming<v1::NodeMessage>, stop: &CancellationToken) -> bool {
        let mut heartbeat = tokio::time::interval(HEARTBEAT_EVERY);
        let mut speaks = self.speaks.clone();
        let mut target = self.target.clone();
        let mut newest = target.borrow_and_update().clone();
        let pushes = self.pushes.clone();
        loop {
            tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(message)) => self.hear(message),
                    Ok(None) => return true,
                    Err(_) => return false,
                },
                room = pushes.reserve(), if self.outbox.has_news(&newest) => {
                    let (Ok(room), Some(push)) = (room, self.outbox.next(&newest)) else {
                        return false;
                    };
                    room.send(Ok(push));
                }
                changed = target.changed() => match changed {
                    Ok(()) => newest = target.borrow_and_update().clone(),
                    Err(_) => return false,
                },
                _ = heartbeat.tick() => self.outbox.heartbeat(),
                () = replaced(&mut speaks) => {
                    self.end(Status::unavailable("this control plane leads no longer; connect again"));
                    return false;
                }
                () = stop.cancelled() => {
                    self.end(Status::unavailable("the control plane shuts down"));
                    return false;
                }
            }
        }
    }

    /// Says why the stream ends, unless the gateway is too slow to hear it.
    fn end(&self, status: Status) {
        if self.pushes.try_send(Err(status)).is_err() {
            tracing::debug!(node = self.session.node(), "a stream ends without a word");
        }
    }

    fn hear(&mut self, message: v1::NodeMessage) {
        match message.message {
            Some(Message::Ack(ack)) => self.hear_ack(&ack),
            Some(Message::Nack(nack)) => self.hear_nack(nack),
            Some(Message::Stats(stats)) => {
                self.observed
                    .hear_gateway(self.session.node(), &self.boot_id, stats, now_ms());
                self.gateways.said(&self.session);
            }
            Some(Message::Alive(_) | Message::Hello(_) | Message::Worker(_)) | None => {
                self.gateways.said(&self.session);
            }
        }
    }

    /// The Ack names what is in force, which may be older than what was pushed: it answers heartbeats too, and
    /// follows a Nack where other endpoints have made the refused snapshot acceptable.
    fn hear_ack(&mut self, ack: &v1::Ack) {
        if let Some(push) = self.outbox.answered(ack.nonce) {
            self.metrics.acknowledged(push.at.elapsed());
        }
        match &ack.applied {
            Some(Applied::Snapshot(applied)) => {
                let epoch = self.world.known_epoch(applied.epoch, &applied.digest);
                if self.gateways.acknowledged(&self.session, epoch) {
                    self.world.touch();
                }
            }
            Some(Applied::Endpoints(_) | Applied::Placement(_)) | None => self.gateways.said(&self.session),
        }
    }

    fn hear_nack(&mut self, nack: v1::Nack) {
        let node = self.session.node();
        let (code, message) = (nack.code, nack.message);
        let Some(epoch) = self.outbox.answered(nack.nonce).and_then(|push| push.epoch) else {
            tracing::warn!(node, code, message, "gateway refused endpoints");
            return self.gateways.said(&self.session);
        };
        tracing::warn!(node, epoch, code, message, "gateway refused a snapshot");
        self.metrics.refused(&code);
        let gateway = node.to_owned();
        self.gateways.refused(
            &self.session,
            v1::GatewayNack {
                gateway,
                epoch,
                code,
                message,
            },
        );
        self.world.touch();
    }
}
