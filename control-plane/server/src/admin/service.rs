//! The calls, one by one.

use std::pin::Pin;

use penstock_proto::v1::{self, admin_server::Admin};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::{AdminService, IN_FLIGHT, Who, refusal, share};
use crate::status;

#[tonic::async_trait]
impl Admin for AdminService {
    type WatchRolloutStream = Pin<Box<dyn Stream<Item = Result<v1::RolloutStatus, Status>> + Send>>;

    async fn create_rollout(
        &self,
        request: Request<v1::CreateRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        self.call("CreateRollout", &metadata, self.create(request)).await
    }

    async fn get_rollout(
        &self,
        request: Request<v1::GetRolloutRequest>,
    ) -> Result<Response<v1::RolloutStatus>, Status> {
        self.knows_gateways()?;
        let model = self.model(&request.into_inner().model)?;
        self.status(&model).map(Response::new)
    }

    async fn list_rollouts(
        &self,
        _: Request<v1::ListRolloutsRequest>,
    ) -> Result<Response<v1::ListRolloutsResponse>, Status> {
        self.knows_gateways()?;
        let state = self.world.state();
        let rollouts = state
            .rollouts
            .values()
            .map(|stored| status::rollout(&state, &self.gateways, &self.observed, stored))
            .collect();
        Ok(Response::new(v1::ListRolloutsResponse { rollouts }))
    }

    async fn set_rollout(
        &self,
        request: Request<v1::SetRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        let share = share(request.canary_ppm)?;
        let who = Who {
            actor: request.actor,
            reason: request.reason,
            dry_run: request.dry_run,
        };
        let work = self.change(
            "SetRollout",
            &request.model,
            request.expect_revision,
            who,
            |rollout, change| {
                let next = rollout.set(share, change).map_err(|error| refusal(&error))?;
                self.reachable(rollout.share, &next).map(|()| next)
            },
        );
        self.call("SetRollout", &metadata, work).await
    }

    async fn promote_rollout(
        &self,
        request: Request<v1::PromoteRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        let who = Who {
            actor: request.actor,
            reason: request.reason,
            dry_run: request.dry_run,
        };
        let work = self.change(
            "PromoteRollout",
            &request.model,
            request.expect_revision,
            who,
            |rollout, change| {
                let next = rollout.promote(change).map_err(|error| refusal(&error))?;
                self.reachable(rollout.share, &next).map(|()| next)
            },
        );
        self.call("PromoteRollout", &metadata, work).await
    }

    async fn abort_rollout(
        &self,
        request: Request<v1::AbortRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        let who = Who {
            actor: request.actor,
            reason: request.reason,
            dry_run: request.dry_run,
        };
        let work = self.change("AbortRollout", &request.model, None, who, |rollout, change| {
            rollout
                .abort(&request.uid, change)
                .map_err(|error| refusal(&error))
        });
        self.call("AbortRollout", &metadata, work).await
    }

    async fn watch_rollout(
        &self,
        request: Request<v1::WatchRolloutRequest>,
    ) -> Result<Response<Self::WatchRolloutStream>, Status> {
        self.knows_gateways()?;
        let model = self.model(&request.into_inner().model)?;
        let (statuses, stream) = mpsc::channel(IN_FLIGHT);
        self.streams.spawn(self.clone().watch(model, statuses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list_workers(
        &self,
        _: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        self.loaded()?;
        Ok(Response::new(v1::ListWorkersResponse {
            workers: status::workers(&self.world.state()),
        }))
    }

    async fn list_gateways(
        &self,
        _: Request<v1::ListGatewaysRequest>,
    ) -> Result<Response<v1::ListGatewaysResponse>, Status> {
        self.knows_gateways()?;
        let epoch = self
            .world
            .state()
            .newest_snapshot()
            .map_or(0, |snapshot| snapshot.epoch);
        let gateways = self
            .gateways
            .all()
            .into_iter()
            .map(|(node, state)| status::gateway(node, state))
            .collect();
        Ok(Response::new(v1::ListGatewaysResponse { epoch, gateways }))
    }

    async fn list_models(
        &self,
        _: Request<v1::ListPublishedRequest>,
    ) -> Result<Response<v1::ListPublishedResponse>, Status> {
        self.loaded()?;
        Ok(Response::new(v1::ListPublishedResponse {
            models: status::models(&self.world.state(), &self.observed),
        }))
    }

    async fn get_snapshot(
        &self,
        _: Request<v1::GetSnapshotRequest>,
    ) -> Result<Response<v1::Snapshot>, Status> {
        self.loaded()?;
        let target = self.world.target().borrow().clone();
        Ok(Response::new(v1::Snapshot {
            digest: target.digest.to_string(),
            ..(&*target.snapshot).into()
        }))
    }

    async fn apply_rollout(
        &self,
        request: Request<v1::ApplyRolloutRequest>,
    ) -> Result<Response<v1::ApplyRolloutResponse>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        self.call("ApplyRollout", &metadata, self.apply(request)).await
    }

    async fn resume_rollout(
        &self,
        request: Request<v1::ChangeRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.operate("ResumeRollout", request, |rollout, change| rollout.resume(change))
            .await
    }

    async fn pause_rollout(
        &self,
        request: Request<v1::ChangeRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.operate("PauseRollout", request, |rollout, change| rollout.pause(&change))
            .await
    }

    async fn approve_rollout(
        &self,
        request: Request<v1::ChangeRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.operate("ApproveRollout", request, |rollout, change| {
            rollout.approve(&change)
        })
        .await
    }

    async fn step_rollout(
        &self,
        request: Request<v1::StepRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let step = request.step.map(|step| step as usize);
        let change = Request::from_parts(metadata, extensions, request.change.unwrap_or_default());
        self.operate("StepRollout", change, move |rollout, change| {
            rollout.step_to(step, change)
        })
        .await
    }

    async fn retry_rollout(
        &self,
        request: Request<v1::ChangeRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.operate("RetryRollout", request, |rollout, change| rollout.retry(change))
            .await
    }

    async fn undo_rollout(
        &self,
        request: Request<v1::ChangeRolloutRequest>,
    ) -> Result<Response<v1::Rollout>, Status> {
        self.operate("UndoRollout", request, |rollout, change| {
            rollout.undo(uuid::Uuid::now_v7().to_string(), change)
        })
        .await
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        self.audit(&request.into_inner()).await.map(Response::new)
    }

    async fn publish_model(
        &self,
        request: Request<v1::PublishModelRequest>,
    ) -> Result<Response<v1::PublishedRevision>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        self.call("PublishModel", &metadata, self.publish(request)).await
    }

    async fn retire_model(
        &self,
        request: Request<v1::RetireModelRequest>,
    ) -> Result<Response<v1::PublishedRevision>, Status> {
        self.loaded()?;
        let (metadata, _, request) = request.into_parts();
        self.call("RetireModel", &metadata, self.retire(request)).await
    }
}
