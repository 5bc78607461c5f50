//! Workers, gateways and clients.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use gateway::{Config, View};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client as HttpClient, rt::TokioExecutor};
use penstock_plan::{Canary, Endpoint, EndpointSet, Ppm, Revision, Route, ServedRevision, Snapshot, Sticky};
use penstock_proto::v1::{
    self, FinishReason,
    inference_client::InferenceClient,
    inference_server::{Inference, InferenceServer},
};
use prost::Message as _;
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Request, Response, Status,
    metadata::{MetadataMap, MetadataValue},
    transport::Channel,
};

pub(crate) type Client = InferenceClient<Channel>;

/// What a worker does with a request.
#[derive(Debug, Clone, Default)]
pub(crate) enum Behaviour {
    /// Says "Hello world" in two chunks.
    #[default]
    Speak,
    /// Says one chunk, then nothing, for ever.
    Hang,
    /// Answers with headers, then nothing, for ever.
    Silent,
    /// Says one chunk, then ends with a status.
    Break(Status),
    /// Says everything but how it ended, then nothing, for ever.
    Mute,
    /// Says one chunk that is not the last, and that all is well.
    Stop,
    /// Refuses.
    Refuse(Status),
}

/// A worker in a runtime of its own, so that it can be killed like a process.
pub(crate) struct TestWorker {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Seen>,
    runtime: Option<Runtime>,
}

/// What a worker saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) requests: Mutex<Vec<(MetadataMap, v1::GenerateRequest)>>,
    pub(crate) started: AtomicUsize,
    pub(crate) dropped: Arc<AtomicUsize>,
}

impl TestWorker {
    pub(crate) async fn start(behaviour: Behaviour) -> Self {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), behaviour).await
    }

    pub(crate) async fn start_on(address: SocketAddr, behaviour: Behaviour) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let seen = Arc::new(Seen::default());
        let service = InferenceServer::new(Service {
            behaviour,
            seen: seen.clone(),
        });
        let listener = bind(address).await.into_std().unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            let server = tonic::transport::Server::builder().add_service(service);
            server
                .serve_with_incoming(incoming.filter(Result::is_ok))
                .await
                .unwrap();
        });
        Self {
            address,
            seen,
            runtime: Some(runtime),
        }
    }

    pub(crate) fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }

    pub(crate) fn requests(&self) -> usize {
        self.seen.started.load(Ordering::SeqCst)
    }

    pub(crate) fn last(&self) -> (MetadataMap, v1::GenerateRequest) {
        self.seen.requests.lock().unwrap().last().cloned().unwrap()
    }

    pub(crate) fn endpoint(&self, id: &str, revisions: &[&str]) -> Endpoint {
        endpoint(id, self.address, revisions)
    }
}

/// A worker that was killed lets go of its port only when its runtime's thread is gone.
async fn bind(address: SocketAddr) -> TcpListener {
    let bound = async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), bound)
        .await
        .unwrap_or_else(|_| panic!("{address} is never free"))
}

impl Drop for TestWorker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Service {
    behaviour: Behaviour,
    seen: Arc<Seen>,
}

