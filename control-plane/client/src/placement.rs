//! A worker's stream to the control plane: placements come in, reports go out.

use std::{convert::Infallible, fmt, pin::Pin, sync::Arc, time::Duration};

use penstock_proto::v1::{self, node_message::Message, push::Resource, sync_client::SyncClient};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{
    Address,
    backoff::Backoff,
    mirror::message,
    stream::{OUTGOING, SILENCE, StreamEnd, goodbye, send},
    subscription::{BACKOFF_BASE, BACKOFF_CAP, Dial, STEADY, Tcp, overdue},
};

/// Finds the control planes' addresses; asked again before every round of attempts.
pub type LocateFn = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Vec<String>> + Send>> + Send + Sync>;

/// What the worker has of its placement, as of now.
pub type ReportFn = Arc<dyn Fn() -> v1::WorkerReport + Send + Sync>;

/// Where the control planes are.
pub enum ControlPlanes {
    /// At these addresses, tried in turn.
    At(Vec<String>),
    /// Wherever this says, e.g. under the leader's key in the store.
    Located(LocateFn),
}

/// Which worker follows its placement, and whom it asks.
#[derive(Debug)]
pub struct PlacementConfig {
    /// Whom it asks.
    pub control_planes: ControlPlanes,
    /// Id of the worker.
    pub node: String,
    /// Chosen anew at each start of the process.
    pub boot_id: String,
    /// Region, or empty.
    pub region: String,
    /// Address of the worker's operations port.
    pub ops_address: String,
    /// How often it reports where nothing changes.
    pub report_every: Duration,
}

/// Keeps a stream to one of the control planes until `shutdown`, and opens another when it breaks.
///
/// Each placement goes to `apply` and is acknowledged: that it is known, not that it is in force, which is what
/// the reports are for. They are made by `report`, one at the start of a stream, then one every
/// [`PlacementConfig::report_every`] and one whenever `changed` says so. `apply` must not block.
///
/// Without a control plane nothing happens: what the worker serves is its own affair.
pub async fn follow_placement(
    config: PlacementConfig,
    report: ReportFn,
    changed: watch::Receiver<u64>,
    apply: impl FnMut(v1::Placement) + Send,
    shutdown: CancellationToken,
) {
    let follower = Follower {
        config,
        report,
        changed,
        apply,
        applied: None,
        backoff: Backoff::new(BACKOFF_BASE, BACKOFF_CAP),
        connected: false,
        warned: false,
    };
    tokio::select! {
        () = follower.run(&Tcp, &shutdown) => {}
        () = overdue(&shutdown) => {}
    }
}

struct Follower<A> {
    config: PlacementConfig,
    report: ReportFn,
    changed: watch::Receiver<u64>,
    apply: A,
    /// Version of the placement that was applied last.
    applied: Option<u64>,
    backoff: Backoff,
    /// Something was heard on the present stream.
    connected: bool,
    /// One line per outage, not one per attempt.
    warned: bool,
}

// === impl ControlPlanes ===

impl fmt::Debug for ControlPlanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(addresses) => f.debug_tuple("At").field(addresses).finish(),
            Self::Located(_) => f.write_str("Located"),
        }
    }
}

impl ControlPlanes {
    async fn addresses(&self) -> Vec<String> {
        match self {
            Self::At(addresses) => addresses.clone(),
            Self::Located(locate) => locate().await,
        }
    }
}

// === impl Follower ===

impl<A: FnMut(v1::Placement) + Send> Follower<A> {
    async fn run<D: Dial>(mut self, dial: &D, shutdown: &CancellationToken) {
        loop {
            let addresses = shutdown.run_until_cancelled(self.config.control_planes.addresses());
            let Some(addresses) = addresses.await else { return };
            if addresses.is_empty() {
                self.tell("none is known yet");
            }
            for address in addresses {
                let started = Instant::now();
                let end = self.attempt(&address, dial, shutdown).await;
                if matches!(end, Ok(StreamEnd::Left)) {
                    return;
                }
                let held = std::mem::take(&mut self.connected);
                if held && started.elapsed() >= STEADY {
                    self.backoff.reset();
                }
                self.warned &= !held;
                match end {
                    Ok(end) => self.tell(&format!("{address}: {}", end.reason())),
                    Err(reason) => self.tell(&reason),
                }
                if held {
                    // Whoever led may have told the store who does now.
                    break;
                }
            }
            let delay = self.backoff.next(&mut rand::rng());
            if shutdown.run_until_cancelled(sleep(delay)).await.is_none() {
                return;
            }
        }
    }

