//! A worker with the fake runner on free ports, and what the tests say to it.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use penstock_proto::v1::{self, inference_client::InferenceClient};
use penstock_store::{Store, embedded::EmbeddedStore};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, Streaming, metadata::MetadataMap, transport::Channel};
use worker::{Addresses, Config, Readiness, RunError, RunnerKind};

pub(crate) type Client = InferenceClient<Channel>;

/// A worker under test.
pub(crate) struct Running {
    pub(crate) addresses: Addresses,
    pub(crate) client: Client,
    pub(crate) readiness: watch::Receiver<Readiness>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) ended: JoinHandle<Result<(), RunError>>,
}

/// An empty store.
pub(crate) fn store() -> Arc<dyn Store> {
    Arc::new(EmbeddedStore::in_memory())
}

/// `models` on the fake runner, one step per `pace`.
pub(crate) fn config(store: Arc<dyn Store>, models: &[&str], pace: Duration) -> Config {
    let models = models.iter().map(|spec| spec.parse().unwrap()).collect();
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        ops_listen: ([127, 0, 0, 1], 0).into(),
        runner: RunnerKind::Fake { pace },
        ..Config::new(store, models)
    }
}

/// Starts a worker and waits until it serves.
pub(crate) async fn start(config: Config) -> Running {
    start_until(config, Readiness::Serving).await
}

/// Starts a worker that has nothing to serve yet.
pub(crate) async fn start_empty(config: Config) -> Running {
    start_until(config, Readiness::Empty).await
}

async fn start_until(config: Config, wanted: Readiness) -> Running {
    let server = config.build().await.unwrap();
    let addresses = server.addresses();
    let readiness = server.readiness();
    let shutdown = CancellationToken::new();
    let ended = tokio::spawn(server.run(shutdown.clone()));
    readiness
        .clone()
        .wait_for(|state| *state == wanted)
        .await
        .unwrap();
    let client = InferenceClient::connect(format!("http://{}", addresses.listen))
        .await
        .unwrap();
    Running {
        addresses,
        client,
        readiness,
        shutdown,
        ended,
    }
}

/// `demo@v1` without pauses.
pub(crate) async fn fast() -> Running {
    start(config(store(), &["demo@v1"], Duration::ZERO)).await
}

/// `demo@v1`, slow enough that a stream of many tokens is under way for long.
pub(crate) async fn slow() -> Running {
    start(config(store(), &["demo@v1"], Duration::from_millis(10))).await
}

/// A prompt with sampling parameters.
pub(crate) fn prompt(text: &str, sampling: v1::SamplingParams) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: "demo".into(),
        input: Some(v1::generate_request::Input::Prompt(text.into())),
        sampling: Some(sampling),
        ..Default::default()
    }
}

/// At most so many tokens.
pub(crate) fn tokens(max: u32) -> v1::SamplingParams {
    v1::SamplingParams {
        max_tokens: Some(max),
        ..Default::default()
    }
}

/// A call with metadata.
pub(crate) fn with<T>(message: T, metadata: &[(&'static str, &str)]) -> Request<T> {
    let mut request = Request::new(message);
    for (name, value) in metadata {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    request
}

/// A whole reply.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) headers: MetadataMap,
    pub(crate) chunks: Vec<v1::GenerateResponse>,
    pub(crate) status: Option<Status>,
    pub(crate) stats: Option<v1::RequestStats>,
}

impl Reply {
    pub(crate) fn text(&self) -> String {
        self.chunks.iter().map(|chunk| chunk.text.as_str()).collect()
    }

    pub(crate) fn ids(&self) -> Vec<u32> {
        self.chunks
            .iter()
            .flat_map(|chunk| chunk.token_ids.clone())
            .collect()
    }

    pub(crate) fn usage(&self) -> v1::Usage {
        self.chunks.last().unwrap().usage.unwrap()
    }
}

/// Makes a call and reads its reply to the end.
pub(crate) async fn generate(
    client: &mut Client,
    request: Request<v1::GenerateRequest>,
) -> Result<Reply, Status> {
    let response = client.generate(request).await?;
    let headers = response.metadata().clone();
    Ok(Reply {
        headers,
        ..read(response.into_inner()).await
    })
}

/// Reads a stream to its end.
pub(crate) async fn read(mut stream: Streaming<v1::GenerateResponse>) -> Reply {
    let mut reply = Reply::default();
    while let Some(item) = stream.next().await {
        match item {
            Ok(chunk) => reply.chunks.push(chunk),
            Err(status) => {
                reply.stats = stats(status.metadata());
                reply.status = Some(status);
                return reply;
            }
        }
    }
    reply.stats = stream.trailers().await.unwrap().as_ref().and_then(stats);
    reply
}

fn stats(trailers: &MetadataMap) -> Option<v1::RequestStats> {
    let bytes = trailers.get_bin("penstock-stats-bin")?.to_bytes().unwrap();
    Some(v1::RequestStats::decode(bytes).unwrap())
}

/// An HTTP/1.1 call: status and body.
pub(crate) async fn http(address: std::net::SocketAddr, method: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.into())
}

/// The value of a metric whose line starts with `name` and contains `label`.
pub(crate) async fn metric(running: &Running, name: &str) -> f64 {
    let (_, text) = http(running.addresses.ops, "GET", "/metrics").await;
    let line = text
        .lines()
        .find(|line| line.starts_with(name))
        .unwrap_or_else(|| panic!("no {name} in {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until `check` holds; a test that waits in vain fails after ten seconds.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    for _ in 0..1000 {
        if check().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}: not within ten seconds");
}