struct CountDrop(Arc<AtomicUsize>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

type Chunks = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = Chunks;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Chunks>, Status> {
        self.seen.started.fetch_add(1, Ordering::SeqCst);
        let (metadata, _, message) = request.into_parts();
        let logprobs = message.top_logprobs;
        let had = message.resume.as_ref().map(|resume| resume.token_ids.len());
        self.seen.requests.lock().unwrap().push((metadata, message));
        let guard = CountDrop(self.seen.dropped.clone());
        let [first, last] = reply(logprobs);
        let items: Vec<Result<v1::GenerateResponse, Status>> = match &self.behaviour {
            // Whatever ails it, it ends what others began.
            _ if had == Some(1) => vec![Ok(last), Err(stats())],
            Behaviour::Speak => vec![Ok(first), Ok(last), Err(stats())],
            Behaviour::Mute => vec![Ok(first), Ok(last)],
            Behaviour::Hang => vec![Ok(first)],
            Behaviour::Silent => vec![],
            Behaviour::Stop => vec![Ok(first)],
            Behaviour::Break(status) => vec![Ok(first), Err(status.clone())],
            Behaviour::Refuse(status) => return Err(status.clone()),
        };
        let endless = matches!(
            self.behaviour,
            Behaviour::Hang | Behaviour::Silent | Behaviour::Mute
        ) && had.is_none();
        let items = tokio_stream::iter(items);
        let stream: Chunks = match endless {
            true => Box::pin(items.chain(tokio_stream::pending())),
            false => Box::pin(items),
        };
        let held = stream.map(move |item| {
            let _ = &guard;
            item
        });
        let mut response: Response<Chunks> = Response::new(Box::pin(held));
        // A worker says so too; the gateway's word must stand once.
        response
            .metadata_mut()
            .insert("x-model-version", MetadataValue::from_static("of-the-worker"));
        response
            .metadata_mut()
            .insert("x-seed", MetadataValue::from_static("7"));
        Ok(response)
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let model = request.into_inner().model;
        Ok(Response::new(v1::TokenizeResponse {
            ids: vec![1, 2, 3],
            text: model,
        }))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let asked = request.into_inner();
        let scores = asked
            .continuations
            .iter()
            .map(|continuation| v1::ContinuationScore {
                logprob: -(continuation.encoded_len() as f64),
                ..Default::default()
            });
        Ok(Response::new(v1::ScoreResponse {
            scores: scores.collect(),
            usage: None,
        }))
    }

    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::internal("the gateway answers this itself"))
    }

    async fn feedback(
        &self,
        _: Request<v1::FeedbackRequest>,
    ) -> Result<Response<v1::FeedbackResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

fn reply(logprobs: Option<u32>) -> [v1::GenerateResponse; 2] {
    let logprob = |id: u32, bytes: &'static [u8]| v1::TokenLogprob {
        token_id: id,
        logprob: -0.5,
        bytes: bytes.into(),
        top: vec![v1::TopLogprob {
            token_id: id,
            logprob: -0.5,
            bytes: bytes.into(),
        }],
    };
    let chunk = |id: u32, text: &'static str| v1::GenerateResponse {
        token_ids: vec![id],
        text: text.into(),
        logprobs: logprobs
            .map(|_| logprob(id, text.as_bytes()))
            .into_iter()
            .collect(),
        ..Default::default()
    };
    let last = v1::GenerateResponse {
        text_offset: 5,
        finish_reason: FinishReason::Stop.into(),
        usage: Some(v1::Usage {
            prompt_tokens: 11,
            completion_tokens: 2,
            cached_tokens: 4,
        }),
        ..chunk(2, " world")
    };
    [chunk(1, "Hello"), last]
}

/// The end of a good reply, with the trailer that a worker sends.
fn stats() -> Status {
    let stats = v1::RequestStats {
        prompt_tokens: 11,
        cached_tokens: 4,
        completion_tokens: 2,
        tpot_us: 900,
        ..Default::default()
    };
    let mut metadata = MetadataMap::new();
    metadata.insert_bin(
        "penstock-stats-bin",
        MetadataValue::from_bytes(&stats.encode_to_vec()),
    );
    Status::with_metadata(tonic::Code::Ok, "", metadata)
}

pub(crate) fn endpoint(id: &str, address: SocketAddr, revisions: &[&str]) -> Endpoint {
    let served = |revision: &&str| ServedRevision {
        model: "demo".into(),
        revision: (*revision).into(),
        digest: format!("digest-{revision}"),
        context_length: 512,
    };
    Endpoint {
        id: id.into(),
        address: address.to_string(),
        region: String::new(),
        revisions: revisions.iter().map(served).collect(),
    }
}

/// `demo`: v1 is stable, v2 has `percent`, v3 can be pinned, v0 was aborted.
pub(crate) fn view(percent: u32, endpoints: Vec<Endpoint>) -> View {
    let revision = |name: &str| Revision::new(name, format!("digest-{name}"));
    let share: Ppm = format!("{percent}%").parse().unwrap();
    let route = Route {
        model: "demo".into(),
        stable: revision("v1"),
        canary: Some(Canary {
            revision: revision("v2"),
            share,
            ..Canary::default()
        }),
        rollout_uid: "r-1".into(),
        generation: 1,
        sticky: Sticky::default(),
        pinnable: vec![revision("v3")],
        revoked: vec!["v0".into()],
        ..Route::default()
    };
    let snapshot = Snapshot {
        epoch: 42,
        routes: BTreeMap::from([("demo".into(), route)]),
    };
    View {
        snapshot: Some(Arc::new(snapshot)),
        endpoints: Arc::new(EndpointSet {
            version: 1,
            endpoints,
        }),
        connected: false,
    }
}

