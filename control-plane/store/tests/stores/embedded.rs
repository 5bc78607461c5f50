//! The suite against the embedded store, and its data directory.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use penstock_store::{
    Prefix, Store,
    embedded::{EmbeddedStore, OpenError},
};
use tempfile::TempDir;

use crate::{
    support::{get, key, put, put_leased, write},
    watches,
};

async fn on_disk() -> (Arc<dyn Store>, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    (
        Arc::new(EmbeddedStore::open(directory.path()).unwrap()),
        directory,
    )
}

whole_suite!(on_disk());

mod in_memory {
    use super::*;

    async fn in_memory() -> (Arc<dyn Store>, ()) {
        (Arc::new(EmbeddedStore::in_memory()), ())
    }

    whole_suite!(in_memory());
}

#[tokio::test]
async fn a_watch_from_lost_history_starts_anew() {
    let store = EmbeddedStore::in_memory();
    let compacted = store.clone();
    watches::a_watch_from_lost_history_starts_anew(Arc::new(store), async move |_| compacted.compact()).await;
}

/// More changes than history holds, none of them read meanwhile.
#[tokio::test]
async fn a_watch_that_lags_too_far_is_given_everything_anew() {
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
    let mut watch = store.watch(Prefix::Rollouts, 1).await.unwrap();
    let a = key("a");
    for i in 0..5000 {
        write(&store, put(&a, i.to_string())).await;
    }
    let last = key("last");
    write(&store, put(&last, "")).await;
    let mut state = std::collections::BTreeMap::new();
    crate::support::apply_until(&mut watch, &mut state, &last).await;
    assert_eq!(
        state,
        watches::by_key(store.list(Prefix::Rollouts).await.unwrap().entries)
    );
}

#[tokio::test]
async fn opening_again_keeps_everything_but_leased_entries() {
    let (store, directory) = on_disk().await;
    let (a, b, c) = (key("a"), key("b"), key("c"));
    write(&store, put(&a, "1")).await;
    write(&store, put(&a, "2")).await;
    let kept = get(&store, &a).await;
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    write(&store, put_leased(&b, "1", lease.id())).await;
    // An unleased entry that a lease takes over dies with it.
    write(&store, put(&c, "1")).await;
    let revision = write(&store, put_leased(&c, "2", lease.id())).await;
    drop((lease, store));

    let store = reopened(directory.path()).await;
    let listing = store.list(Prefix::All).await.unwrap();
    assert_eq!(listing.revision, revision);
    assert_eq!(listing.entries, Vec::from_iter(kept));
    assert!(write(&store, put(&b, "1")).await > revision);
}

/// The store's tasks may hold it for a moment after its last handle is gone.
async fn reopened(directory: &Path) -> Arc<dyn Store> {
    for _ in 0..100 {
        match EmbeddedStore::open(directory) {
            Ok(store) => return Arc::new(store),
            Err(OpenError::Locked(_)) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the directory stays locked");
}

#[tokio::test]
async fn a_directory_is_opened_once_within_a_process() {
    let (_store, directory) = on_disk().await;
    assert_locked(directory.path());
}

#[tokio::test]
async fn a_directory_is_opened_once_across_processes() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "embedded::holds_a_directory",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "{}", directory.path().display()).unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let held = lines.map_while(Result::ok).any(|line| line.contains("opened"));
    assert!(held, "the child did not open the directory");
    assert_locked(directory.path());

    // The lock dies with its process, however that ends.
    child.kill().unwrap();
    child.wait().unwrap();
    EmbeddedStore::open(directory.path()).unwrap();
}

/// The other process of the test above: opens the directory named on stdin, and holds it until stdin ends.
#[tokio::test]
#[ignore = "a part of a_directory_is_opened_once_across_processes"]
async fn holds_a_directory() {
    let mut lines = std::io::stdin().lines();
    let Some(Ok(directory)) = lines.next() else { return };
    let _store = EmbeddedStore::open(Path::new(&directory)).unwrap();
    writeln!(std::io::stdout(), "opened").unwrap();
    lines.next();
}

fn assert_locked(directory: &Path) {
    let error = EmbeddedStore::open(directory).unwrap_err();
    assert!(
        matches!(&error, OpenError::Locked(locked) if locked == directory),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(text.contains(&directory.display().to_string()), "{text}");
    assert!(text.contains("--data-dir"), "{text}");
}

#[tokio::test]
async fn a_file_that_is_no_store_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("penstock.redb");
    for content in [&b"not a store"[..], &[0x5a; 64 << 10]] {
        fs::write(&path, content).unwrap();
        assert_unreadable(directory.path(), &path);
        // Nothing was written over it.
        assert_eq!(fs::read(&path).unwrap(), content);
    }
}

/// A file that was cut or overwritten in part must not bring the process down.
#[tokio::test]
async fn a_damaged_store_is_an_error_that_names_it() {
    let (store, directory) = on_disk().await;
    for i in 0..200 {
        write(&store, put(&key(&i.to_string()), "x".repeat(1000))).await;
    }
    drop(store);
    drop(reopened(directory.path()).await);
    let path = directory.path().join("penstock.redb");
    let whole = fs::read(&path).unwrap();

    fs::write(&path, &whole[..whole.len() / 3]).unwrap();
    assert_unreadable(directory.path(), &path);

    let mut damaged = whole;
    damaged[4096..].fill(0xa5);
    fs::write(&path, damaged).unwrap();
    assert_unreadable(directory.path(), &path);
}

fn assert_unreadable(directory: &Path, path: &Path) {
    let error = EmbeddedStore::open(directory).unwrap_err();
    assert!(matches!(&error, OpenError::Unreadable { .. }), "{error:?}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let error = EmbeddedStore::open(&file.join("data")).unwrap_err();
    assert!(error.to_string().contains("file/data"), "{error}");
}
