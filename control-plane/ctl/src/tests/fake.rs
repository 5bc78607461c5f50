//! A control plane and a gateway of one rollout: stable v1, canary v2 at 1 %, two gateways.

mod gateway;
mod state;

use penstock_proto::v1::{
    admin_server::{Admin, AdminServer},
    inference_server::InferenceServer,
    *,
};
use state::State;
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, metadata::MetadataMap};

#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) address: String,
    state: Arc<Mutex<State>>,
}

type Statuses = Pin<Box<dyn Stream<Item = Result<RolloutStatus, Status>> + Send>>;
type Chunks = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

impl Fake {
    /// Serves on a free port until the test's runtime ends.
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            state: Arc::new(Mutex::new(State::new())),
        };
        let server = tonic::transport::Server::builder()
            .add_service(AdminServer::new(fake.clone()))
            .add_service(InferenceServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        fake
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn called(&self, metadata: &MetadataMap) -> Result<MutexGuard<'_, State>, Status> {
        let mut state = self.state();
        state.traceparents.push(
            metadata
                .get("traceparent")
                .map(|v| v.to_str().unwrap().to_owned()),
        );
        match state.fails {
            Some(code) => Err(Status::new(code, "as told")),
            None => Ok(state),
        }
    }
}

#[tonic::async_trait]
impl Admin for Fake {
    type WatchRolloutStream = Statuses;

    async fn create_rollout(
        &self,
        request: Request<CreateRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        let mut state = self.called(request.metadata())?;
        let request = request.into_inner();
        Ok(Response::new(state.change(
            Phase::Converging,
            request.canary_ppm.unwrap_or_default(),
        )))
    }

    async fn get_rollout(
        &self,
        request: Request<GetRolloutRequest>,
    ) -> Result<Response<RolloutStatus>, Status> {
        Ok(Response::new(self.called(request.metadata())?.status(2)))
    }

    async fn list_rollouts(
        &self,
        request: Request<ListRolloutsRequest>,
    ) -> Result<Response<ListRolloutsResponse>, Status> {
        let rollouts = vec![self.called(request.metadata())?.status(2)];
        Ok(Response::new(ListRolloutsResponse { rollouts }))
    }

    async fn set_rollout(&self, request: Request<SetRolloutRequest>) -> Result<Response<Rollout>, Status> {
        let mut state = self.called(request.metadata())?;
        let request = request.into_inner();
        if let Some(share) = state.interfere.take() {
            state.rollout.store_revision += 1;
            if let Some(ppm) = share {
                state.rollout.canary_ppm = ppm;
                state.rollout.actor = "bob".into();
            }
        }
        state.compare(request.expect_revision)?;
        if request.dry_run {
            return Ok(Response::new(state.rollout.clone()));
        }
        state.last_set = Some(request.clone());
        Ok(Response::new(state.change(Phase::Converging, request.canary_ppm)))
    }

    async fn promote_rollout(
        &self,
        request: Request<PromoteRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        let mut state = self.called(request.metadata())?;
        if request.get_ref().dry_run {
            return Ok(Response::new(state.rollout.clone()));
        }
        Ok(Response::new(state.change(Phase::Promoting, 1_000_000)))
    }

    async fn abort_rollout(
        &self,
        request: Request<AbortRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        let mut state = self.called(request.metadata())?;
        if request.get_ref().dry_run {
            return Ok(Response::new(state.rollout.clone()));
        }
        state.aborted_uid = Some(request.into_inner().uid);
        Ok(Response::new(state.change(Phase::Aborting, 0)))
    }

    async fn watch_rollout(
        &self,
        request: Request<WatchRolloutRequest>,
    ) -> Result<Response<Statuses>, Status> {
        let mut state = self.called(request.metadata())?;
        let mut statuses = vec![Ok(state.status(1))];
        if !state.refuses {
            state.settle();
            statuses.push(Ok(state.status(2)));
        }
        let open = !state.ends_watch;
        let tail = tokio_stream::pending().take_while(move |_: &Result<_, _>| open);
        let tail: Statuses = if open {
            Box::pin(tail)
        } else {
            Box::pin(tokio_stream::empty())
        };
        Ok(Response::new(Box::pin(tokio_stream::iter(statuses).chain(tail))))
    }

    async fn list_workers(
        &self,
        request: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        let ops_address = self.called(request.metadata())?.ops_address.clone();
        let worker = Worker {
            id: "w1".into(),
            ops_address,
            runner: "fake".into(),
            ..Worker::default()
        };
        Ok(Response::new(ListWorkersResponse {
            workers: vec![worker],
        }))
    }

    async fn list_gateways(
        &self,
        request: Request<ListGatewaysRequest>,
    ) -> Result<Response<ListGatewaysResponse>, Status> {
        let ops_address = self.called(request.metadata())?.ops_address.clone();
        let gateway = Gateway {
            node: "gw-1".into(),
            ops_address,
            live: true,
            acknowledged_epoch: 8,
            ..Gateway::default()
        };
        Ok(Response::new(ListGatewaysResponse {
            epoch: 8,
            gateways: vec![gateway],
        }))
    }

    async fn list_models(
        &self,
        request: Request<ListPublishedRequest>,
    ) -> Result<Response<ListPublishedResponse>, Status> {
        let mut state = self.called(request.metadata())?;
        let revision = |name: &str| PublishedRevision {
            name: name.into(),
            ..PublishedRevision::default()
        };
        let mut revisions = vec![revision("v1")];
        if !state.placements.is_empty() {
            let mut loaded = RevisionState {
                message: "no space".into(),
                ..RevisionState::default()
            };
            loaded.set_state(state.placements.remove(0));
            let placement = PlacementStatus {
                worker: "w1".into(),
                state: Some(loaded),
            };
            revisions.push(PublishedRevision {
                placements: vec![placement],
                digest: "d".repeat(64),
                ..revision("v3")
            });
        }
        let model = PublishedModel {
            name: "demo".into(),
            revisions,
            ..PublishedModel::default()
        };
        Ok(Response::new(ListPublishedResponse { models: vec![model] }))
    }

