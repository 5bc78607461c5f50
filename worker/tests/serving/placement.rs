//! Revisions that come and go while the worker serves.

use std::{path::Path, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use penstock_plan::{PublishedRevision, WorkerRecord};
use penstock_proto::v1::{self, hello::Role, revision_state::State};
use penstock_store::{Key, Operation, Store, Transaction};
use tonic::Code;
use worker::{Config, MemoryBudget, ModelSpec, Readiness, RunnerKind};

use crate::{
    harness::{
        Running, config, eventually, generate, http, prompt, read, start, start_empty, store, tokens, with,
    },
    plane::Plane,
};

/// `demo@revision` for the fake runner, or of a checkpoint.
fn placed(revision: &str, source: &str) -> v1::PlacedRevision {
    v1::PlacedRevision {
        model: "demo".into(),
        revision: revision.into(),
        source: source.into(),
        ..Default::default()
    }
}

/// The bundled checkpoint of a revision.
fn checkpoint(revision: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/demo");
    path.join(revision).display().to_string()
}

/// A worker with the fake runner that asks `plane`.
fn placeable(plane: &Plane, models: &[&str], pace: Duration) -> Config {
    Config {
        control_planes: vec![plane.address.to_string()],
        ..config(store(), models, pace)
    }
}

/// A worker with the real runner that serves the demo's v1.
fn real(plane: &Plane) -> Config {
    Config {
        models: vec![ModelSpec {
            model: "demo".into(),
            revision: "v1".into(),
            path: checkpoint("v1").into(),
        }],
        runner: RunnerKind::Candle,
        ..placeable(plane, &[], Duration::ZERO)
    }
}

async fn ask(
    running: &Running,
    revision: &str,
    max_tokens: u32,
) -> Result<crate::harness::Reply, tonic::Status> {
    // A real model may have nothing more to say; the tests count on the length.
    let sampling = v1::SamplingParams {
        temperature: Some(0.0),
        ignore_eos: Some(true),
        ..tokens(max_tokens)
    };
    let request = with(prompt("Hello", sampling), &[("x-model-version", revision)]);
    generate(&mut running.client.clone(), request).await
}

async fn registered(store: &Arc<dyn Store>, running: &Running) -> Vec<String> {
    let key = Key::Worker(running.addresses.listen.to_string());
    let Some(entry) = store.get(&key).await.unwrap() else {
        return Vec::new();
    };
    let record: WorkerRecord = serde_json::from_slice(&entry.value).unwrap();
    record
        .revisions
        .into_iter()
        .map(|revision| revision.revision)
        .collect()
}

#[tokio::test]
async fn a_placed_revision_is_loaded_beside_the_first_and_no_request_fails() {
    let mut plane = Plane::start().await;
    let config = real(&plane);
    let store = config.store.clone();
    let running = start(config).await;
    let hello = plane
        .until("the Hello", |heard| heard.hello.is_some())
        .await
        .hello
        .unwrap();
    assert_eq!(hello.role(), Role::Worker);
    assert_eq!(hello.node, running.addresses.listen.to_string());
    assert_eq!(hello.ops_address, running.addresses.ops.to_string());

    let done = tokio_util::sync::CancellationToken::new();
    let asking = {
        let (mut client, done) = (running.client.clone(), done.clone());
        tokio::spawn(async move {
            let mut replies = 0;
            while !done.is_cancelled() {
                let reply = generate(&mut client, with(prompt("Hello", tokens(8)), &[]))
                    .await
                    .unwrap();
                assert!(reply.status.is_none(), "{reply:?}");
                replies += 1;
            }
            replies
        })
    };
    let digest = penstock_model::manifest_digest(checkpoint("v2").as_ref()).unwrap();
    plane.place([
        placed("v1", ""),
        v1::PlacedRevision {
            digest: digest.clone(),
            warm_prefixes: vec!["The quick brown fox jumps over the lazy dog and runs away.".into()],
            ..placed("v2", &checkpoint("v2"))
        },
    ]);
    let told = plane.until_in("v2", State::Serving).await;
    assert_eq!((told.digest, told.message.as_str()), (digest, ""));
    assert!(told.pages_total > 0 && told.done_bytes > 0 && told.done_bytes == told.total_bytes);
    // The engine publishes its counts just after a reply has ended.
    plane
        .until("it was warmed", |heard| {
            heard.of("v2").is_some_and(|told| told.prefix_lookup_tokens > 0)
        })
        .await;
    let heard = plane.heard();
    assert_eq!(heard.applied, 1);
    let states = [State::Fetching, State::Loading, State::Warming, State::Serving];
    // Two states that follow each other at once are told of in one report.
    let seen = heard.states_of("v2");
    assert!(seen.iter().all(|state| states.contains(state)) && seen.is_sorted_by_key(|state| *state as i32));
    let reply = ask(&running, "v2", 4).await.unwrap();
    assert_eq!(reply.headers.get("x-model-version").unwrap(), "v2");
    done.cancel();
    assert!(asking.await.unwrap() > 0);
    eventually("the record names both", || async {
        registered(&store, &running).await == ["v1", "v2"]
    })
    .await;
}

#[tokio::test]
async fn a_warmed_prefix_is_found_by_the_first_request() {
    let mut plane = Plane::start().await;
    let running = start(Config {
        page_size: 1,
        ..placeable(&plane, &["demo@v1"], Duration::ZERO)
    })
    .await;
    plane.place([v1::PlacedRevision {
        warm_prefixes: vec!["Hello".into(), String::new()],
        ..placed("v2", "/fake/v2")
    }]);
    plane.until_in("v2", State::Serving).await;
    let request = with(prompt("Hello, you", tokens(1)), &[("x-model-version", "v2")]);
    let reply = generate(&mut running.client.clone(), request).await.unwrap();
    assert_eq!(reply.usage().cached_tokens, 5);
}

#[tokio::test]
async fn another_digest_fails_the_revision_with_both_and_serving_goes_on() {
    let mut plane = Plane::start().await;
    let running = start(real(&plane)).await;
    let found = penstock_model::manifest_digest(checkpoint("v2").as_ref()).unwrap();
    let wrong = v1::PlacedRevision {
        digest: "ab".repeat(32),
        ..placed("v2", &checkpoint("v2"))
    };
    plane.place([wrong]);
    let told = plane.until_in("v2", State::Failed).await;
    assert!(
        told.message.contains(&found) && told.message.contains(&"ab".repeat(32)),
        "{told:?}"
    );
    assert_eq!(told.out_of_memory, 0);
    assert_eq!(ask(&running, "v1", 4).await.unwrap().ids().len(), 4);
    assert_eq!(
        ask(&running, "v2", 4).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    // It is tried again when its placement changes, not a minute later.
    plane.place([placed("v2", &checkpoint("v2"))]);
    plane.until_in("v2", State::Serving).await;
}

#[tokio::test]
async fn a_checkpoint_that_is_not_there_fails_with_its_path_and_one_without_source_is_another_workers() {
    let mut plane = Plane::start().await;
    let running = start(real(&plane)).await;
    plane.place([placed("v2", "/nonexistent/v2"), placed("v3", "")]);
    let told = plane.until_in("v2", State::Failed).await;
    assert!(told.message.contains("/nonexistent/v2"), "{told:?}");
    assert_eq!(plane.heard().of("v3"), None);
    plane.place([placed("v2", "s3://bucket/v2"), placed("v3", "ftp://host/v3")]);
    plane
        .until("both were tried again", |heard| {
            let says = |revision, text| heard.of(revision).is_some_and(|told| told.message.contains(text));
            says("v2", "give --data-dir") && says("v3", "is no place of a checkpoint")
        })
        .await;
    assert_eq!(ask(&running, "v1", 4).await.unwrap().ids().len(), 4);
    // What is no longer wanted is no longer told of.
    plane.place([]);
    plane
        .until("both are forgotten", |heard| heard.report.revisions.len() == 1)
        .await;
}

#[tokio::test]
async fn a_revision_that_does_not_fit_fails_with_figures_until_another_retires() {
    let mut plane = Plane::start().await;
    // Weights of 2 MiB and KV of 4 MiB each: two revisions fit, three do not.
    let running = start(Config {
        kv_memory_bytes: Some(4 << 20),
        memory: MemoryBudget::new(Some(14 << 20)),
        ..real(&plane)
    })
    .await;
    plane.place([placed("v2", &checkpoint("v2"))]);
    plane.until_in("v2", State::Serving).await;
    plane.place([placed("v2", &checkpoint("v2")), placed("v3", &checkpoint("v3"))]);
    let told = plane.until_in("v3", State::Failed).await;
    assert!(
        told.message
            .contains("needs 6.1 MiB, 1.8 MiB are free; retire a revision or raise --memory-limit"),
        "{told:?}"
    );
    assert_eq!(told.out_of_memory, 1);
    for revision in ["v1", "v2"] {
        assert_eq!(ask(&running, revision, 4).await.unwrap().ids().len(), 4);
    }
    plane.place([]);
    plane.until("v2 is gone", |heard| heard.of("v2").is_none()).await;
    plane.place([placed("v3", &checkpoint("v3"))]);
    plane.until_in("v3", State::Serving).await;
}

#[tokio::test]
async fn a_revision_retires_after_its_last_stream_and_takes_no_new_request() {
    let mut plane = Plane::start().await;
    let config = placeable(&plane, &["demo@v1"], Duration::from_millis(10));
    let store = config.store.clone();
    let running = start(config).await;
    plane.place([placed("v2", "/fake/v2")]);
    plane.until_in("v2", State::Serving).await;
    let request = with(prompt("Hello", tokens(300)), &[("x-model-version", "v2")]);
    let mut stream = running
        .client
        .clone()
        .generate(request)
        .await
        .unwrap()
        .into_inner();
    let first = stream.next().await.unwrap().unwrap();
    plane.place([]);
    plane.until_in("v2", State::Retiring).await;
    plane
        .until("its stream is told of", |heard| {
            heard.of("v2").is_some_and(|told| told.running == 1)
        })
        .await;
    assert_eq!(
        ask(&running, "v2", 1).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    eventually("the record names v1 alone", || async {
        registered(&store, &running).await == ["v1"]
    })
    .await;
    assert!(
        plane.heard().of("v2").is_some(),
        "it is there while its stream is"
    );
    let rest = read(stream).await;
    assert!(rest.status.is_none(), "{rest:?}");
    assert_eq!(first.token_ids.len() + rest.ids().len(), 300);
    plane.until("v2 is gone", |heard| heard.of("v2").is_none()).await;
    assert_eq!(ask(&running, "v1", 4).await.unwrap().ids().len(), 4);
}

#[tokio::test]
async fn a_revision_that_is_placed_again_while_it_retires_serves_at_once() {
    let mut plane = Plane::start().await;
    let running = start(placeable(&plane, &["demo@v1"], Duration::from_millis(10))).await;
    plane.place([placed("v2", "/fake/v2")]);
    plane.until_in("v2", State::Serving).await;
    let request = with(prompt("Hello", tokens(4000)), &[("x-model-version", "v2")]);
    let mut stream = running
        .client
        .clone()
        .generate(request)
        .await
        .unwrap()
        .into_inner();
    stream.next().await.unwrap().unwrap();
    plane.place([]);
    plane.until_in("v2", State::Retiring).await;
    plane.place([placed("v2", "/fake/v2")]);
    plane.until_in("v2", State::Serving).await;
    assert_eq!(ask(&running, "v2", 2).await.unwrap().ids().len(), 2);
    let states = plane.heard().states_of("v2");
    let since: Vec<State> = states
        .into_iter()
        .skip_while(|state| *state != State::Retiring)
        .collect();
    assert_eq!(since, [State::Retiring, State::Serving]);
}

#[tokio::test]
async fn a_worker_without_models_is_ready_once_something_is_placed_on_it() {
    let mut plane = Plane::start().await;
    let config = placeable(&plane, &[], Duration::ZERO);
    let store = config.store.clone();
    let running = start_empty(config).await;
    let (code, body) = http(running.addresses.listen, "GET", "/readyz").await;
    assert_eq!(
        (code, body.as_str()),
        (503, "serving no revision: waiting for a placement\n")
    );
    assert_eq!(http(running.addresses.listen, "GET", "/healthz").await.0, 200);
    eventually("it is registered", || async {
        let key = Key::Worker(running.addresses.listen.to_string());
        store.get(&key).await.unwrap().is_some()
    })
    .await;
    plane.place([placed("v2", "/fake/v2")]);
    plane.until_in("v2", State::Serving).await;
    running
        .readiness
        .clone()
        .wait_for(|state| *state == Readiness::Serving)
        .await
        .unwrap();
    assert_eq!(ask(&running, "v2", 2).await.unwrap().ids().len(), 2);
    plane.place([]);
    running
        .readiness
        .clone()
        .wait_for(|state| *state == Readiness::Empty)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_leader_is_found_in_the_store() {
    let mut plane = Plane::start().await;
    let config = config(store(), &["demo@v1"], Duration::ZERO);
    let store = config.store.clone();
    let running = start(config).await;
    let put = Operation::Put {
        key: Key::Leader,
        value: plane.address.to_string().into(),
        lease: None,
    };
    let transaction = Transaction {
        preconditions: vec![],
        operations: vec![put],
    };
    store.commit(transaction).await.unwrap();
    plane.place([placed("v2", "/fake/v2")]);
    plane.until_in("v2", State::Serving).await;
    assert_eq!(ask(&running, "v2", 2).await.unwrap().ids().len(), 2);
}

#[tokio::test]
async fn a_worker_that_restarts_without_a_control_plane_serves_its_last_placement() {
    let directory = tempfile::tempdir().unwrap();
    let mut plane = Plane::start().await;
    let config = Config {
        id: Some("worker-1".into()),
        data_dir: Some(directory.path().join("worker")),
        ..placeable(&plane, &["demo@v1"], Duration::ZERO)
    };
    let running = start(config.clone()).await;
    plane.place([placed("v2", "/fake/v2")]);
    plane.until_in("v2", State::Serving).await;
    running.shutdown.cancel();
    running.ended.await.unwrap().unwrap();
    drop(plane);
    let running = start(config).await;
    eventually("v2 serves", || async { ask(&running, "v2", 2).await.is_ok() }).await;
}

#[tokio::test]
async fn watched_words_are_counted_in_replies_of_placed_revisions_and_of_the_command_lines() {
    let mut plane = Plane::start().await;
    let running = start(placeable(&plane, &["demo@v1"], Duration::ZERO)).await;
    let seeded = ask(&running, "v1", 200).await.unwrap();
    assert_eq!(seeded.stats.as_ref().unwrap().watch_word_hits, 0);
    // The fake runner's reply is one long word, always the same: all of it is a word, a part of it is none.
    let whole = seeded.text();
    let watching = |revision: &str| v1::PlacedRevision {
        watch_words: vec![whole.to_uppercase(), whole[..5].into()],
        ..placed(revision, if revision == "v1" { "" } else { "/fake" })
    };
    plane.place([watching("v1"), watching("v2")]);
    plane.until_in("v2", State::Serving).await;
    for revision in ["v1", "v2"] {
        let reply = ask(&running, revision, 200).await.unwrap();
        assert_eq!(reply.text(), whole);
        assert_eq!(reply.stats.unwrap().watch_word_hits, 1, "{revision}");
    }
    plane.place([placed("v2", "/fake/v2")]);
    eventually("nothing is watched for", || async {
        let reply = ask(&running, "v1", 200).await.unwrap();
        reply.stats.unwrap().watch_word_hits == 0
    })
    .await;
}

#[tokio::test]
async fn a_placed_revision_that_is_published_with_another_digest_is_refused_and_the_worker_goes_on() {
    let mut plane = Plane::start().await;
    let config = placeable(&plane, &[], Duration::ZERO);
    publish(&config.store, "v2", "ff").await;
    let running = start_empty(config).await;
    plane.place([placed("v2", "/fake/v2")]);
    let told = plane.until_in("v2", State::Failed).await;
    assert!(told.message.contains("published with digest ff"), "{told:?}");
    plane.place([placed("v3", "/fake/v3")]);
    plane.until_in("v3", State::Serving).await;
    assert_eq!(ask(&running, "v3", 2).await.unwrap().ids().len(), 2);
}

#[tokio::test]
async fn the_first_worker_writes_the_digest_that_an_operator_left_out() {
    let mut plane = Plane::start().await;
    let config = placeable(&plane, &["demo@v1"], Duration::ZERO);
    let store = config.store.clone();
    publish(&store, "v2", "").await;
    let _running = start(config).await;
    plane.place([placed("v2", "/fake/v2")]);
    let told = plane.until_in("v2", State::Serving).await;
    eventually("the digest is published", || async {
        let published = published(&store, "v2").await;
        // What the operator said stays.
        assert_eq!(published.source, "/models/v2");
        published.digest == told.digest
    })
    .await;
}

async fn publish(store: &Arc<dyn Store>, revision: &str, digest: &str) {
    let published = PublishedRevision {
        model: "demo".into(),
        revision: revision.into(),
        digest: digest.into(),
        source: format!("/models/{revision}"),
        ..Default::default()
    };
    let put = Operation::Put {
        key: key(revision),
        value: serde_json::to_vec(&published).unwrap().into(),
        lease: None,
    };
    let transaction = Transaction {
        preconditions: vec![],
        operations: vec![put],
    };
    store.commit(transaction).await.unwrap();
}

async fn published(store: &Arc<dyn Store>, revision: &str) -> PublishedRevision {
    let entry = store.get(&key(revision)).await.unwrap().unwrap();
    serde_json::from_slice(&entry.value).unwrap()
}

fn key(revision: &str) -> Key {
    Key::Model {
        model: "demo".into(),
        revision: revision.into(),
    }
}
