//! A control plane and a gateway of one rollout: stable v1, canary v2 at 1 %, two gateways.

use penstock_proto::v1::{
    admin_server::{Admin, AdminServer},
    inference_server::{Inference, InferenceServer},
    *,
};
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

/// What the fake remembers and how it misbehaves.
pub(super) struct State {
    rollout: Rollout,
    pub(super) last_set: Option<SetRolloutRequest>,
    pub(super) aborted_uid: Option<String>,
    pub(super) last_generate: Option<String>,
    pub(super) traceparents: Vec<Option<String>>,
    /// Somebody writes before the next set: the controller, or an operator with this share.
    pub(super) interfere: Option<Option<u32>>,
    /// The second gateway refuses every epoch.
    pub(super) refuses: bool,
    /// Somebody aborts after the next change.
    pub(super) aborts: bool,
    /// A watch ends after its statuses instead of staying open.
    pub(super) ends_watch: bool,
    /// Every admin call fails so.
    pub(super) fails: Option<Code>,
}

#[derive(Clone)]
pub(super) struct Fake {
    pub(super) address: String,
    state: Arc<Mutex<State>>,
}

type Statuses = Pin<Box<dyn Stream<Item = Result<RolloutStatus, Status>> + Send>>;
type Chunks = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

impl Fake {
    /// Serves on a free port until the test's runtime ends.
    pub(super) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let rollout = Rollout {
            uid: "r-1".into(),
            model: "demo".into(),
            stable: "v1".into(),
            canary: "v2".into(),
            canary_ppm: 10_000,
            phase: Phase::Paused.into(),
            generation: 3,
            store_revision: 7,
            ..Rollout::default()
        };
        let state = State {
            rollout,
            last_set: None,
            aborted_uid: None,
            last_generate: None,
            traceparents: Vec::new(),
            interfere: None,
            refuses: false,
            aborts: false,
            ends_watch: false,
            fails: None,
        };
        let fake = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            state: Arc::new(Mutex::new(state)),
        };
        let server = tonic::transport::Server::builder()
            .add_service(AdminServer::new(fake.clone()))
            .add_service(InferenceServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        fake
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
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

impl State {
    fn change(&mut self, phase: Phase, ppm: u32) -> Rollout {
        self.rollout.canary_ppm = ppm;
        self.rollout.generation += 1;
        self.rollout.store_revision += 1;
        self.rollout.set_phase(phase);
        self.rollout.clone()
    }

    fn status(&self, acknowledged: u32) -> RolloutStatus {
        let nack = GatewayNack {
            gateway: "gw-2".into(),
            epoch: 8,
            code: "canary_unreachable".into(),
            message: "no endpoint of v2".into(),
        };
        RolloutStatus {
            rollout: Some(self.rollout.clone()),
            epoch: 8,
            live_gateways: 2,
            acknowledged,
            pending: if acknowledged < 2 {
                vec!["gw-2".into()]
            } else {
                Vec::new()
            },
            nacks: if self.refuses { vec![nack] } else { Vec::new() },
            stable_endpoints: 2,
            canary_endpoints: 2,
            ..RolloutStatus::default()
        }
    }

    fn settle(&mut self) {
        let settled = match self.rollout.phase() {
            _ if self.aborts => Phase::Aborting,
            Phase::Converging => Phase::Paused,
            Phase::Promoting => Phase::Succeeded,
            Phase::Aborting => Phase::RolledBack,
            phase => phase,
        };
        self.rollout.set_phase(settled);
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
        if request
            .expect_revision
            .is_some_and(|expected| expected != state.rollout.store_revision)
        {
            return Err(Status::aborted("it moved"));
        }
        state.last_set = Some(request.clone());
        Ok(Response::new(state.change(Phase::Converging, request.canary_ppm)))
    }

    async fn promote_rollout(
        &self,
        request: Request<PromoteRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        Ok(Response::new(
            self.called(request.metadata())?
                .change(Phase::Promoting, 1_000_000),
        ))
    }

    async fn abort_rollout(
        &self,
        request: Request<AbortRolloutRequest>,
    ) -> Result<Response<Rollout>, Status> {
        let mut state = self.called(request.metadata())?;
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
        drop(self.called(request.metadata())?);
        let worker = Worker {
            id: "w1".into(),
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
        drop(self.called(request.metadata())?);
        let gateway = Gateway {
            node: "gw-1".into(),
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
        drop(self.called(request.metadata())?);
        let revision = PublishedRevision {
            name: "v1".into(),
            ..PublishedRevision::default()
        };
        let model = PublishedModel {
            name: "demo".into(),
            revisions: vec![revision],
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
        _: Request<penstock_proto::v1::ApplyRolloutRequest>,
    ) -> Result<Response<penstock_proto::v1::ApplyRolloutResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn resume_rollout(
        &self,
        _: Request<penstock_proto::v1::ChangeRolloutRequest>,
    ) -> Result<Response<penstock_proto::v1::Rollout>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn pause_rollout(
        &self,
        _: Request<penstock_proto::v1::ChangeRolloutRequest>,
    ) -> Result<Response<penstock_proto::v1::Rollout>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn approve_rollout(
        &self,
        _: Request<penstock_proto::v1::ChangeRolloutRequest>,
    ) -> Result<Response<penstock_proto::v1::Rollout>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn step_rollout(
        &self,
        _: Request<penstock_proto::v1::StepRolloutRequest>,
    ) -> Result<Response<penstock_proto::v1::Rollout>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn retry_rollout(
        &self,
        _: Request<penstock_proto::v1::ChangeRolloutRequest>,
    ) -> Result<Response<penstock_proto::v1::Rollout>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn undo_rollout(
        &self,
        _: Request<penstock_proto::v1::ChangeRolloutRequest>,
    ) -> Result<Response<penstock_proto::v1::Rollout>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn list_audit(
        &self,
        _: Request<penstock_proto::v1::ListAuditRequest>,
    ) -> Result<Response<penstock_proto::v1::ListAuditResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn publish_model(
        &self,
        _: Request<penstock_proto::v1::PublishModelRequest>,
    ) -> Result<Response<penstock_proto::v1::PublishedRevision>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn retire_model(
        &self,
        _: Request<penstock_proto::v1::RetireModelRequest>,
    ) -> Result<Response<penstock_proto::v1::PublishedRevision>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

#[tonic::async_trait]
impl Inference for Fake {
    type GenerateStream = Chunks;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Chunks>, Status> {
        let metadata = request.metadata().clone();
        let get = |name: &str| metadata.get(name).map_or("", |value| value.to_str().unwrap());
        let body = request.get_ref();
        let input = match body.input.as_ref().unwrap() {
            generate_request::Input::Prompt(prompt) => format!("prompt={prompt}"),
            generate_request::Input::Chat(chat) => {
                format!("chat={}:{}", chat.messages[0].role, chat.messages[0].content)
            }
            generate_request::Input::InputIds(_) => "ids".to_owned(),
        };
        let sampling = body.sampling.clone().unwrap_or_default();
        let number = |value: Option<u64>| value.map_or_else(|| "None".to_owned(), |value| value.to_string());
        self.state().last_generate = Some(format!(
            "{input} user={} pin={} region={} seed={} max={} temperature={:?}",
            get("x-user-id"),
            get("x-model-version"),
            get("x-region"),
            number(sampling.seed),
            number(sampling.max_tokens.map(u64::from)),
            sampling.temperature,
        ));
        let mut last = GenerateResponse {
            text: " world".into(),
            ..GenerateResponse::default()
        };
        last.set_finish_reason(FinishReason::Length);
        last.usage = Some(Usage {
            prompt_tokens: 3,
            completion_tokens: 2,
            cached_tokens: 1,
        });
        let first = GenerateResponse {
            text: "Hello".into(),
            ..GenerateResponse::default()
        };
        let mut response: Response<Chunks> =
            Response::new(Box::pin(tokio_stream::iter([Ok(first), Ok(last)])));
        for (name, value) in [
            ("x-model-version", "v2"),
            ("x-rollout-epoch", "8"),
            ("x-assignment-reason", "pin"),
            ("x-seed", "3"),
        ] {
            response.metadata_mut().insert(name, value.parse().unwrap());
        }
        Ok(response)
    }

    async fn tokenize(&self, _: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn feedback(
        &self,
        _: Request<penstock_proto::v1::FeedbackRequest>,
    ) -> Result<Response<penstock_proto::v1::FeedbackResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}