    async fn get_snapshot(&self, request: Request<GetSnapshotRequest>) -> Result<Response<Snapshot>, Status> {
        let state = self.called(request.metadata())?;
        let revision = |name: &str| {
            Some(Revision {
                name: name.into(),
                digest: "d".repeat(64),
            })
        };
        let route = Route {
            model: "demo".into(),
            stable: revision("v1"),
            canary: Some(Canary {
                revision: revision("v2"),
                ppm: state.rollout.canary_ppm,
                ..Canary::default()
            }),
            rollout_uid: "r-1".into(),
            generation: 3,
            sticky: Some(Sticky {
                keys: vec!["metadata:x-user-id".into()],
                on_missing: OnMissing::Request.into(),
                ..Sticky::default()
            }),
            ..Route::default()
        };
        Ok(Response::new(Snapshot {
            epoch: 8,
            routes: vec![route],
            ..Snapshot::default()
        }))
    }

    async fn apply_rollout(
        &self,
        request: Request<ApplyRolloutRequest>,
    ) -> Result<Response<ApplyRolloutResponse>, Status> {
        let mut state = self.called(request.metadata())?;
        let request = request.into_inner();
        let findings = state.findings.clone();
        if findings.iter().any(|finding| finding.severity == "error") {
            return Ok(Response::new(ApplyRolloutResponse {
                outcome: "refused".into(),
                findings,
                ..ApplyRolloutResponse::default()
            }));
        }
        state.compare(request.expect_revision)?;
        let previous = state.rollout.manifest.clone();
        let outcome = state.outcome.to_owned();
        let rollout = if request.dry_run || outcome != "updated" {
            state.rollout.clone()
        } else {
            state.rollout.manifest.clone_from(&request.manifest);
            state.change(Phase::Converging, 10_000)
        };
        if !request.dry_run {
            state.last_apply = Some(request);
        }
        Ok(Response::new(ApplyRolloutResponse {
            rollout: Some(rollout),
            outcome,
            findings,
            previous,
        }))
    }

    async fn resume_rollout(
        &self,
        request: Request<ChangeRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        self.amend("resume", request, Phase::Converging, 20_000)
    }

    async fn pause_rollout(
        &self,
        request: Request<ChangeRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        self.amend("pause", request, Phase::Paused, 10_000)
    }

    async fn approve_rollout(
        &self,
        request: Request<ChangeRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        self.amend("approve", request, Phase::Converging, 50_000)
    }

    async fn step_rollout(&self, request: Request<StepRolloutRequest>) -> Result<Response<Rollout>, Status> {
        let step = request.get_ref().step;
        let verb = step.map_or_else(|| "step".to_owned(), |step| format!("step {step}"));
        let request = request.map(|request| request.change.unwrap());
        self.amend(&verb, request, Phase::Converging, 250_000)
    }

    async fn retry_rollout(
        &self,
        request: Request<ChangeRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        self.amend("retry", request, Phase::Warming, 0)
    }

    async fn undo_rollout(
        &self,
        request: Request<ChangeRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        self.amend("undo", request, Phase::Promoting, 1_000_000)
    }

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Result<Response<ListAuditResponse>, Status> {
        drop(self.called(request.metadata())?);
        let request = request.into_inner();
        let record = |n: u64, model: &str, operation: &str, actor: &str| AuditRecord {
            at_ms: 1_700_000_000_000 - n * 60_000,
            model: model.into(),
            operation: operation.into(),
            actor: actor.into(),
            change: "share 1% → 5%".into(),
            ..AuditRecord::default()
        };
        let mut records = vec![
            record(0, "demo", "SetRollout", "ada"),
            record(1, "other", "PublishModel", "bob"),
            record(2, "demo", "controller", ""),
        ];
        records.retain(|record| request.model.is_empty() || request.model == record.model);
        records.truncate(usize::try_from(request.limit).unwrap());
        Ok(Response::new(ListAuditResponse { records }))
    }

    async fn publish_model(
        &self,
        request: Request<PublishModelRequest>,
    ) -> Result<Response<PublishedRevision>, Status> {
        let mut state = self.called(request.metadata())?;
        let request = request.into_inner();
        let name = request.revision.clone();
        state.last_publish = Some(request);
        Ok(Response::new(PublishedRevision {
            name,
            ..PublishedRevision::default()
        }))
    }

    async fn retire_model(
        &self,
        request: Request<RetireModelRequest>,
    ) -> Result<Response<PublishedRevision>, Status> {
        drop(self.called(request.metadata())?);
        match request.get_ref().revision.as_str() {
            "v1" => Err(Status::failed_precondition("v1 is stable")),
            name => Ok(Response::new(PublishedRevision {
                name: name.into(),
                role: "retired".into(),
                ..PublishedRevision::default()
            })),
        }
    }
}

impl Fake {
    fn amend(
        &self,
        verb: &str,
        request: Request<ChangeRolloutRequest>,
        phase: Phase,
        ppm: u32,
    ) -> Result<Response<Rollout>, Status> {
        let mut state = self.called(request.metadata())?;
        let request = request.into_inner();
        state.compare(request.expect_revision)?;
        if request.dry_run {
            return Ok(Response::new(Rollout {
                canary_ppm: ppm,
                phase: phase.into(),
                ..state.rollout.clone()
            }));
        }
        state.amended.push((verb.to_owned(), request.uid));
        Ok(Response::new(state.change(phase, ppm)))
    }
}
