//! A control plane whose part the test plays by hand.

use super::*;
use hyper_util::rt::TokioIo;
use penstock_proto::v1::sync_server::{Sync, SyncServer};
use std::{io, sync::atomic::AtomicBool};
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Streaming,
    transport::{Endpoint, Server},
};

type Attempts = Arc<Mutex<Vec<(String, Instant)>>>;

/// The control plane.
pub(crate) struct Plane {
    sessions: mpsc::Receiver<Session>,
    dialer: Memory,
}

/// One Sync stream, from the control plane's side.
pub(crate) struct Session {
    messages: Streaming<v1::NodeMessage>,
    pushes: mpsc::Sender<Result<v1::Push, Status>>,
}

/// Connects in memory, or not at all.
#[derive(Clone)]
pub(crate) struct Memory {
    connections: mpsc::Sender<Result<DuplexStream, io::Error>>,
    refuses: Arc<AtomicBool>,
    attempts: Attempts,
}

struct Service(mpsc::Sender<Session>);

// === impl Plane ===

impl Plane {
    pub(crate) fn start() -> Self {
        let (opened, sessions) = mpsc::channel(8);
        let (connections, incoming) = mpsc::channel(8);
        let server = Server::builder().add_service(SyncServer::new(Service(opened)));
        tokio::spawn(server.serve_with_incoming(ReceiverStream::new(incoming)));
        let dialer = Memory {
            connections,
            refuses: Arc::default(),
            attempts: Attempts::default(),
        };
        Self { sessions, dialer }
    }

    pub(crate) fn dialer(&self) -> Memory {
        self.dialer.clone()
    }

    pub(crate) fn refuse(&self, refuse: bool) {
        self.dialer.refuses.store(refuse, Ordering::Relaxed);
    }

    /// Where and when a connection was tried.
    pub(crate) fn attempts(&self) -> Vec<(String, Instant)> {
        self.dialer.attempts.lock().unwrap().clone()
    }

    /// The next stream that a node opens.
    pub(crate) async fn session(&mut self) -> Session {
        self.sessions.recv().await.unwrap()
    }
}

// === impl Session ===

impl Session {
    /// What the node says next.
    pub(crate) async fn next(&mut self) -> Message {
        self.messages.message().await.unwrap().unwrap().message.unwrap()
    }

    pub(crate) async fn push(&self, nonce: u64, resource: Resource) {
        let push = v1::Push {
            nonce,
            resource: Some(resource),
            traceparent: String::new(),
        };
        self.pushes.send(Ok(push)).await.unwrap();
    }

    /// Completes when the node has ended its side in good order.
    pub(crate) async fn until_left(&mut self) {
        assert_eq!(self.messages.message().await.unwrap(), None);
    }

    /// Breaks the stream off.
    pub(crate) async fn fail(self, status: Status) {
        self.pushes.send(Err(status)).await.unwrap();
    }
}

// === impl Memory ===

impl Dial for Memory {
    async fn dial(&self, address: &Address) -> Result<Channel, tonic::transport::Error> {
        self.attempts
            .lock()
            .unwrap()
            .push((address.to_string(), Instant::now()));
        let (connections, refuses) = (self.connections.clone(), self.refuses.load(Ordering::Relaxed));
        let connector = tower::service_fn(move |_| {
            let connections = connections.clone();
            async move {
                if refuses {
                    return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
                }
                let (client, server) = tokio::io::duplex(64 << 10);
                connections.send(Ok(server)).await.map_err(io::Error::other)?;
                Ok(TokioIo::new(client))
            }
        });
        Endpoint::from_shared(address.to_string())?
            .connect_with_connector(connector)
            .await
    }
}

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
        };
        self.0
            .send(session)
            .await
            .map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}
