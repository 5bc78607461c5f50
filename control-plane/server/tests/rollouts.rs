//! The control plane over the embedded store, with real gRPC clients: operators and gateways.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use control_plane::Config;
use penstock_client::{AdminClient, AdminError, Subscription, SyncConfig, Veto, View, subscribe};
use penstock_plan::{PublishedRevision, ServedRevision, WorkerRecord};
use penstock_proto::v1::{self, Phase};
use penstock_store::{Key, Operation, Store, Transaction, embedded::EmbeddedStore};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(10);

/// A control plane on a store where demo@v1, v2 and v3 are published, v1 and v2 served.
struct Running {
    store: Arc<dyn Store>,
    admin: AdminClient,
    address: String,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn start() -> Self {
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::in_memory());
        for revision in ["v1", "v2", "v3"] {
            let published = PublishedRevision {
                model: "demo".into(),
                revision: revision.into(),
                digest: format!("digest of {revision}"),
                published_ms: 0,
            };
            let key = Key::Model {
                model: "demo".into(),
                revision: revision.into(),
            };
            put(&*store, key, serde_json::to_vec(&published).unwrap()).await;
        }
        put_worker(&*store, "w1", &[("v1", "digest of v1"), ("v2", "digest of v2")]).await;
        Self::on(store).await
    }

    async fn on(store: Arc<dyn Store>) -> Self {
        let any = "127.0.0.1:0".parse().unwrap();
        let server = Config {
            listen: any,
            ops_listen: any,
            ..Config::new(store.clone())
        }
        .build()
        .await
        .unwrap();
        let address = format!("http://{}", server.addresses().listen);
        let stop = CancellationToken::new();
        let shutdown = stop.clone();
        let task = tokio::spawn(async move { server.run(shutdown).await.unwrap() });
        let admin = AdminClient::connect(&address).await.unwrap();
        let running = Self {
            store,
            admin,
            address,
            stop,
            task,
        };
        running
            .until("the first snapshot", async |running| {
                running
                    .admin
                    .get_snapshot()
                    .await
                    .is_ok_and(|snapshot| snapshot.epoch > 0)
            })
            .await;
        running
    }

    /// Ends this control plane and starts another on the same store.
    async fn restart(self) -> Self {
        self.stop.cancel();
        self.task.await.unwrap();
        Self::on(self.store).await
    }

    fn gateway(&self, node: &str) -> Gateway {
        self.gateway_that(node, |_| Ok(()))
    }

    fn gateway_that(&self, node: &str, judge: impl Fn(u64) -> Result<(), Veto> + Send + 'static) -> Gateway {
        let stop = CancellationToken::new();
        let apply =
            Box::new(move |candidate: penstock_client::Candidate<'_>| judge(candidate.snapshot.epoch));
        let subscription = subscribe(
            SyncConfig::new([self.address.as_str()], node, "boot-1"),
            apply,
            stop.clone(),
        );
        let subscription = subscription.unwrap();
        Gateway {
            view: subscription.view(),
            _subscription: subscription,
            _stop: stop.drop_guard(),
        }
    }

    async fn create(&self, canary: &str) -> Result<v1::Rollout, AdminError> {
        let request = v1::CreateRolloutRequest {
            model: "demo".into(),
            canary: canary.into(),
            ..Default::default()
        };
        self.admin.create_rollout(request).await
    }

    async fn set(&self, ppm: u32, expect_revision: Option<u64>) -> Result<v1::Rollout, AdminError> {
        let request = v1::SetRolloutRequest {
            canary_ppm: ppm,
            expect_revision,
            ..Default::default()
        };
        self.admin.set_rollout(request).await
    }

    async fn phase(&self, phase: Phase) -> v1::RolloutStatus {
        self.until(phase.as_str_name(), async |running| {
            running.status().await.rollout.unwrap().phase() == phase
        })
        .await;
        self.status().await
    }

    async fn status(&self) -> v1::RolloutStatus {
        self.admin.get_rollout("demo").await.unwrap()
    }

    async fn until(&self, what: &str, check: impl AsyncFn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !check(self).await {
            assert!(tokio::time::Instant::now() < deadline, "{what} did not happen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

struct Gateway {
    view: watch::Receiver<Arc<View>>,
    _subscription: Subscription,
    _stop: tokio_util::sync::DropGuard,
}

impl Gateway {
    /// Waits until the demo's canary share here is `ppm`.
    async fn has_share(&mut self, ppm: u32) {
        let share = |view: &Arc<View>| {
            let route = view
                .snapshot
                .as_ref()
                .and_then(|snapshot| snapshot.routes.get("demo").cloned());
            route
                .and_then(|route| route.canary)
                .map_or(0, |canary| canary.share.get())
                == ppm
        };
        tokio::time::timeout(PATIENCE, self.view.wait_for(share))
            .await
            .expect("the share arrives")
            .unwrap();
    }
}

async fn put(store: &dyn Store, key: Key, value: Vec<u8>) {
    let operations = vec![Operation::Put {
        key,
        value: value.into(),
        lease: None,
    }];
    store
        .commit(Transaction {
            preconditions: vec![],
            operations,
        })
        .await
        .unwrap();
}

async fn put_worker(store: &dyn Store, id: &str, revisions: &[(&str, &str)]) {
    let record = WorkerRecord {
        id: id.into(),
        boot_id: "b".into(),
        address: "127.0.0.1:1".into(),
        ops_address: "127.0.0.1:2".into(),
        region: String::new(),
        runner: "fake".into(),
        device: String::new(),
        draining: false,
        started_ms: 1,
        revisions: revisions
            .iter()
            .map(|(revision, digest)| ServedRevision {
                model: "demo".into(),
                revision: (*revision).into(),
                digest: (*digest).into(),
                context_length: 128,
            })
            .collect(),
    };
    put(
        store,
        Key::Worker(id.into()),
        serde_json::to_vec(&record).unwrap(),
    )
    .await;
}

#[tokio::test]
async fn a_share_is_acknowledged_by_every_live_gateway() {
    let running = Running::start().await;
    let (mut one, mut two) = (running.gateway("g1"), running.gateway("g2"));
    running.create("v2").await.unwrap();
    running
        .until("both connect", async |r| {
            r.admin.list_gateways().await.unwrap().gateways.len() == 2
        })
        .await;
    running.set(50_000, None).await.unwrap();
    one.has_share(50_000).await;
    two.has_share(50_000).await;
    let status = running.phase(Phase::Paused).await;
    assert_eq!((status.live_gateways, status.acknowledged), (2, 2));
    assert!(status.pending.is_empty() && status.epoch > 0, "{status:?}");
    assert_eq!((status.stable_endpoints, status.canary_endpoints), (1, 1));
}

#[tokio::test]
async fn a_promoted_canary_is_stable_even_after_a_restart() {
    let running = Running::start().await;
    let mut gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.set(50_000, None).await.unwrap();
    gateway.has_share(50_000).await;
    running
        .admin
        .promote_rollout(v1::PromoteRolloutRequest::default())
        .await
        .unwrap();
    running.phase(Phase::Succeeded).await;
    gateway.has_share(0).await;
    let before = running.admin.get_snapshot().await.unwrap();
    assert_eq!(before.routes["demo"].stable.name, "v2");

    let running = running.restart().await;
    assert_eq!(
        running.admin.get_snapshot().await.unwrap(),
        before,
        "no epoch is made by a restart"
    );
    assert_eq!(running.create("v1").await.unwrap().stable, "v2");
}

#[tokio::test]
async fn an_abort_takes_share_and_pin_together() {
    let running = Running::start().await;
    let mut gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.set(500_000, None).await.unwrap();
    gateway.has_share(500_000).await;
    let aborted = running
        .admin
        .abort_rollout(v1::AbortRolloutRequest::default())
        .await
        .unwrap();
    gateway.has_share(0).await;
    let snapshot = running.admin.get_snapshot().await.unwrap();
    assert_eq!(snapshot.routes["demo"].revoked, ["v2"]);
    assert_eq!(aborted.phase(), Phase::Aborting);
    assert!(matches!(
        running.set(1, None).await,
        Err(AdminError::Forbidden(_))
    ));
    let other = v1::AbortRolloutRequest {
        uid: "another".into(),
        ..Default::default()
    };
    assert!(matches!(
        running.admin.abort_rollout(other).await,
        Err(AdminError::Conflict(_))
    ));
}

#[tokio::test]
async fn of_two_operators_one_wins_and_the_other_is_told() {
    let running = Running::start().await;
    let created = running.create("v2").await.unwrap();
    running.phase(Phase::Paused).await;
    let seen = running.status().await.rollout.unwrap().store_revision;
    assert!(seen >= created.store_revision);
    running.set(50_000, Some(seen)).await.unwrap();
    match running.set(10_000, Some(seen)).await {
        Err(AdminError::Conflict(message)) => assert!(message.contains("5%"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(running.status().await.rollout.unwrap().canary_ppm, 50_000);
}

#[tokio::test]
async fn a_refused_snapshot_is_shown_with_its_reason_and_nothing_goes_on() {
    let running = Running::start().await;
    let veto = |epoch| match epoch {
        ..=1 => Ok(()),
        _ => Err(Veto {
            code: "canary_unreachable".into(),
            field: "routes[demo]".into(),
            message: "no v2".into(),
        }),
    };
    let _gateway = running.gateway_that("g1", veto);
    running
        .until("it connects", async |r| {
            !r.admin.list_gateways().await.unwrap().gateways.is_empty()
        })
        .await;
    running.create("v2").await.unwrap();
    running
        .until("the refusal is known", async |r| {
            !r.status().await.nacks.is_empty()
        })
        .await;
    let status = running.status().await;
    assert_eq!(status.nacks[0].code, "canary_unreachable");
    assert_eq!(status.rollout.unwrap().phase(), Phase::Converging);
    assert_eq!(status.pending, ["g1"]);
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_remedy() {
    let running = Running::start().await;
    match running.create("v9").await {
        Err(AdminError::NotFound(message)) => assert!(message.contains("v1, v2, v3"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert!(
        matches!(running.create("v1").await, Err(AdminError::Invalid(_))),
        "stable and canary are one"
    );
    // v3 is published, but nobody serves it.
    running.create("v3").await.unwrap();
    match running.set(10_000, None).await {
        Err(AdminError::Forbidden(message)) => assert!(message.contains("demo@v3"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        running.set(1_000_001, None).await,
        Err(AdminError::Invalid(_))
    ));
    assert!(matches!(
        running.create("v2").await,
        Err(AdminError::AlreadyExists(_))
    ));
    assert!(matches!(
        running.admin.get_rollout("other").await,
        Err(AdminError::NotFound(_))
    ));
}

#[tokio::test]
async fn a_worker_with_another_digest_is_named_and_not_routed_to() {
    let running = Running::start().await;
    put_worker(
        &*running.store,
        "w2",
        &[("v1", "something else"), ("v2", "digest of v2")],
    )
    .await;
    running
        .until("it is listed", async |r| {
            r.admin.list_workers().await.unwrap().len() == 2
        })
        .await;
    let workers = running.admin.list_workers().await.unwrap();
    assert!(workers[1].refused[0].contains("demo@v1"), "{workers:?}");
    let models = running.admin.list_models().await.unwrap();
    let serving: Vec<u32> = models[0]
        .revisions
        .iter()
        .map(|revision| revision.workers)
        .collect();
    assert_eq!(serving, [1, 2, 0]);
}

#[tokio::test]
async fn a_store_that_was_lost_does_not_send_gateways_back() {
    let first = Running::start().await;
    let mut gateway = first.gateway("g1");
    first.create("v2").await.unwrap();
    for ppm in [10_000, 20_000, 30_000] {
        first.set(ppm, None).await.unwrap();
        gateway.has_share(ppm).await;
    }
    let old = first.admin.get_snapshot().await.unwrap().epoch;

    // Another store, and a gateway that comes back with what it had.
    let second = Running::start().await;
    let view = gateway.view.borrow().as_ref().clone();
    let config = SyncConfig {
        initial: view,
        ..SyncConfig::new([second.address.as_str()], "g1", "boot-1")
    };
    let stop = CancellationToken::new();
    let subscription = subscribe(config, Box::new(|_| Ok(())), stop.clone()).unwrap();
    let mut view = subscription.view();
    let newer = |view: &Arc<View>| {
        view.snapshot
            .as_ref()
            .is_some_and(|snapshot| snapshot.epoch > old)
    };
    tokio::time::timeout(PATIENCE, view.wait_for(newer))
        .await
        .expect("it goes on above")
        .unwrap();
    assert!(second.admin.get_snapshot().await.unwrap().epoch > old);
    stop.cancel();
}