    /// One stream, from its address to its end; an error says that the address is none.
    async fn attempt<D: Dial>(
        &mut self,
        address: &str,
        dial: &D,
        shutdown: &CancellationToken,
    ) -> Result<StreamEnd, String> {
        let address: Address = address
            .parse()
            .map_err(|error: crate::AddressError| error.to_string())?;
        let end = match shutdown.run_until_cancelled(dial.dial(&address)).await {
            None => StreamEnd::Left,
            Some(Err(error)) => StreamEnd::Connect(error),
            Some(Ok(channel)) => match self.exchange(channel, shutdown).await {
                Ok(never) => match never {},
                Err(end) => end,
            },
        };
        Ok(end)
    }

    fn tell(&mut self, reason: &str) {
        if std::mem::replace(&mut self.warned, true) {
            tracing::debug!("no control plane: {reason}");
        } else {
            tracing::warn!("no control plane: {reason}; what is served is served on");
        }
    }

    async fn exchange(
        &mut self,
        channel: Channel,
        shutdown: &CancellationToken,
    ) -> Result<Infallible, StreamEnd> {
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        send(&outgoing, self.hello()).await?;
        let mut client = SyncClient::new(channel);
        let opened = timeout(SILENCE, client.sync(ReceiverStream::new(requests)));
        let mut pushes = opened.await.map_err(|_| StreamEnd::Silent)??.into_inner();

        // The first tick comes at once.
        let mut due = interval(self.config.report_every);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut changed = self.changed.clone();
        changed.mark_unchanged();
        let silence = sleep(SILENCE);
        tokio::pin!(silence);
        loop {
            tokio::select! {
                push = pushes.message() => {
                    let push = push?.ok_or(StreamEnd::Closed)?;
                    silence.as_mut().reset(Instant::now() + SILENCE);
                    if !std::mem::replace(&mut self.connected, true) {
                        tracing::info!("connected to the control plane");
                    }
                    let answer = self.answer(push);
                    send(&outgoing, answer).await?;
                }
                _ = due.tick() => send(&outgoing, self.reported()).await?,
                Ok(()) = changed.changed() => {
                    due.reset();
                    send(&outgoing, self.reported()).await?;
                }
                () = &mut silence => return Err(StreamEnd::Silent),
                () = shutdown.cancelled() => {
                    drop(outgoing);
                    return Err(goodbye(pushes).await);
                }
            }
        }
    }

    fn hello(&self) -> v1::NodeMessage {
        message(Message::Hello(v1::Hello {
            role: v1::hello::Role::Worker.into(),
            node: self.config.node.clone(),
            boot_id: self.config.boot_id.clone(),
            region: self.config.region.clone(),
            ops_address: self.config.ops_address.clone(),
            ..v1::Hello::default()
        }))
    }

    fn reported(&self) -> v1::NodeMessage {
        message(Message::Worker((self.report)()))
    }

    fn answer(&mut self, push: v1::Push) -> v1::NodeMessage {
        let nonce = push.nonce;
        match push.resource {
            Some(Resource::Placement(placement)) => {
                self.applied = Some(placement.version);
                (self.apply)(placement);
            }
            // Nothing to take over; the answer says what is known.
            Some(Resource::Heartbeat(_)) => {}
            Some(Resource::Snapshot(_) | Resource::Endpoints(_)) | None => {
                return message(Message::Nack(v1::Nack {
                    nonce,
                    code: "unknown_resource".into(),
                    field: "resource".into(),
                    message: "a worker takes placements; the rest is for gateways".into(),
                    ..v1::Nack::default()
                }));
            }
        }
        let applied = self
            .applied
            .map(|version| v1::ack::Applied::Placement(v1::AppliedPlacement { version }));
        message(Message::Ack(v1::Ack { nonce, applied }))
    }
}

#[cfg(test)]
mod tests;
