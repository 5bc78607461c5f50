//! Servers on loopback that hold a checkpoint: a web server, S3 and the Hugging Face Hub.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    path::{Path as FsPath, PathBuf},
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use futures_util::{StreamExt, stream};

/// What a server does instead of giving the file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    Status(u16),
    /// Announces the whole file, gives so many bytes and breaks the connection.
    Cut(usize),
    /// Announces the whole file, gives so many bytes and then nothing for ever.
    Hang(usize),
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub path: String,
    pub range: Option<String>,
    pub authorized: bool,
}

#[derive(Clone)]
struct Shop {
    dir: PathBuf,
    faults: Arc<Mutex<HashMap<String, VecDeque<Fault>>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// The `Authorization` must contain it.
    secret: Option<&'static str>,
    /// Where the hub sends readers of tensors.
    cdn: Option<String>,
}

/// Ends with its connections when dropped.
pub(super) struct Server {
    runtime: Option<tokio::runtime::Runtime>,
    address: SocketAddr,
    shop: Shop,
}

// === impl Server ===

impl Server {
    /// The files of `dir` at `/files/`, in the bucket `bucket` under `models/demo`, and as `owner/demo` of a hub.
    pub(super) fn start(dir: &FsPath) -> Self {
        Self::with(dir, None, None)
    }

    /// Like `start`, but wants `secret` in the `Authorization`; `cdn` gives the tensors of the hub.
    pub(super) fn with(dir: &FsPath, secret: Option<&'static str>, cdn: Option<&Server>) -> Self {
        let shop = Shop {
            dir: dir.to_owned(),
            faults: Arc::default(),
            seen: Arc::default(),
            secret,
            cdn: cdn.map(|cdn| cdn.url("/files/")),
        };
        Self::serve(shop, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    fn serve(shop: Shop, address: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = std::thread::scope(|scope| {
            let bind = || runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
            scope.spawn(bind).join().unwrap()
        });
        let address = listener.local_addr().unwrap();
        let app = Router::new()
            .route("/files/{file}", get(web))
            .route("/bucket", get(list_bucket))
            .route("/bucket/models/demo/{file}", get(web))
            .route("/api/models/owner/demo/revision/{revision}", get(hub_info))
            .route("/owner/demo/resolve/{revision}/{file}", get(hub_file))
            .with_state(shop.clone());
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self {
            runtime: Some(runtime),
            address,
            shop,
        }
    }

    /// Breaks every connection and listens no more.
    pub(super) fn die(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // The port is free only once the runtime is gone, which must not be awaited on a thread of another.
            let ended = std::thread::spawn(|| runtime.shutdown_timeout(std::time::Duration::from_secs(10)));
            ended.join().unwrap();
        }
    }

    /// Another process takes over at the same address, without the faults.
    pub(super) fn reborn(&self) -> Self {
        self.shop.faults.lock().unwrap().clear();
        Self::serve(self.shop.clone(), self.address)
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The next requests for `file` meet `faults`, in order.
    pub(super) fn fault(&self, file: &str, faults: &[Fault]) {
        let mut all = self.shop.faults.lock().unwrap();
        all.entry(file.into()).or_default().extend(faults);
    }

    /// The requests whose path ends in `suffix`.
    pub(super) fn seen(&self, suffix: &str) -> Vec<Seen> {
        let seen = self.shop.seen.lock().unwrap();
        seen.iter()
            .filter(|seen| seen.path.ends_with(suffix))
            .cloned()
            .collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.die();
    }
}

// === impl Shop ===

impl Shop {
    /// Notes the request; the status of the answer if it is not allowed.
    fn admit(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), StatusCode> {
        let text = |name| Some(headers.get(name)?.to_str().ok()?.to_owned());
        let authorization = text(header::AUTHORIZATION);
        self.seen.lock().unwrap().push(Seen {
            path: uri.path().into(),
            range: text(header::RANGE),
            authorized: authorization.is_some(),
        });
        match self.secret {
            Some(secret) if !authorization.is_some_and(|given| given.contains(secret)) => {
                Err(StatusCode::FORBIDDEN)
            }
            _ => Ok(()),
        }
    }

    /// Name and size of each file.
    fn files(&self) -> BTreeMap<String, u64> {
        let entries = std::fs::read_dir(&self.dir).unwrap().map(Result::unwrap);
        entries
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                (name, entry.metadata().unwrap().len())
            })
            .collect()
    }

