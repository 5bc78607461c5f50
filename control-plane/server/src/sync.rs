//! The Sync service: one stream per gateway.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use penstock_proto::v1::{self, ack::Applied, node_message::Message, push::Resource, sync_server::Sync};
use penstock_telemetry::instruments::ControlPlaneMetrics;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    gateways::Gateways,
    leader::Leadership,
    world::{Target, World},
};

/// A stream with nothing to push says that it lives.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// Pushes on their way to one gateway. The state that is pushed is always the newest, so that a slow gateway
/// skips what it missed instead of queueing it.
const IN_FLIGHT: usize = 4;
/// Pushes whose answer may still come; older ones count as unanswered.
const UNANSWERED: usize = 64;
/// Longest that a gateway may take for its Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// The service.
#[derive(Clone)]
pub(crate) struct SyncService {
    pub(crate) world: Arc<World>,
    pub(crate) gateways: Arc<Gateways>,
    pub(crate) leadership: Leadership,
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
        if self.leadership.borrow().is_none() {
            return Err(not_leading(&self.world));
        }
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello within 10 s"))??;
        let Some(Message::Hello(hello)) = first.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("the first message must be a Hello"));
        };
        if hello.role() != v1::hello::Role::Gateway {
            return Err(Status::invalid_argument(format!(
                "role {} is not known here",
                hello.role
            )));
        }
        if hello.node.is_empty() {
            return Err(Status::invalid_argument("node: a gateway needs a name"));
        }
        let (pushes, outbound) = mpsc::channel(IN_FLIGHT);
        let stream = GatewayStream::new(self, hello, pushes);
        self.streams.spawn(stream.run(inbound, self.stop.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }
}

/// What a control plane that does not lead answers.
pub(crate) fn not_leading(world: &World) -> Status {
    match &world.state().leader {
        Some(leader) => {
            Status::unavailable(format!("this control plane does not lead; {} does", leader.value))
        }
        None => Status::unavailable("no control plane leads now; try again"),
    }
}

/// Completes when this control plane leads no longer.
async fn lost(leadership: &mut Leadership) {
    // An error means that the campaign has ended: nobody here leads.
    let _ = leadership.wait_for(Option::is_none).await;
}

/// One gateway's stream.
struct GatewayStream {
    node: String,
    boot_id: String,
    gateways: Arc<Gateways>,
    world: Arc<World>,
    leadership: Leadership,
    metrics: ControlPlaneMetrics,
    target: watch::Receiver<Target>,
    pushes: mpsc::Sender<Result<v1::Push, Status>>,
    nonce: u64,
    unanswered: VecDeque<Unanswered>,
    /// Digest of the snapshot that the gateway has or was sent last.
    sent_digest: Arc<str>,
    sent_endpoints: Option<u64>,
}

struct Unanswered {
    nonce: u64,
    /// Epoch of the snapshot pushed; `None` for endpoints.
    epoch: Option<u64>,
    at: Instant,
}

/// Its stream is over.
struct Closed;

// === impl GatewayStream ===

impl GatewayStream {
    fn new(service: &SyncService, hello: v1::Hello, pushes: mpsc::Sender<Result<v1::Push, Status>>) -> Self {
        let epoch = service
            .world
            .known_epoch(hello.applied_epoch, &hello.applied_digest);
        service.gateways.hello(&hello, epoch);
        service.world.touch();
        tracing::info!(
            node = hello.node,
            boot_id = hello.boot_id,
            epoch = hello.applied_epoch,
            "gateway connected"
        );
        Self {
            sent_digest: hello.applied_digest.into(),
            node: hello.node,
            boot_id: hello.boot_id,
            gateways: service.gateways.clone(),
            world: service.world.clone(),
            leadership: service.leadership.clone(),
            metrics: service.metrics.clone(),
            target: service.world.target(),
            pushes,
            nonce: 0,
            unanswered: VecDeque::new(),
            sent_endpoints: None,
        }
    }

    async fn run(mut self, mut inbound: Streaming<v1::NodeMessage>, stop: CancellationToken) {
        let in_order = self.serve(&mut inbound, &stop).await;
        self.gateways.disconnected(&self.node, &self.boot_id, in_order);
        self.world.touch();
        tracing::info!(node = self.node, in_order, "gateway disconnected");
    }

