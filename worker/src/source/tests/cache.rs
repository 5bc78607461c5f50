use std::time::Duration;

use penstock_model::manifest_digest;

use super::{
    TENSORS, assert_nothing_left, demo, fetch_from, places,
    servers::{Fault, Server},
    small,
};
use crate::source::FetchError;

#[tokio::test]
async fn a_finished_download_is_used_again_without_a_request() {
    let mut server = Server::start(&demo());
    let digest = manifest_digest(&demo()).unwrap();
    let uris = places(&server);
    let cache = tempfile::tempdir().unwrap();
    let mut dirs = Vec::new();
    for uri in &uris {
        dirs.push(fetch_from(&server, uri, &cache, None).await.unwrap());
    }
    server.die();
    for (uri, dir) in uris.iter().zip(dirs) {
        assert_eq!(fetch_from(&server, uri, &cache, None).await.unwrap(), dir);
        assert_eq!(
            fetch_from(&server, uri, &cache, Some(&digest)).await.unwrap(),
            dir
        );
    }
}

#[tokio::test]
async fn a_checkpoint_that_was_published_anew_replaces_the_cached_one_once_it_is_whole() {
    let dir = small(&[(TENSORS, "old")]);
    let server = Server::start(dir.path());
    let cache = tempfile::tempdir().unwrap();
    let uri = server.url("/files");
    let cached = fetch_from(&server, &uri, &cache, None).await.unwrap();
    std::fs::write(dir.path().join(TENSORS), "new").unwrap();
    let error = fetch_from(&server, &uri, &cache, Some("another")).await;
    assert!(matches!(error.unwrap_err(), FetchError::Digest { .. }));
    assert_eq!(std::fs::read(cached.join(TENSORS)).unwrap(), b"old");
    let digest = manifest_digest(dir.path()).unwrap();
    assert_eq!(
        fetch_from(&server, &uri, &cache, Some(&digest)).await.unwrap(),
        cached
    );
    assert_eq!(std::fs::read(cached.join(TENSORS)).unwrap(), b"new");
}

#[tokio::test]
async fn what_a_crash_left_is_removed_and_never_used() {
    let server = Server::start(&demo());
    let cache = tempfile::tempdir().unwrap();
    let uri = server.url("/files/");
    let finished = fetch_from(&server, &uri, &cache, None).await.unwrap();
    let left = finished.with_file_name(".partial-of-a-crash");
    std::fs::rename(&finished, &left).unwrap();
    std::fs::write(left.join(TENSORS), "half").unwrap();
    let digest = manifest_digest(&demo()).unwrap();
    fetch_from(&server, &uri, &cache, Some(&digest)).await.unwrap();
    assert!(!left.exists());
}

#[tokio::test]
async fn fetching_at_once_downloads_once() {
    let server = Server::start(&demo());
    let cache = tempfile::tempdir().unwrap();
    let uri = server.url("/files/");
    let fetches = (0..3).map(|_| fetch_from(&server, &uri, &cache, None));
    for dir in futures_util::future::join_all(fetches).await {
        dir.unwrap();
    }
    assert_eq!(server.seen(TENSORS).len(), 1);
}

#[tokio::test]
async fn a_fetch_that_is_dropped_leaves_nothing() {
    let server = Server::start(&demo());
    let cache = tempfile::tempdir().unwrap();
    server.fault(TENSORS, &[Fault::Hang(1_000_000)]);
    let uri = server.url("/files/");
    let begun = async {
        while server.seen(TENSORS).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    tokio::select! {
        fetched = fetch_from(&server, &uri, &cache, None) => panic!("{fetched:?}"),
        () = begun => {}
    }
    assert_nothing_left(&cache);
}