    fn file(&self, name: &str, headers: &HeaderMap) -> Response {
        let fault = self
            .faults
            .lock()
            .unwrap()
            .get_mut(name)
            .and_then(VecDeque::pop_front);
        if let Some(Fault::Status(status)) = fault {
            return StatusCode::from_u16(status).unwrap().into_response();
        }
        let Ok(content) = std::fs::read(self.dir.join(name)) else {
            return StatusCode::NOT_FOUND.into_response();
        };
        let etag = format!("\"{}\"", blake3::hash(&content).to_hex());
        let same = |name| {
            headers
                .get(name)
                .is_none_or(|tag| tag.as_bytes() == etag.as_bytes())
        };
        if !same(header::IF_MATCH) {
            return StatusCode::PRECONDITION_FAILED.into_response();
        }
        let start = headers.get(header::RANGE).filter(|_| same(header::IF_RANGE));
        let start: Option<usize> = start.map(|range| {
            let range = range.to_str().unwrap();
            range
                .strip_prefix("bytes=")
                .unwrap()
                .trim_end_matches('-')
                .parse()
                .unwrap()
        });
        let total = content.len();
        let content = Bytes::from(content).slice(start.unwrap_or(0)..);
        let mut response = Response::new(Body::empty());
        let answer = response.headers_mut();
        answer.insert(header::CONTENT_LENGTH, content.len().into());
        answer.insert(header::ETAG, HeaderValue::from_str(&etag).unwrap());
        if let Some(start) = start {
            let range = format!("bytes {start}-{}/{total}", total - 1);
            answer.insert(header::CONTENT_RANGE, HeaderValue::from_str(&range).unwrap());
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        *response.body_mut() = faulty(content, fault);
        response
    }
}

fn faulty(content: Bytes, fault: Option<Fault>) -> Body {
    let begin = |bytes: usize| stream::iter([Ok(content.slice(..bytes))]);
    match fault {
        Some(Fault::Cut(bytes)) => {
            let broken = async {
                // The bytes before must be on their way.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            };
            Body::from_stream(begin(bytes).chain(stream::once(broken)))
        }
        Some(Fault::Hang(bytes)) => Body::from_stream(begin(bytes).chain(stream::pending())),
        _ => Body::from_stream(stream::iter([Ok::<_, std::io::Error>(content)])),
    }
}

async fn web(State(shop): State<Shop>, uri: Uri, headers: HeaderMap, Path(file): Path<String>) -> Response {
    match shop.admit(&uri, &headers) {
        Ok(()) => shop.file(&file, &headers),
        Err(refused) => refused.into_response(),
    }
}

/// ListObjectsV2, two keys at a time.
async fn list_bucket(
    State(shop): State<Shop>,
    uri: Uri,
    headers: HeaderMap,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    if let Err(refused) = shop.admit(&uri, &headers) {
        return refused.into_response();
    }
    assert_eq!(query["list-type"], "2");
    assert_eq!(query["delimiter"], "/");
    if query["prefix"] != "models/demo/" {
        return "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>".into_response();
    }
    let start: usize = query
        .get("continuation-token")
        .map_or(0, |token| token.parse().unwrap());
    let files = shop.files();
    let contents: String = files
        .iter()
        .skip(start)
        .take(2)
        .map(|(name, size)| {
            format!(
                "<Contents><Key>models/demo/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                 <ETag>\"0\"</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        })
        .collect();
    let more = start + 2 < files.len();
    let next = format!("<NextContinuationToken>{}</NextContinuationToken>", start + 2);
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult>{contents}<IsTruncated>{more}</IsTruncated>{}\
         <CommonPrefixes><Prefix>models/demo/onnx/</Prefix></CommonPrefixes></ListBucketResult>",
        if more { next.as_str() } else { "" }
    )
    .into_response()
}

async fn hub_info(
    State(shop): State<Shop>,
    uri: Uri,
    headers: HeaderMap,
    Path(revision): Path<String>,
) -> Response {
    if let Err(refused) = shop.admit(&uri, &headers) {
        return refused.into_response();
    }
    if !["main", "refs/pr/1"].contains(&revision.as_str()) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let file = |(name, size)| serde_json::json!({"rfilename": name, "size": size});
    let mut siblings: Vec<_> = shop.files().into_iter().map(file).collect();
    siblings.push(serde_json::json!({"rfilename": "onnx/model.onnx", "size": 7}));
    Json(serde_json::json!({"id": "owner/demo", "sha": "c0ffee", "siblings": siblings})).into_response()
}

async fn hub_file(
    State(shop): State<Shop>,
    uri: Uri,
    headers: HeaderMap,
    Path((revision, file)): Path<(String, String)>,
) -> Response {
    if let Err(refused) = shop.admit(&uri, &headers) {
        return refused.into_response();
    }
    // The revision must have been pinned to its commit.
    if revision != "c0ffee" {
        return StatusCode::NOT_FOUND.into_response();
    }
    match &shop.cdn {
        Some(cdn) if file.ends_with(".safetensors") => {
            Redirect::temporary(&format!("{cdn}{file}")).into_response()
        }
        _ => shop.file(&file, &headers),
    }
}
