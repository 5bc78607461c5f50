//! The remote places as one: list, and open a file.

use std::{collections::BTreeMap, error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use hf_hub::{
    Cache, Repo, RepoType,
    api::tokio::{Api, ApiBuilder},
};
use object_store::{
    ClientOptions, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt as _, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    client::HttpError,
    http::HttpBuilder,
    path::Path as ObjectPath,
};
use reqwest::header;

use super::{Place, RemoteError, SourceConfig};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const HUB_REMEDY: &str =
    "check the name, which the hub hides where it is private, and set HF_TOKEN to a token that may read it";
const S3_REMEDY: &str = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, or set AWS_SKIP_SIGNATURE=true for \
                         a public bucket";
const WEB_REMEDY: &str = "the files must be readable without credentials";

type BoxError = Box<dyn Error + Send + Sync>;

/// A place with files.
pub(super) enum Remote {
    Hub {
        api: Api,
        repo: Repo,
    },
    Store {
        store: Arc<dyn ObjectStore>,
        /// The directory.
        prefix: ObjectPath,
        /// Whether it tells what it holds.
        lists: bool,
        remedy: &'static str,
    },
}

/// What is known of a file that was read in part.
pub(super) struct Resume<'a> {
    /// Bytes that were read.
    pub offset: u64,
    /// Tag of the content that they are from.
    pub etag: &'a str,
}

/// A file that is being read.
pub(super) struct Body {
    /// Where in the file the stream begins: where it should resume, or 0.
    pub offset: u64,
    /// Bytes of the whole file, where the server told.
    pub size: Option<u64>,
    /// Tag of the content, where the server told.
    pub etag: Option<String>,
    /// What comes.
    pub stream: BoxStream<'static, Result<Bytes, RemoteError>>,
}

/// What the hub says about a revision.
#[derive(serde::Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(serde::Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

// === impl Remote ===

impl Remote {
    /// The client of `place`; no request is made. A directory of this machine is none.
    pub(super) fn new(place: &Place, config: &SourceConfig) -> Result<Self, BoxError> {
        match place {
            Place::Directory(path) => Err(format!("{} is of this machine", path.display()).into()),
            Place::Hub { repo, revision } => hub(repo, revision.as_deref(), config),
            Place::S3 { bucket, prefix } => s3(bucket, prefix, config),
            Place::Web(base) => web(base),
        }
    }

    /// The files that lie in the place directly, with their sizes in bytes where they are known, or `None` where it
    /// does not tell. From then on, all files are of one state of a repository.
    pub(super) async fn list(&mut self) -> Result<Option<BTreeMap<String, Option<u64>>>, RemoteError> {
        match self {
            Self::Hub { api, repo } => {
                let (commit, files) = list_hub(api, repo).await?;
                *repo = Repo::with_revision(repo.url(), RepoType::Model, commit);
                Ok(Some(files))
            }
            Self::Store { lists: false, .. } => Ok(None),
            Self::Store {
                store,
                prefix,
                remedy,
                ..
            } => {
                let listed = store.list_with_delimiter(Some(prefix)).await;
                let listed = listed.map_err(|error| store_error(error, remedy))?;
                let file = |object: object_store::ObjectMeta| {
                    Some((object.location.filename()?.to_owned(), Some(object.size)))
                };
                Ok(Some(listed.objects.into_iter().filter_map(file).collect()))
            }
        }
    }

    /// Begins to read `name`, behind what was read before where the server can and the content is still the same.
    pub(super) async fn open(&self, name: &str, resume: Option<Resume<'_>>) -> Result<Body, RemoteError> {
        match self {
            Self::Hub { api, repo } => open_hub(api, repo, name, resume).await,
            Self::Store {
                store,
                prefix,
                remedy,
                ..
            } => open_store(store.as_ref(), &prefix.clone().join(name), resume, remedy).await,
        }
    }

    /// Whether a file that may be missing is, given what opening it said. A web server over a bucket denies what is
    /// not there, so that names cannot be guessed.
    pub(super) fn is_absent(&self, error: &RemoteError) -> bool {
        match error {
            RemoteError::NotFound => true,
            RemoteError::Denied { .. } => matches!(self, Self::Store { lists: false, .. }),
            _ => false,
        }
    }
}

fn hub(repo: &str, revision: Option<&str>, config: &SourceConfig) -> Result<Remote, BoxError> {
    // The crate's own cache stays unused, as it knows no digest; a default one would want a home directory.
    let api = ApiBuilder::from_cache(Cache::new("/nonexistent/hub".into()))
        .with_endpoint(config.hf_endpoint.trim_end_matches('/').to_owned())
        .with_token(config.hf_token.clone())
        .with_progress(false)
        .build()?;
    let revision = revision.unwrap_or("main").to_owned();
    Ok(Remote::Hub {
        api,
        repo: Repo::with_revision(repo.to_owned(), RepoType::Model, revision),
    })
}

fn s3(bucket: &str, prefix: &str, config: &SourceConfig) -> Result<Remote, BoxError> {
    let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
        .iter()
        .find_map(|name| config.aws.get(*name));
    let plain = endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
    let mut builder = AmazonS3Builder::new()
        .with_client_options(client_options().with_allow_http(plain))
        .with_retry(no_retries());
    for (name, value) in &config.aws {
        if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    Ok(Remote::Store {
        store: Arc::new(builder.with_bucket_name(bucket).build()?),
        prefix: ObjectPath::parse(prefix)?,
        lists: true,
        remedy: S3_REMEDY,
    })
}

fn web(base: &str) -> Result<Remote, BoxError> {
    let plain = base.starts_with("http://");
    let store = HttpBuilder::new()
        .with_url(base.trim_end_matches('/'))
        .with_client_options(client_options().with_allow_http(plain))
        .with_retry(no_retries())
        .build()?;
    Ok(Remote::Store {
        store: Arc::new(store),
        prefix: ObjectPath::default(),
        lists: false,
        remedy: WEB_REMEDY,
    })
}

/// A checkpoint takes as long as it takes; that nothing comes is noticed where the stream is read.
fn client_options() -> ClientOptions {
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT_TIMEOUT)
}

