//! A control plane in this process, with real gRPC clients: operators and gateways.

use std::{sync::Arc, time::Duration};

use control_plane::Config;
use penstock_client::{AdminClient, AdminError, Subscription, SyncConfig, Veto, View, subscribe};
use penstock_plan::{PublishedRevision, ServedRevision, WorkerRecord};
use penstock_proto::v1::{self, Phase};
use penstock_store::{Key, Operation, Store, Transaction, embedded::EmbeddedStore};
use tokio::{sync::watch, task::JoinHandle};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

/// Longest wait for something that is to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A control plane on a store where demo@v1, v2 and v3 are published, v1 and v2 served.
pub(crate) struct Running {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) admin: AdminClient,
    pub(crate) address: String,
    pub(crate) stop: CancellationToken,
    pub(crate) task: JoinHandle<()>,
}

impl Running {
    pub(crate) async fn start() -> Self {
        Self::fresh(Arc::new(EmbeddedStore::in_memory())).await
    }

    /// On a store that is empty.
    pub(crate) async fn fresh(store: Arc<dyn Store>) -> Self {
        for revision in ["v1", "v2", "v3"] {
            let published = PublishedRevision {
                model: "demo".into(),
                revision: revision.into(),
                digest: format!("digest of {revision}"),
                published_ms: 0,
                ..PublishedRevision::default()
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

    pub(crate) async fn on(store: Arc<dyn Store>) -> Self {
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
                let snapshot = running.admin.get_snapshot().await;
                snapshot.is_ok_and(|snapshot| snapshot.epoch > 0)
            })
            .await;
        running
    }

    /// Ends this control plane and starts another on the same store.
    pub(crate) async fn restart(self) -> Self {
        self.stop.cancel();
        self.task.await.unwrap();
        Self::on(self.store).await
    }

    pub(crate) fn gateway(&self, node: &str) -> Gateway {
        self.gateway_that(node, |_| Ok(()))
    }

    /// A gateway that knows several control planes.
    pub(crate) fn gateway_of(node: &str, control_planes: &[&Self]) -> Gateway {
        let addresses = control_planes.iter().map(|running| running.address.as_str());
        Gateway::start(node, addresses, |_| Ok(()))
    }

    pub(crate) fn gateway_that(
        &self,
        node: &str,
        judge: impl Fn(u64) -> Result<(), Veto> + Send + 'static,
    ) -> Gateway {
        Gateway::start(node, [self.address.as_str()], judge)
    }

    /// A gateway that says that it is alive and nothing else; it ends with the handle.
    pub(crate) fn silent_gateway(&self, node: &str) -> tokio_util::task::AbortOnDropHandle<()> {
        let hello = v1::Hello {
            role: v1::hello::Role::Gateway.into(),
            node: node.into(),
            boot_id: format!("boot of {node}"),
            ..v1::Hello::default()
        };
        let address = self.address.clone();
        let speak = async move {
            let said = |message| v1::NodeMessage {
                message: Some(message),
            };
            let alive = tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(
                Duration::from_millis(500),
            ));
            let first = said(v1::node_message::Message::Hello(hello));
            let rest = alive.map(move |_| said(v1::node_message::Message::Alive(v1::Alive {})));
            let messages = tokio_stream::once(first).chain(rest);
            let mut client = v1::sync_client::SyncClient::connect(address).await.unwrap();
            let mut pushes = client.sync(messages).await.unwrap().into_inner();
            while let Ok(Some(_)) = pushes.message().await {}
        };
        tokio_util::task::AbortOnDropHandle::new(tokio::spawn(speak))
    }

    pub(crate) async fn apply(&self, manifest: &str) {
        let request = v1::ApplyRolloutRequest {
            manifest: manifest.into(),
            ..Default::default()
        };
        let applied = self.admin.apply_rollout(request).await.unwrap();
        assert!(applied.rollout.is_some(), "{:?}", applied.findings);
    }

    pub(crate) async fn create(&self, canary: &str) -> Result<v1::Rollout, AdminError> {
        let request = v1::CreateRolloutRequest {
            model: "demo".into(),
            canary: canary.into(),
            ..Default::default()
        };
        self.admin.create_rollout(request).await
    }

    pub(crate) async fn set(
        &self,
        ppm: u32,
        expect_revision: Option<u64>,
    ) -> Result<v1::Rollout, AdminError> {
        let request = v1::SetRolloutRequest {
            canary_ppm: ppm,
            expect_revision,
            ..Default::default()
        };
        self.admin.set_rollout(request).await
    }

    pub(crate) async fn phase(&self, phase: Phase) -> v1::RolloutStatus {
        self.until(phase.as_str_name(), async |running| {
            running.status().await.rollout.unwrap().phase() == phase
        })
        .await;
        self.status().await
    }

    pub(crate) async fn status(&self) -> v1::RolloutStatus {
        self.admin.get_rollout("demo").await.unwrap()
    }

    pub(crate) async fn until(&self, what: &str, check: impl AsyncFn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !check(self).await {
            assert!(tokio::time::Instant::now() < deadline, "{what} did not happen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

pub(crate) struct Gateway {
    pub(crate) view: watch::Receiver<Arc<View>>,
    _subscription: Subscription,
    _stop: tokio_util::sync::DropGuard,
}

impl Gateway {
    fn start<'a>(
        node: &str,
        addresses: impl IntoIterator<Item = &'a str>,
        judge: impl Fn(u64) -> Result<(), Veto> + Send + 'static,
    ) -> Self {
        let stop = CancellationToken::new();
        let apply =
            Box::new(move |candidate: penstock_client::Candidate<'_>| judge(candidate.snapshot.epoch));
        let config = SyncConfig::new(addresses, node, "boot-1");
        let subscription = subscribe(config, apply, stop.clone()).unwrap();
        Self {
            view: subscription.view(),
            _subscription: subscription,
            _stop: stop.drop_guard(),
        }
    }

    /// Waits until what it sees is so.
    pub(crate) async fn sees(&mut self, what: &str, check: impl FnMut(&Arc<View>) -> bool) {
        tokio::time::timeout(PATIENCE, self.view.wait_for(check))
            .await
            .unwrap_or_else(|_| panic!("{what} is not seen"))
            .unwrap();
    }

    /// Waits until the demo's canary share here is `ppm`.
    pub(crate) async fn has_share(&mut self, ppm: u32) {
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
        self.sees(&format!("a share of {ppm} ppm"), share).await;
    }
}

pub(crate) async fn put(store: &dyn Store, key: Key, value: Vec<u8>) {
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

pub(crate) async fn put_worker(store: &dyn Store, id: &str, revisions: &[(&str, &str)]) {
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
