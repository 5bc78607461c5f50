//! A control plane whose part the test plays by hand.

use std::{net::SocketAddr, time::Duration};

use gateway::Config;
use penstock_client::View;
use penstock_plan::Snapshot;
use penstock_proto::v1::{
    self,
    ack::Applied,
    node_message::Message,
    push::Resource,
    sync_server::{Sync, SyncServer},
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::support::{TestGateway, config};

/// Takes one gateway.
pub(crate) struct ControlPlane {
    pub(crate) address: SocketAddr,
    pub(crate) sessions: mpsc::Receiver<Session>,
}

pub(crate) struct Session {
    messages: Streaming<v1::NodeMessage>,
    pushes: mpsc::Sender<Result<v1::Push, Status>>,
    nonce: u64,
    reports: u32,
}

struct Service(mpsc::Sender<Session>);

#[tonic::async_trait]
impl Sync for Service {
    type SyncStream = ReceiverStream<Result<v1::Push, Status>>;

    async fn sync(
        &self,
        request: Request<Streaming<v1::NodeMessage>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let (pushes, replies) = mpsc::channel(8);
        let session = Session {
            messages: request.into_inner(),
            pushes,
            nonce: 0,
            reports: 0,
        };
        self.0.send(session).await.unwrap();
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

impl ControlPlane {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (opened, sessions) = mpsc::channel(8);
        let server = tonic::transport::Server::builder().add_service(SyncServer::new(Service(opened)));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { address, sessions }
    }

    /// A gateway that follows it, and their stream after the Hello.
    pub(crate) async fn gateway(&mut self) -> (TestGateway, Session) {
        self.gateway_with(|_| {}).await
    }

    /// The same with another configuration.
    pub(crate) async fn gateway_with(&mut self, change: impl FnOnce(&mut Config)) -> (TestGateway, Session) {
        let mut config = config(View::default());
        config.control_planes = vec![self.address.to_string()];
        change(&mut config);
        let gateway = TestGateway::run(config).await;
        let mut session = self.sessions.recv().await.unwrap();
        assert!(matches!(session.next().await, Message::Hello(_)));
        (gateway, session)
    }
}

impl Session {
    /// Pushes a resource and returns the answer to it.
    pub(crate) async fn push(&mut self, resource: Resource) -> Message {
        self.nonce += 1;
        let push = v1::Push {
            nonce: self.nonce,
            resource: Some(resource),
            traceparent: String::new(),
        };
        self.pushes.send(Ok(push)).await.unwrap();
        self.next().await
    }

    /// What the gateway says next, save that it is alive and what it counted.
    pub(crate) async fn next(&mut self) -> Message {
        loop {
            match self.any().await {
                Message::Alive(_) | Message::Stats(_) => {}
                message => return message,
            }
        }
    }

    /// The next report, other messages left out.
    pub(crate) async fn stats(&mut self) -> v1::Stats {
        loop {
            if let Message::Stats(stats) = self.any().await {
                // Whoever waits for a count that never comes fails here instead of waiting for ever.
                self.reports += 1;
                assert!(self.reports < 60, "after 60 reports: {stats:?}");
                return stats;
            }
        }
    }

    async fn any(&mut self) -> Message {
        let said = tokio::time::timeout(Duration::from_secs(10), self.messages.message());
        said.await.unwrap().unwrap().unwrap().message.unwrap()
    }

    pub(crate) async fn endpoints(&mut self, view: &View) -> Message {
        self.push(Resource::Endpoints((&*view.endpoints).into())).await
    }

    pub(crate) async fn snapshot(&mut self, view: &View, epoch: u64) -> Message {
        let snapshot = Snapshot {
            epoch,
            ..Snapshot::clone(view.snapshot.as_ref().unwrap())
        };
        self.push(Resource::Snapshot((&snapshot).into())).await
    }
}

pub(crate) fn acknowledged(message: &Message) -> Option<u64> {
    match message {
        Message::Ack(ack) => match &ack.applied {
            Some(Applied::Snapshot(snapshot)) => Some(snapshot.epoch),
            _ => None,
        },
        _ => None,
    }
}
