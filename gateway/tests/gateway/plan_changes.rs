//! Plan changes, told by a control plane whose part the test plays by hand.

use std::{net::SocketAddr, sync::Arc, time::Duration};

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

use crate::support::{Behaviour, TestGateway, TestWorker, config, eventually, generate, prompt, view, with};

/// Takes one gateway.
struct ControlPlane {
    address: SocketAddr,
    sessions: mpsc::Receiver<Session>,
}

struct Session {
    messages: Streaming<v1::NodeMessage>,
    pushes: mpsc::Sender<Result<v1::Push, Status>>,
    nonce: u64,
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
        };
        self.0.send(session).await.unwrap();
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

impl ControlPlane {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (opened, sessions) = mpsc::channel(8);
        let server = tonic::transport::Server::builder().add_service(SyncServer::new(Service(opened)));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { address, sessions }
    }
}

impl Session {
    /// Pushes a resource and returns the answer to it.
    async fn push(&mut self, resource: Resource) -> Message {
        self.nonce += 1;
        let push = v1::Push {
            nonce: self.nonce,
            resource: Some(resource),
            traceparent: String::new(),
        };
        self.pushes.send(Ok(push)).await.unwrap();
        self.next().await
    }

    /// What the gateway says next, save that it is alive.
    async fn next(&mut self) -> Message {
        loop {
            let said = tokio::time::timeout(Duration::from_secs(10), self.messages.message());
            match said.await.unwrap().unwrap().unwrap().message.unwrap() {
                Message::Alive(_) => {}
                message => return message,
            }
        }
    }

    async fn endpoints(&mut self, view: &View) -> Message {
        self.push(Resource::Endpoints((&*view.endpoints).into())).await
    }

    async fn snapshot(&mut self, view: &View, epoch: u64) -> Message {
        let snapshot = Snapshot {
            epoch,
            ..Snapshot::clone(view.snapshot.as_ref().unwrap())
        };
        self.push(Resource::Snapshot((&snapshot).into())).await
    }
}

fn acknowledged(message: &Message) -> Option<u64> {
    match message {
        Message::Ack(ack) => match &ack.applied {
            Some(Applied::Snapshot(snapshot)) => Some(snapshot.epoch),
            _ => None,
        },
        _ => None,
    }
}

#[tokio::test]
async fn a_canary_that_nobody_serves_is_refused_until_somebody_does() {
    let worker = TestWorker::start(Behaviour::Speak).await;
    let mut plane = ControlPlane::start().await;
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(View::default());
    config.control_planes = vec![plane.address.to_string()];
    config.state_dir = Some(directory.path().to_owned());
    let gateway = TestGateway::run(config).await;
    let mut session = plane.sessions.recv().await.unwrap();
    assert!(matches!(session.next().await, Message::Hello(_)));

    let without = view(0, vec![worker.endpoint("w", &["v1"])]);
    session.endpoints(&without).await;
    assert_eq!(acknowledged(&session.snapshot(&without, 1).await), Some(1));

    let all = view(100, vec![worker.endpoint("w", &["v1", "v2"])]);
    match session.snapshot(&all, 2).await {
        Message::Nack(nack) => {
            assert_eq!((nack.epoch, nack.code.as_str()), (2, "canary_unreachable"));
            assert_eq!(nack.field, "routes[demo].canary");
            assert!(nack.message.contains("demo@v2"), "{}", nack.message);
        }
        other => panic!("{other:?}"),
    }
    let mut client = gateway.client().await;
    let mut served = async || {
        let reply = generate(&mut client, with(prompt("demo"), &[("x-user-id", "ada")]));
        let (metadata, _) = reply.await.unwrap();
        ["x-rollout-epoch", "x-model-version"]
            .map(|name| metadata.get(name).unwrap().to_str().unwrap().to_owned())
    };
    assert_eq!(served().await, ["1", "v1"], "the old snapshot stays in force");

    // Once a worker serves the canary, the snapshot that was refused is taken without being sent again.
    let more = View {
        endpoints: Arc::new(penstock_plan::EndpointSet {
            version: 2,
            ..(*all.endpoints).clone()
        }),
        ..all.clone()
    };
    let first = session.endpoints(&more).await;
    let acknowledgement = match acknowledged(&first) {
        Some(_) => first,
        None => session.next().await,
    };
    assert_eq!(acknowledged(&acknowledgement), Some(2), "{acknowledgement:?}");
    assert_eq!(served().await, ["2", "v2"]);
    eventually("the snapshot in force is on disk", async || {
        let kept = std::fs::read_to_string(directory.path().join("view.json"));
        kept.is_ok_and(|kept| {
            let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
            kept["snapshot"]["epoch"] == 2
        })
    })
    .await;
}

#[tokio::test]
async fn a_stream_keeps_its_revision_when_the_plan_changes() {
    let worker = TestWorker::start(Behaviour::Hang).await;
    let mut plane = ControlPlane::start().await;
    let mut config = config(View::default());
    config.control_planes = vec![plane.address.to_string()];
    let gateway = TestGateway::run(config).await;
    let mut session = plane.sessions.recv().await.unwrap();
    session.next().await;
    let none = view(0, vec![worker.endpoint("w", &["v1", "v2"])]);
    session.endpoints(&none).await;
    session.snapshot(&none, 1).await;

    let mut client = gateway.client().await;
    let response = client.generate(prompt("demo")).await.unwrap();
    assert_eq!(response.metadata().get("x-model-version").unwrap(), "v1");
    let mut stream = response.into_inner();
    stream.message().await.unwrap().unwrap();
    let all = view(100, vec![]);
    assert_eq!(
        acknowledged(&session.snapshot(&view(100, vec![]), 2).await),
        Some(2)
    );
    // Not even the loss of every worker in the view ends a stream that is under way.
    let gone = View {
        endpoints: Arc::new(penstock_plan::EndpointSet {
            version: 9,
            ..(*all.endpoints).clone()
        }),
        ..all
    };
    session.endpoints(&gone).await;
    let status = generate(&mut gateway.client().await, with(prompt("demo"), &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert_eq!(status.metadata().get("x-model-version").unwrap(), "v2");
    let more = tokio::time::timeout(Duration::from_millis(200), stream.message()).await;
    assert!(more.is_err(), "the stream goes on: {more:?}");
    assert_eq!(worker.requests(), 1);
}
