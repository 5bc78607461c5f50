//! One Sync stream, from Hello to its end.

use std::{convert::Infallible, time::Duration};

use penstock_proto::v1::{self, node_message::Message, sync_client::SyncClient};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    SyncConfig,
    address::root_cause,
    mirror::{Mirror, message},
};

/// A control plane that says nothing for this long is given up: it sends heartbeats several times as often.
pub(crate) const SILENCE: Duration = Duration::from_secs(15);

/// Answers on their way out. A push brings two at most and the next one is read only when they are queued.
pub(crate) const OUTGOING: usize = 8;

/// Every route of every model in one message; far above tonic's default of 4 MiB for a reply.
const MAX_PUSH_BYTES: usize = 64 << 20;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamEnd {
    /// It never began.
    #[error("cannot connect")]
    Connect(#[source] tonic::transport::Error),
    /// The control plane refused it or broke it off.
    #[error("{}: {}", .0.code().description(), .0.message())]
    Status(Box<Status>),
    /// The control plane ended it in order, as it does when it drains.
    #[error("the control plane ended the stream")]
    Closed,
    /// The node said goodbye.
    #[error("the node has left")]
    Left,
    /// The control plane stopped talking, or reading.
    #[error("the control plane was silent for {SILENCE:?}")]
    Silent,
}

/// Opens a stream on `channel` and follows it to its end, or until the node is to `leave`.
pub(crate) async fn follow(
    channel: Channel,
    config: &SyncConfig,
    mirror: &mut Mirror,
    leave: &CancellationToken,
) -> StreamEnd {
    match exchange(channel, config, mirror, leave).await {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

async fn exchange(
    channel: Channel,
    config: &SyncConfig,
    mirror: &mut Mirror,
    leave: &CancellationToken,
) -> Result<Infallible, StreamEnd> {
    let (outgoing, requests) = mpsc::channel(OUTGOING);
    send(&outgoing, hello(config, mirror)).await?;
    let mut client = SyncClient::new(channel).max_decoding_message_size(MAX_PUSH_BYTES);
    let opened = timeout(SILENCE, client.sync(ReceiverStream::new(requests)));
    let mut pushes = opened.await.map_err(|_| StreamEnd::Silent)??.into_inner();

    let mut alive = interval_at(Instant::now() + config.alive_every, config.alive_every);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let silence = sleep(SILENCE);
    tokio::pin!(silence);
    loop {
        tokio::select! {
            push = pushes.message() => {
                let push = push?.ok_or(StreamEnd::Closed)?;
                silence.as_mut().reset(Instant::now() + SILENCE);
                if !mirror.set_connected(true) {
                    tracing::info!("connected to the control plane");
                }
                for answer in mirror.handle(push) {
                    send(&outgoing, answer).await?;
                }
            }
            _ = alive.tick() => send(&outgoing, message(Message::Alive(v1::Alive {}))).await?,
            () = &mut silence => return Err(StreamEnd::Silent),
            () = leave.cancelled() => {
                drop(outgoing);
                return Err(goodbye(pushes).await);
            }
        }
    }
}

/// Waits until the control plane has seen the end of our side. The process may exit next, and a connection that
/// merely breaks looks like a crash: a node that crashed counts as live, and is waited for, until it is lost.
pub(crate) async fn goodbye(mut pushes: Streaming<v1::Push>) -> StreamEnd {
    while let Ok(Some(_)) = pushes.message().await {}
    StreamEnd::Left
}

/// Queues an answer; a control plane that reads none for so long is as good as gone.
pub(crate) async fn send(
    outgoing: &mpsc::Sender<v1::NodeMessage>,
    answer: v1::NodeMessage,
) -> Result<(), StreamEnd> {
    match timeout(SILENCE, outgoing.send(answer)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(StreamEnd::Closed),
        Err(_) => Err(StreamEnd::Silent),
    }
}

fn hello(config: &SyncConfig, mirror: &Mirror) -> v1::NodeMessage {
    let (applied_epoch, applied_digest, applied_endpoints) = mirror.applied();
    message(Message::Hello(v1::Hello {
        role: v1::hello::Role::Gateway.into(),
        node: config.node.clone(),
        boot_id: config.boot_id.clone(),
        region: config.region.clone(),
        ops_address: config.ops_address.clone(),
        applied_epoch,
        applied_digest,
        applied_endpoints,
    }))
}

// === impl StreamEnd ===

impl StreamEnd {
    /// What to say of it, with the cause that helps.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Connect(error) => format!("{self}: {}", root_cause(error)),
            Self::Status(_) | Self::Closed | Self::Left | Self::Silent => self.to_string(),
        }
    }
}

impl From<Status> for StreamEnd {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}