    /// Pushes and listens until the stream ends; true if the gateway closed it in good order.
    async fn serve(&mut self, inbound: &mut Streaming<v1::NodeMessage>, stop: &CancellationToken) -> bool {
        let mut heartbeat = tokio::time::interval(HEARTBEAT_EVERY);
        let mut leadership = self.leadership.clone();
        let mut target = self.target.clone();
        target.mark_changed();
        loop {
            let pushed = tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(message)) => {
                        self.hear(message);
                        Ok(())
                    }
                    Ok(None) => return true,
                    Err(_) => return false,
                },
                changed = target.changed() => match changed {
                    Ok(()) => {
                        let newest = target.borrow_and_update().clone();
                        self.push_target(newest).await
                    }
                    Err(_) => return false,
                },
                _ = heartbeat.tick() => self.push_heartbeat().await,
                () = lost(&mut leadership) => {
                    let status = Status::unavailable("this control plane leads no longer; connect again");
                    let _ = self.pushes.send(Err(status)).await;
                    return false;
                }
                () = stop.cancelled() => {
                    let _ = self.pushes.send(Err(Status::unavailable("the control plane shuts down"))).await;
                    return false;
                }
            };
            if pushed.is_err() {
                return false;
            }
        }
    }

    fn hear(&mut self, message: v1::NodeMessage) {
        match message.message {
            Some(Message::Ack(ack)) => self.hear_ack(&ack),
            Some(Message::Nack(nack)) => self.hear_nack(nack),
            Some(Message::Alive(_) | Message::Hello(_)) | None => self.gateways.said(&self.node),
        }
    }

    /// The Ack names what is in force, which may be older than what was pushed: it answers heartbeats too, and
    /// follows a Nack where other endpoints have made the refused snapshot acceptable.
    fn hear_ack(&mut self, ack: &v1::Ack) {
        if let Some(push) = self.answered(ack.nonce) {
            self.metrics.acknowledged(push.at.elapsed());
        }
        match &ack.applied {
            Some(Applied::Snapshot(applied)) => {
                let epoch = self.world.known_epoch(applied.epoch, &applied.digest);
                if self.gateways.acknowledged(&self.node, epoch) {
                    self.world.touch();
                }
            }
            Some(Applied::Endpoints(_)) | None => self.gateways.said(&self.node),
        }
    }

    fn hear_nack(&mut self, nack: v1::Nack) {
        let Some(Unanswered {
            epoch: Some(epoch), ..
        }) = self.answered(nack.nonce)
        else {
            tracing::warn!(
                node = self.node,
                code = nack.code,
                message = nack.message,
                "gateway refused endpoints"
            );
            return self.gateways.said(&self.node);
        };
        tracing::warn!(
            node = self.node,
            epoch,
            code = nack.code,
            message = nack.message,
            "gateway refused a snapshot"
        );
        self.metrics.refused(&nack.code);
        let gateway = self.node.clone();
        self.gateways.refused(
            &self.node,
            v1::GatewayNack {
                gateway,
                epoch,
                code: nack.code,
                message: nack.message,
            },
        );
        self.world.touch();
    }

    /// Endpoints go first, so that a gateway can reach whatever the snapshot names.
    async fn push_target(&mut self, target: Target) -> Result<(), Closed> {
        if self.sent_endpoints != Some(target.endpoints.version) {
            self.push(Resource::Endpoints((&*target.endpoints).into()), None, "")
                .await?;
            self.sent_endpoints = Some(target.endpoints.version);
        }
        if target.snapshot.epoch > 0 && self.sent_digest != target.digest {
            let epoch = target.snapshot.epoch;
            let snapshot = v1::Snapshot {
                digest: target.digest.to_string(),
                ..(&*target.snapshot).into()
            };
            self.push(Resource::Snapshot(snapshot), Some(epoch), &target.traceparent)
                .await?;
            self.sent_digest = target.digest;
        }
        Ok(())
    }

    async fn push_heartbeat(&mut self) -> Result<(), Closed> {
        let (epoch, endpoints_version) = {
            let target = self.target.borrow();
            (target.snapshot.epoch, target.endpoints.version)
        };
        let resource = Some(Resource::Heartbeat(v1::Heartbeat {
            epoch,
            endpoints_version,
        }));
        self.send(v1::Push {
            nonce: 0,
            resource,
            traceparent: String::new(),
        })
        .await
    }

    async fn push(
        &mut self,
        resource: Resource,
        epoch: Option<u64>,
        traceparent: &str,
    ) -> Result<(), Closed> {
        self.nonce += 1;
        self.unanswered.push_back(Unanswered {
            nonce: self.nonce,
            epoch,
            at: Instant::now(),
        });
        if self.unanswered.len() > UNANSWERED {
            self.unanswered.pop_front();
        }
        let (nonce, resource, traceparent) = (self.nonce, Some(resource), traceparent.to_owned());
        self.send(v1::Push {
            nonce,
            resource,
            traceparent,
        })
        .await
    }

    async fn send(&self, push: v1::Push) -> Result<(), Closed> {
        self.pushes.send(Ok(push)).await.map_err(|_| Closed)
    }

    /// The push that a nonce answers.
    fn answered(&mut self, nonce: u64) -> Option<Unanswered> {
        let index = self.unanswered.iter().position(|push| push.nonce == nonce)?;
        self.unanswered.remove(index)
    }
}
