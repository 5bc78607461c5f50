mod cache;
mod servers;
mod uris;

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use penstock_model::manifest_digest;
use servers::{Fault, Server};
use tempfile::TempDir;

use super::*;

const TENSORS: &str = "model.safetensors";

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo/v2")
}

/// A checkpoint of small files; their content does not matter to who fetches them.
fn small(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [("config.json", "{}"), ("tokenizer.json", "{}")]
        .iter()
        .chain(files)
    {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn config(server: &Server) -> SourceConfig {
    let aws = [
        ("AWS_ENDPOINT_URL", server.url("").as_str()),
        ("AWS_ACCESS_KEY_ID", "the-key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_PAGER", "less"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    SourceConfig {
        hf_endpoint: server.url("/"),
        hf_token: Some("hf-token".into()),
        aws: aws.into(),
        retry_backoff: Duration::from_millis(20),
    }
}

/// The three places of one server.
fn places(server: &Server) -> [String; 3] {
    let web = server.url("/files/");
    ["hf://owner/demo".into(), "s3://bucket/models/demo".into(), web]
}

async fn fetch_from(
    server: &Server,
    uri: &str,
    cache: &TempDir,
    digest: Option<&str>,
) -> Result<PathBuf, FetchError> {
    let source: Source = uri.parse().unwrap();
    fetch(&source, &config(server), cache.path(), digest, &|_| {}).await
}

/// An error with its causes.
fn told(error: &FetchError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Asserts that the cache holds no part of a checkpoint.
fn assert_nothing_left(cache: &TempDir) {
    for home in std::fs::read_dir(cache.path()).unwrap() {
        let entries = std::fs::read_dir(home.unwrap().path()).unwrap();
        let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [".lock"]);
    }
}

#[tokio::test]
async fn every_place_gives_the_checkpoint_as_it_was_published() {
    let digest = manifest_digest(&demo()).unwrap();
    let server = Server::start(&demo());
    for uri in places(&server) {
        let cache = tempfile::tempdir().unwrap();
        let dir = fetch_from(&server, &uri, &cache, Some(&digest)).await;
        let dir = dir.unwrap_or_else(|error| panic!("{uri}: {}", told(&error)));
        assert!(dir.starts_with(cache.path()));
        assert_eq!(manifest_digest(&dir).unwrap(), digest, "{uri}");
    }
}

#[tokio::test]
async fn fetching_runs_on_any_thread() {
    let server = Server::start(&demo());
    let (source, config) = (server.url("/files/").parse::<Source>().unwrap(), config(&server));
    let task = tokio::spawn(async move {
        let cache = tempfile::tempdir().unwrap();
        fetch(&source, &config, cache.path(), None, &|_| {})
            .await
            .map(drop)
    });
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_directory_is_used_in_place() {
    let cache = tempfile::tempdir().unwrap();
    let digest = manifest_digest(&demo()).unwrap();
    let path = demo().canonicalize().unwrap();
    for uri in [path.display().to_string(), format!("file://{}", path.display())] {
        let source: Source = uri.parse().unwrap();
        let config = SourceConfig::default();
        let dir = fetch(&source, &config, cache.path(), Some(&digest), &|_| {}).await;
        assert_eq!(dir.unwrap(), path);
        let error = fetch(&source, &config, cache.path(), Some("another"), &|_| {}).await;
        assert!(matches!(error.unwrap_err(), FetchError::Digest { .. }));
        assert!(path.join(TENSORS).exists());
    }
    let source: Source = "/nowhere/at/all".parse().unwrap();
    let error = fetch(&source, &SourceConfig::default(), cache.path(), None, &|_| {}).await;
    assert!(error.unwrap_err().to_string().contains("/nowhere/at/all"));
}

#[tokio::test]
async fn another_digest_than_the_published_one_is_refused_and_leaves_nothing() {
    let server = Server::start(&demo());
    let cache = tempfile::tempdir().unwrap();
    let published = "0".repeat(64);
    for uri in places(&server) {
        let error = fetch_from(&server, &uri, &cache, Some(&published))
            .await
            .unwrap_err();
        let actual = manifest_digest(&demo()).unwrap();
        let text = error.to_string();
        assert!(
            text.contains(&published) && text.contains(&actual) && text.contains(&uri),
            "{text}"
        );
        assert!(!error.is_retryable());
    }
    assert_nothing_left(&cache);
}

#[tokio::test]
async fn a_missing_file_is_named_with_its_place() {
    let dir = small(&[]);
    let server = Server::start(dir.path());
    let cache = tempfile::tempdir().unwrap();
    for uri in places(&server) {
        let error = fetch_from(&server, &uri, &cache, None).await.unwrap_err();
        assert!(
            matches!(&error, FetchError::Missing { uri: named, file } if *named == uri && file == TENSORS),
            "{}",
            told(&error)
        );
        assert!(!error.is_retryable());
    }
    assert_nothing_left(&cache);
    for uri in ["hf://owner/demo@v9", "s3://bucket/models/nowhere"] {
        let error = fetch_from(&server, uri, &cache, None).await.unwrap_err();
        assert!(
            error.to_string().contains(uri) && !error.is_retryable(),
            "{}",
            told(&error)
        );
    }
}

#[tokio::test]
async fn a_body_that_is_always_cut_short_fails_after_four_attempts() {
    let dir = small(&[(TENSORS, "0123456789")]);
    for place in 0..3 {
        let server = Server::start(dir.path());
        let cache = tempfile::tempdir().unwrap();
        server.fault(TENSORS, &[Fault::Cut(0); 9]);
        let uri = &places(&server)[place];
        let error = fetch_from(&server, uri, &cache, None).await.unwrap_err();
        assert!(
            matches!(&error, FetchError::Download { file, .. } if file == TENSORS),
            "{}",
            told(&error)
        );
        assert!(error.is_retryable(), "{}", told(&error));
        assert_eq!(server.seen(TENSORS).len(), 4);
        assert_nothing_left(&cache);
    }
}

#[tokio::test]
async fn a_broken_connection_is_resumed_where_it_broke() {
    let digest = manifest_digest(&demo()).unwrap();
    for place in 0..3 {
        let server = Server::start(&demo());
        let cache = tempfile::tempdir().unwrap();
        server.fault(TENSORS, &[Fault::Cut(1_000_000)]);
        let uri = &places(&server)[place];
        fetch_from(&server, uri, &cache, Some(&digest)).await.unwrap();
        let ranges: Vec<_> = server.seen(TENSORS).into_iter().map(|seen| seen.range).collect();
        assert_eq!(ranges, [None, Some("bytes=1000000-".into())], "{uri}");
    }
}

#[tokio::test]
async fn a_server_that_dies_in_the_middle_of_a_file_and_comes_back_is_awaited() {
    let digest = manifest_digest(&demo()).unwrap();
    for place in 0..3 {
        let mut server = Server::start(&demo());
        let cache = tempfile::tempdir().unwrap();
        server.fault(TENSORS, &[Fault::Hang(1_500_000)]);
        let source: Source = places(&server)[place].parse().unwrap();
        let config = SourceConfig {
            retry_backoff: Duration::from_millis(500),
            ..config(&server)
        };
        let begun = tokio::sync::Notify::new();
        let progress = |progress: FetchProgress| {
            if progress.fetched_bytes > 1 << 20 {
                begun.notify_one();
            }
        };
        let (cache, fetched) = (
            cache.path(),
            fetch(&source, &config, cache.path(), Some(&digest), &progress),
        );
        let restart = async {
            begun.notified().await;
            server.die();
            server.reborn()
        };
        let (dir, reborn) = tokio::join!(fetched, restart);
        assert!(dir.unwrap().starts_with(cache));
        assert!(reborn.seen(TENSORS).len() >= 2);
    }
}

#[tokio::test]
async fn content_that_changes_between_attempts_is_not_mixed() {
    let dir = small(&[(TENSORS, "0123456789")]);
    let server = Server::start(dir.path());
    for uri in places(&server) {
        std::fs::write(dir.path().join(TENSORS), "0123456789").unwrap();
        let cache = tempfile::tempdir().unwrap();
        server.fault(TENSORS, &[Fault::Cut(5)]);
        let source: Source = uri.parse().unwrap();
        let config = SourceConfig {
            retry_backoff: Duration::from_secs(1),
            ..config(&server)
        };
        let requests = server.seen(TENSORS).len();
        let change = async {
            while server.seen(TENSORS).len() == requests {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            std::fs::write(dir.path().join(TENSORS), "abcdefghij").unwrap();
        };
        let (fetched, ()) = tokio::join!(fetch(&source, &config, cache.path(), None, &|_| {}), change);
        let content = std::fs::read_to_string(fetched.unwrap().join(TENSORS)).unwrap();
        assert_eq!(content, "abcdefghij", "{uri}");
    }
}

#[tokio::test]
async fn a_name_that_leads_out_of_the_checkpoint_is_refused() {
    for name in [
        "../escaped.safetensors",
        "/tmp/escaped.safetensors",
        ".hidden",
        "a/b.safetensors",
        "",
    ] {
        let index = serde_json::json!({"weight_map": {"x": name}}).to_string();
        let dir = small(&[("model.safetensors.index.json", &index)]);
        let server = Server::start(dir.path());
        let cache = tempfile::tempdir().unwrap();
        for uri in places(&server) {
            let error = fetch_from(&server, &uri, &cache, None).await.unwrap_err();
            assert!(
                matches!(&error, FetchError::UnsafeName { name: refused, .. } if refused == name),
                "{}",
                told(&error)
            );
        }
        assert_nothing_left(&cache);
    }
}

#[tokio::test]
async fn shards_come_as_the_index_names_them() {
    let index = r#"{"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    let files = [
        ("model.safetensors.index.json", index),
        ("one.safetensors", "1"),
        ("two.safetensors", "22"),
        ("README.md", "not of the checkpoint"),
    ];
    let dir = small(&files);
    let server = Server::start(dir.path());
    let digest = manifest_digest(dir.path()).unwrap();
    for uri in places(&server) {
        let cache = tempfile::tempdir().unwrap();
        let fetched = fetch_from(&server, &uri, &cache, Some(&digest)).await.unwrap();
        let mut names: Vec<_> = std::fs::read_dir(fetched)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        let index = "model.safetensors.index.json";
        assert_eq!(
            names,
            [
                "config.json",
                index,
                "one.safetensors",
                "tokenizer.json",
                "two.safetensors"
            ],
            "{uri}"
        );
    }
    std::fs::remove_file(dir.path().join("two.safetensors")).unwrap();
    for uri in places(&server) {
        let cache = tempfile::tempdir().unwrap();
        let error = fetch_from(&server, &uri, &cache, None).await.unwrap_err();
        assert!(matches!(&error, FetchError::Missing { file, .. } if file == "two.safetensors"));
    }
}

#[tokio::test]
async fn a_gguf_file_comes_in_place_of_the_safetensors() {
    let dir = small(&[
        ("tiny-q4.gguf", "GGUF"),
        ("tiny-q8.gguf", "GGUF too"),
        (TENSORS, "big"),
    ]);
    let server = Server::start(dir.path());
    let web = server.url("/files/tiny-q4.gguf");
    for uri in [
        "hf://owner/demo/tiny-q4.gguf@main",
        "s3://bucket/models/demo/tiny-q4.gguf",
        &web,
    ] {
        let cache = tempfile::tempdir().unwrap();
        let fetched = fetch_from(&server, uri, &cache, None).await.unwrap();
        assert_eq!(std::fs::read(fetched.join("tiny-q4.gguf")).unwrap(), b"GGUF");
        assert!(fetched.join("tokenizer.json").exists());
        assert!(!fetched.join(TENSORS).exists() && !fetched.join("tiny-q8.gguf").exists());
    }
}

#[tokio::test]
async fn passing_failures_are_retried_and_others_are_not() {
    let dir = small(&[(TENSORS, "0123456789")]);
    for place in 0..3 {
        let server = Server::start(dir.path());
        let uri = &places(&server)[place];
        let cache = tempfile::tempdir().unwrap();
        server.fault(TENSORS, &[503, 429, 500].map(Fault::Status));
        fetch_from(&server, uri, &cache, None).await.unwrap();
        assert_eq!(server.seen(TENSORS).len(), 4, "{uri}");

        let cache = tempfile::tempdir().unwrap();
        server.fault(TENSORS, &[Fault::Status(400)]);
        let error = fetch_from(&server, uri, &cache, None).await.unwrap_err();
        assert!(!error.is_retryable(), "{}", told(&error));
        assert_eq!(server.seen(TENSORS).len(), 5, "{uri}");
    }
}

#[tokio::test]
async fn without_the_right_credentials_the_error_says_which_to_give() {
    let server = Server::with(&demo(), Some("another-secret"), None);
    let cache = tempfile::tempdir().unwrap();
    let remedies = ["HF_TOKEN", "AWS_ACCESS_KEY_ID", "without credentials"];
    for (uri, remedy) in places(&server).iter().zip(remedies) {
        let error = fetch_from(&server, uri, &cache, None).await.unwrap_err();
        let text = told(&error);
        assert!(text.contains(remedy) && !error.is_retryable(), "{text}");
        assert!(!text.contains("hf-token"), "{text}");
    }
    let server = Server::with(&demo(), Some("Credential=the-key/"), None);
    fetch_from(&server, "s3://bucket/models/demo", &cache, None)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_hubs_token_stays_with_the_hub() {
    let cdn = Server::start(&demo());
    let hub = Server::with(&demo(), Some("Bearer hf-token"), Some(&cdn));
    let cache = tempfile::tempdir().unwrap();
    let digest = manifest_digest(&demo()).unwrap();
    fetch_from(&hub, "hf://owner/demo", &cache, Some(&digest))
        .await
        .unwrap();
    let seen = cdn.seen(TENSORS);
    assert!(seen.len() == 1 && !seen[0].authorized, "{seen:?}");
    assert!(hub.seen(TENSORS)[0].authorized);
}

#[tokio::test]
async fn progress_ends_at_all_bytes() {
    let server = Server::start(&demo());
    let files = [
        "config.json",
        "generation_config.json",
        TENSORS,
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let total: u64 = files
        .map(|name| demo().join(name).metadata().unwrap().len())
        .iter()
        .sum();
    for uri in places(&server) {
        let cache = tempfile::tempdir().unwrap();
        let told = Mutex::new(Vec::new());
        let source: Source = uri.parse().unwrap();
        let observer = |progress| told.lock().unwrap().push(progress);
        fetch(&source, &config(&server), cache.path(), None, &observer)
            .await
            .unwrap();
        let told = told.into_inner().unwrap();
        assert!(
            told.is_sorted_by_key(|progress| progress.fetched_bytes),
            "{told:?}"
        );
        assert!(
            told.iter()
                .any(|progress| (1..total).contains(&progress.fetched_bytes)),
            "{told:?}"
        );
        let last = FetchProgress {
            fetched_bytes: total,
            total_bytes: total,
        };
        assert_eq!(told.last(), Some(&last), "{uri}");
    }
}