/// A gateway that runs until it is dropped.
pub(crate) struct TestGateway {
    pub(crate) address: SocketAddr,
    pub(crate) ops: SocketAddr,
    _stop: DropGuard,
}

pub(crate) fn config(view: View) -> Config {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    Config {
        listen: any,
        ops_listen: any,
        initial: view,
        drain_timeout: Duration::from_secs(1),
        ..Config::new(Vec::<String>::new())
    }
}

impl TestGateway {
    pub(crate) async fn start(view: View) -> Self {
        Self::run(config(view)).await
    }

    pub(crate) async fn run(config: Config) -> Self {
        let server = config.build().await.unwrap();
        let addresses = server.addresses();
        let stop = CancellationToken::new();
        tokio::spawn(server.run(stop.clone()));
        Self {
            address: addresses.listen,
            ops: addresses.ops,
            _stop: stop.drop_guard(),
        }
    }

    pub(crate) async fn client(&self) -> Client {
        InferenceClient::connect(format!("http://{}", self.address))
            .await
            .unwrap()
    }
}

pub(crate) fn prompt(model: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: model.into(),
        input: Some(v1::generate_request::Input::Prompt("Hello".into())),
        ..Default::default()
    }
}

pub(crate) fn with(
    message: v1::GenerateRequest,
    headers: &[(&'static str, &str)],
) -> Request<v1::GenerateRequest> {
    let mut request = Request::new(message);
    for (name, value) in headers {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    request
}

/// Asks, and reads the reply to its end.
pub(crate) async fn generate(
    client: &mut Client,
    request: Request<v1::GenerateRequest>,
) -> Result<(MetadataMap, Vec<v1::GenerateResponse>), Status> {
    let response = client.generate(request).await?;
    let metadata = response.metadata().clone();
    let mut stream = response.into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.message().await? {
        chunks.push(chunk);
    }
    Ok((metadata, chunks))
}

/// Asks without tonic's client, which would end the call itself when its time is up. Returns the final status.
pub(crate) async fn raw_generate(address: SocketAddr, timeout: &str) -> Status {
    let client = HttpClient::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http::<Full<bytes::Bytes>>();
    let message = prompt("demo").encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let framed = [&[0][..], &length, &message].concat();
    let request = http::Request::post(format!("http://{address}/penstock.v1.Inference/Generate"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(Full::new(framed.into()))
        .unwrap();
    let (parts, body) = client.request(request).await.unwrap().into_parts();
    let trailers = body.collect().await.unwrap().trailers().cloned();
    let at_once = Status::from_header_map(&parts.headers);
    at_once.unwrap_or_else(|| Status::from_header_map(&trailers.unwrap()).unwrap())
}

/// An HTTP reply, read to its end.
pub(crate) struct HttpReply {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: String,
}

impl HttpReply {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of each event; JSON, save for `[DONE]`.
    pub(crate) fn events(&self) -> Vec<serde_json::Value> {
        let events = self.body.split("\n\n").filter(|event| !event.is_empty());
        let data = events.map(|event| {
            event
                .strip_prefix("data: ")
                .unwrap_or_else(|| panic!("{event:?}"))
        });
        data.map(|data| match data {
            "[DONE]" => "[DONE]".into(),
            data => serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}")),
        })
        .collect()
    }
}

pub(crate) async fn http(
    method: &str,
    address: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<bytes::Bytes>,
) -> HttpReply {
    let client = HttpClient::builder(TokioExecutor::new()).build_http::<Full<bytes::Bytes>>();
    let mut request = http::Request::builder()
        .method(method)
        .uri(format!("http://{address}{path}"))
        .header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = client
        .request(request.body(Full::new(body.into())).unwrap())
        .await
        .unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    HttpReply {
        status: parts.status.as_u16(),
        headers: parts.headers,
        body: String::from_utf8(body.to_vec()).unwrap(),
    }
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let held = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), held)
        .await
        .unwrap_or_else(|_| panic!("{what}: never"));
}
