//! One Sync stream, from Hello to its end.

use std::{collections::HashSet, convert::Infallible, time::Duration};

use penstock_proto::v1::{self, node_message::Message, sync_client::SyncClient};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    ReachFn, StatsFn, SyncConfig,
    address::root_cause,
    mirror::{Mirror, Wanted, message},
};

/// A control plane that says nothing for this long is given up: it sends heartbeats several times as often.
pub(crate) const SILENCE: Duration = Duration::from_secs(15);

/// Answers on their way out. A push brings two at most and the next one is read only when they are queued.
pub(crate) const OUTGOING: usize = 8;

/// How often a node reports, and asks workers that vanished.
const SECOND: Duration = Duration::from_secs(1);

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
    reports: &mut Reports,
    leave: &CancellationToken,
) -> StreamEnd {
    match exchange(channel, config, mirror, reports, leave).await {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

async fn exchange(
    channel: Channel,
    config: &SyncConfig,
    mirror: &mut Mirror,
    reports: &mut Reports,
    leave: &CancellationToken,
) -> Result<Infallible, StreamEnd> {
    let (outgoing, requests) = mpsc::channel(OUTGOING);
    send(&outgoing, hello(config, mirror)).await?;
    let mut client = SyncClient::new(channel).max_decoding_message_size(MAX_PUSH_BYTES);
    let opened = timeout(SILENCE, client.sync(ReceiverStream::new(requests)));
    let mut pushes = opened.await.map_err(|_| StreamEnd::Silent)??.into_inner();

    let mut line = Line {
        outgoing: &outgoing,
        config,
        mirror,
        reports,
    };
    let mut alive = every(config.alive_every);
    let mut second = every(SECOND);
    let mut asked = JoinSet::new();
    let silence = sleep(SILENCE);
    tokio::pin!(silence);
    loop {
        tokio::select! {
            push = pushes.message() => {
                let push = push?.ok_or(StreamEnd::Closed)?;
                line.take(push).await?;
                silence.as_mut().reset(Instant::now() + SILENCE);
            }
            _ = alive.tick() => {
                send(&outgoing, message(Message::Alive(v1::Alive {}))).await?;
                line.again().await?;
            }
            _ = second.tick() => {
                line.report().await?;
                if asked.is_empty() {
                    line.ask_kept(&mut asked);
                }
            }
            Some(Ok((id, answers))) = asked.join_next() => line.mirror.answered(&id, answers),
            () = &mut silence => return Err(StreamEnd::Silent),
            () = leave.cancelled() => {
                drop(outgoing);
                return Err(goodbye(pushes).await);
            }
        }
    }
}

fn every(period: Duration) -> Interval {
    let mut interval = interval_at(Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// The node's side of an open stream.
struct Line<'l> {
    outgoing: &'l mpsc::Sender<v1::NodeMessage>,
    config: &'l SyncConfig,
    mirror: &'l mut Mirror,
    reports: &'l mut Reports,
}

impl Line<'_> {
    /// Answers a push; a snapshot that is newly applied is followed by a report at once.
    async fn take(&mut self, push: v1::Push) -> Result<(), StreamEnd> {
        if !self.mirror.set_connected(true) {
            tracing::info!("connected to the control plane");
        }
        let (before, ..) = self.mirror.applied();
        let wanted = self.mirror.wanted(&push);
        self.ask(wanted).await;
        for answer in self.mirror.handle(push) {
            send(self.outgoing, answer).await?;
        }
        let (now, ..) = self.mirror.applied();
        if now != before {
            self.report().await?;
        }
        Ok(())
    }

    /// A worker may answer again although nothing was pushed: then the snapshot that was refused is offered again.
    async fn again(&mut self) -> Result<(), StreamEnd> {
        let wanted = self.mirror.wanted_again();
        if self.ask(wanted).await
            && let Some(late) = self.mirror.again()
        {
            send(self.outgoing, late).await?;
            self.report().await?;
        }
        Ok(())
    }

    /// Asks workers whether they answer. Returns whether others do than before.
    async fn ask(&mut self, wanted: Vec<Wanted>) -> bool {
        let Some(reach) = self.config.reach.as_ref().filter(|_| !wanted.is_empty()) else {
            return false;
        };
        let mut reached = HashSet::new();
        for wanted in wanted {
            reached.extend(enough(reach, wanted).await);
        }
        self.mirror.set_reached(reached)
    }

    async fn report(&mut self) -> Result<(), StreamEnd> {
        match self.reports.next() {
            Some(stats) => send(self.outgoing, message(Message::Stats(stats))).await,
            None => Ok(()),
        }
    }

    /// Starts to ask the workers that vanished with many others.
    fn ask_kept(&self, asked: &mut JoinSet<(String, bool)>) {
        let Some(reach) = &self.config.reach else { return };
        for endpoint in self.mirror.kept() {
            let (id, answers) = (endpoint.id.clone(), reach(endpoint));
            asked.spawn(async move { (id, answers.await) });
        }
    }
}

/// Asks until as many have answered as are wanted.
async fn enough(reach: &ReachFn, wanted: Wanted) -> HashSet<String> {
    let mut asked = JoinSet::new();
    for endpoint in wanted.endpoints {
        let (id, answers) = (endpoint.id.clone(), reach(endpoint));
        asked.spawn(async move { answers.await.then_some(id) });
    }
    let mut reached = HashSet::new();
    while reached.len() < wanted.least
        && let Some(answer) = asked.join_next().await
    {
        reached.extend(answer.ok().flatten());
    }
    reached
}

/// A node's reports, numbered over all streams of the process.
pub(crate) struct Reports {
    stats: Option<StatsFn>,
    sequence: u64,
}

impl Reports {
    pub(crate) fn new(stats: Option<StatsFn>) -> Self {
        Self { stats, sequence: 0 }
    }

    fn next(&mut self) -> Option<v1::Stats> {
        let stats = self.stats.as_ref()?;
        self.sequence += 1;
        Some(v1::Stats {
            sequence: self.sequence,
            ..stats()
        })
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