/// Retries are made in one place for all remotes, see `download`.
fn no_retries() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

/// Lists a revision, and gives the commit that it is now.
async fn list_hub(api: &Api, repo: &Repo) -> Result<(String, BTreeMap<String, Option<u64>>), RemoteError> {
    let request = api.repo(repo.clone()).info_request();
    // With the sizes of the files, which the crate's own `info` leaves out.
    let response = request.query(&[("blobs", "true")]).send().await;
    let response = response
        .and_then(reqwest::Response::error_for_status)
        .map_err(hub_error)?;
    let body = response.bytes().await.map_err(hub_error)?;
    let revision: Revision =
        serde_json::from_slice(&body).map_err(|error| RemoteError::Refused(error.into()))?;
    if !super::is_file_name(&revision.sha) {
        return Err(RemoteError::Refused(
            format!("the hub gave {:?} for a commit", revision.sha).into(),
        ));
    }
    let files = revision
        .siblings
        .into_iter()
        .filter(|file| !file.rfilename.contains('/'))
        .map(|file| (file.rfilename, file.size));
    Ok((revision.sha, files.collect()))
}

async fn open_hub(
    api: &Api,
    repo: &Repo,
    name: &str,
    resume: Option<Resume<'_>>,
) -> Result<Body, RemoteError> {
    let url = api.repo(repo.clone()).url(name);
    let mut request = api.client().get(url);
    if let Some(resume) = &resume {
        request = request
            .header(header::RANGE, format!("bytes={}-", resume.offset))
            .header(header::IF_RANGE, resume.etag);
    }
    let response = request.send().await;
    let response = response
        .and_then(reqwest::Response::error_for_status)
        .map_err(hub_error)?;
    let resumed = response.status() == reqwest::StatusCode::PARTIAL_CONTENT;
    let offset = resume.filter(|_| resumed).map_or(0, |resume| resume.offset);
    let text = |name| response.headers().get(name)?.to_str().ok().map(str::to_owned);
    let etag = text(header::ETAG);
    let length: Option<u64> = text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok());
    Ok(Body {
        offset,
        size: length.map(|length| offset + length),
        etag,
        stream: response.bytes_stream().map_err(hub_error).boxed(),
    })
}

fn hub_error(error: reqwest::Error) -> RemoteError {
    match error.status() {
        Some(status) => RemoteError::status(status.as_u16(), HUB_REMEDY, error.into()),
        None if error.is_builder() || error.is_redirect() => RemoteError::Refused(error.into()),
        None => RemoteError::Transient(error.into()),
    }
}

async fn open_store(
    store: &dyn ObjectStore,
    path: &ObjectPath,
    resume: Option<Resume<'_>>,
    remedy: &'static str,
) -> Result<Body, RemoteError> {
    if let Some(resume) = resume {
        let options = GetOptions {
            range: Some(GetRange::Offset(resume.offset)),
            if_match: Some(resume.etag.to_owned()),
            ..GetOptions::default()
        };
        match store.get_opts(path, options).await {
            // Not every server heeds the condition.
            Ok(got) if got.meta.e_tag.as_deref() == Some(resume.etag) => return Ok(body(got, remedy)),
            // The content is another one by now, or the server cannot begin in the middle: begin anew.
            Ok(_)
            | Err(object_store::Error::Precondition { .. } | object_store::Error::NotSupported { .. }) => {}
            Err(error) => return Err(store_error(error, remedy)),
        }
    }
    let got = store.get(path).await;
    got.map(|got| body(got, remedy))
        .map_err(|error| store_error(error, remedy))
}

fn body(got: GetResult, remedy: &'static str) -> Body {
    Body {
        offset: got.range.start,
        size: Some(got.meta.size),
        etag: got.meta.e_tag.clone(),
        stream: got
            .into_stream()
            .map_err(move |error| store_error(error, remedy))
            .boxed(),
    }
}

fn store_error(error: object_store::Error, remedy: &'static str) -> RemoteError {
    match error {
        object_store::Error::NotFound { .. } => RemoteError::NotFound,
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            RemoteError::Denied {
                remedy,
                source: error.into(),
            }
        }
        object_store::Error::Generic { .. } => generic_error(error, remedy),
        _ => RemoteError::Refused(error.into()),
    }
}

/// What the crate has no variant for: broken connections, statuses, answers that it does not understand.
fn generic_error(error: object_store::Error, remedy: &'static str) -> RemoteError {
    let causes = chain(&error);
    if causes.iter().any(|cause| cause.is::<HttpError>()) {
        return RemoteError::Transient(error.into());
    }
    // The type that holds the status is private, but its message is not.
    let status = causes.iter().find_map(|cause| {
        let message = cause.to_string();
        let (_, rest) = message.split_once("status code: ")?;
        rest.get(..3)?.parse().ok()
    });
    match status {
        Some(status) => RemoteError::status(status, remedy, error.into()),
        None => RemoteError::Refused(error.into()),
    }
}

/// The error and all that caused it.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> Vec<&'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source()).collect()
}
