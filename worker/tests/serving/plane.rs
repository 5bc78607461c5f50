//! A control plane whose part the test plays by hand.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use penstock_proto::v1::{
    self,
    node_message::Message,
    push::Resource,
    revision_state::State,
    sync_server::{Sync, SyncServer},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Longest that a test waits for a report.
const PATIENCE: Duration = Duration::from_secs(20);

/// The control plane. Dropping it ends it.
pub(crate) struct Plane {
    pub(crate) address: SocketAddr,
    placement: watch::Sender<v1::Placement>,
    heard: watch::Receiver<Heard>,
    server: tokio::task::JoinHandle<()>,
}

/// What the worker said last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard {
    pub(crate) hello: Option<v1::Hello>,
    pub(crate) applied: u64,
    pub(crate) report: v1::WorkerReport,
    /// Every state in which a revision was, in their order.
    pub(crate) states: Vec<(String, State)>,
}

#[derive(Clone)]
struct Service {
    placement: watch::Sender<v1::Placement>,
    heard: Arc<watch::Sender<Heard>>,
}

// === impl Plane ===

impl Plane {
    /// Starts on a free port, with nothing placed.
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let placement = watch::Sender::new(v1::Placement::default());
        let (sender, heard) = watch::channel(Heard::default());
        let service = Service {
            placement: placement.clone(),
            heard: Arc::new(sender),
        };
        let server = tonic::transport::Server::builder().add_service(SyncServer::new(service));
        let server = tokio::spawn(async move {
            server
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        Self {
            address,
            placement,
            heard,
            server,
        }
    }

    /// Places exactly these.
    pub(crate) fn place(&self, revisions: impl IntoIterator<Item = v1::PlacedRevision>) {
        self.placement.send_modify(|placement| {
            placement.version += 1;
            placement.revisions = revisions.into_iter().collect();
        });
    }

    /// What was heard last.
    pub(crate) fn heard(&self) -> Heard {
        self.heard.borrow().clone()
    }

    /// Waits until what was heard is as `check` wants it.
    pub(crate) async fn until(&mut self, what: &str, check: impl FnMut(&Heard) -> bool) -> Heard {
        let waited = tokio::time::timeout(PATIENCE, self.heard.clone().wait_for(check))
            .await
            .map(|heard| heard.unwrap().clone());
        match waited {
            Ok(heard) => heard,
            Err(_) => panic!("{what}: not within {PATIENCE:?}; heard {:?}", self.heard()),
        }
    }

    /// Waits until `demo@revision` is in this state and gives what is told of it.
    pub(crate) async fn until_in(&mut self, revision: &str, state: State) -> v1::RevisionState {
        let what = format!("{revision} is {state:?}");
        let in_state = |heard: &Heard| heard.of(revision).is_some_and(|told| told.state() == state);
        let heard = self.until(&what, in_state).await;
        heard.of(revision).unwrap().clone()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.server.abort();
    }
}

// === impl Heard ===

impl Heard {
    /// What was told of a revision of the demo.
    pub(crate) fn of(&self, revision: &str) -> Option<&v1::RevisionState> {
        let mut told = self.report.revisions.iter();
        told.find(|told| told.model == "demo" && told.revision == revision)
    }

    /// The states in which a revision was.
    pub(crate) fn states_of(&self, revision: &str) -> Vec<State> {
        let states = self.states.iter().filter(|(name, _)| name == revision);
        states.map(|(_, state)| *state).collect()
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Hello(hello) => self.hello = Some(hello),
            Message::Ack(v1::Ack {
                applied: Some(v1::ack::Applied::Placement(applied)),
                ..
            }) => self.applied = applied.version,
            Message::Worker(report) => {
                for told in &report.revisions {
                    let next = (told.revision.clone(), told.state());
                    let last = self.states.iter().rev().find(|(name, _)| *name == next.0);
                    if last != Some(&next) {
                        self.states.push(next);
                    }
                }
                self.report = report;
            }
            other => panic!("a worker does not say {other:?}"),
        }
    }
}

#[tonic::async_trait]
impl Sync for Service {
    type SyncStream = ReceiverStream<Result<v1::Push, Status>>;

    async fn sync(
        &self,
        request: Request<Streaming<v1::NodeMessage>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let mut inbound = request.into_inner();
        let (pushes, outbound) = mpsc::channel(8);
        let mut placement = self.placement.subscribe();
        placement.mark_changed();
        let heard = self.heard.clone();
        tokio::spawn(async move {
            let mut nonce = 0;
            loop {
                tokio::select! {
                    message = inbound.message() => match message {
                        Ok(Some(message)) => heard.send_modify(|heard| heard.hear(message.message.unwrap())),
                        _ => return,
                    },
                    Ok(()) = placement.changed() => {
                        nonce += 1;
                        let resource = Some(Resource::Placement(placement.borrow_and_update().clone()));
                        let push = v1::Push { nonce, resource, traceparent: String::new() };
                        if pushes.send(Ok(push)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}
