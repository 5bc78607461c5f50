//! What operators do, as typed calls.

use std::{fmt, time::Duration};

use penstock_plan::Snapshot;
use penstock_proto::{
    convert::ConvertError,
    v1::{self, admin_client},
};
use tonic::{
    Code, Response, Status, Streaming,
    metadata::MetadataMap,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{Address, AddressError, address::root_cause};

/// How long to try to connect, and to wait for the reply to one call.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The control plane's Admin service. Clones share one connection.
#[derive(Clone)]
pub struct AdminClient {
    rpc: admin_client::AdminClient<InterceptedService<Channel, AddMetadata>>,
    address: Address,
}

/// Why an admin call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The address cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Nobody listens there.
    #[error("no control plane at {address}: {cause}; start one, or name the address of one that runs")]
    Unreachable {
        /// Where nobody listens.
        address: Address,
        /// What the operating system says.
        cause: String,
    },
    /// What was named does not exist.
    #[error("{0}")]
    NotFound(String),
    /// What was to be created exists.
    #[error("{0}")]
    AlreadyExists(String),
    /// Somebody else was faster.
    #[error("{0}")]
    Conflict(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The rollout's phase forbids it.
    #[error("{0}")]
    Forbidden(String),
    /// The caller may not do it.
    #[error("{0}")]
    Denied(String),
    /// The control plane cannot do it now, for example because its store is down.
    #[error("the control plane at {address} cannot do it now: {message}")]
    Unavailable {
        /// Which control plane.
        address: Address,
        /// Its reason.
        message: String,
    },
    /// No reply in time; whether it was done is not known.
    #[error("the control plane at {address} did not reply in time: {message}")]
    TimedOut {
        /// Which control plane.
        address: Address,
        /// Whose limit it was.
        message: String,
    },
    /// Anything else.
    #[error("the control plane at {address} failed: {}: {message}", .code.description())]
    Failed {
        /// Which control plane.
        address: Address,
        /// The status code.
        code: Code,
        /// Its reason.
        message: String,
    },
    /// The reply cannot be read.
    #[error("the control plane sent a snapshot that cannot be read")]
    Reply(#[from] ConvertError),
}

/// Adds metadata to each call.
#[derive(Clone, Copy)]
struct AddMetadata(fn(&mut MetadataMap));

// === impl AdminClient ===

impl AdminClient {
    /// Connects to the control plane at `address`.
    ///
    /// # Errors
    /// The address cannot be used, or nobody listens there.
    pub async fn connect(address: &str) -> Result<Self, AdminError> {
        Self::connect_with(address, |_| ()).await
    }

    /// Connects, and adds to every call what `add_metadata` writes: the caller's trace context, for example.
    ///
    /// # Errors
    /// The address cannot be used, or nobody listens there.
    pub async fn connect_with(address: &str, add_metadata: fn(&mut MetadataMap)) -> Result<Self, AdminError> {
        let address: Address = address.parse()?;
        let channel = address
            .endpoint(TIMEOUT)
            .timeout(TIMEOUT)
            .connect()
            .await
            .map_err(|error| AdminError::Unreachable {
                address: address.clone(),
                cause: root_cause(&error),
            })?;
        let rpc = admin_client::AdminClient::with_interceptor(channel, AddMetadata(add_metadata));
        Ok(Self { rpc, address })
    }

    /// Creates a rollout.
    ///
    /// # Errors
    /// One is under way, a revision is unknown, or the store is down.
    pub async fn create_rollout(&self, request: v1::CreateRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().create_rollout(request).await)
    }

    /// A model's rollout; the only one there is where `model` is empty.
    ///
    /// # Errors
    /// There is none.
    pub async fn get_rollout(&self, model: &str) -> Result<v1::RolloutStatus, AdminError> {
        self.done(
            self.rpc
                .clone()
                .get_rollout(v1::GetRolloutRequest {
                    model: model.to_owned(),
                })
                .await,
        )
    }

    /// Every rollout.
    ///
    /// # Errors
    /// The control plane cannot be reached.
    pub async fn list_rollouts(&self) -> Result<Vec<v1::RolloutStatus>, AdminError> {
        let reply = self.rpc.clone().list_rollouts(v1::ListRolloutsRequest {}).await;
        Ok(self.done(reply)?.rollouts)
    }

    /// Sets a canary's share.
    ///
    /// # Errors
    /// There is no rollout, its phase forbids it, or somebody else changed it first.
    pub async fn set_rollout(&self, request: v1::SetRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().set_rollout(request).await)
    }

    /// Makes a canary the stable revision.
    ///
    /// # Errors
    /// As for [`set_rollout`](Self::set_rollout).
    pub async fn promote_rollout(
        &self,
        request: v1::PromoteRolloutRequest,
    ) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().promote_rollout(request).await)
    }

    /// Sends all traffic back to stable.
    ///
    /// # Errors
    /// There is no such rollout, or it has succeeded.
    pub async fn abort_rollout(&self, request: v1::AbortRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().abort_rollout(request).await)
    }

    /// A rollout's status now and after every change.
    ///
    /// # Errors
    /// There is no rollout. What breaks later comes as a [`Status`] on the stream.
    pub async fn watch_rollout(&self, model: &str) -> Result<Streaming<v1::RolloutStatus>, AdminError> {
        self.done(
            self.rpc
                .clone()
                .watch_rollout(v1::WatchRolloutRequest {
                    model: model.to_owned(),
                })
                .await,
        )
    }

    /// Creates a rollout from its manifest, or changes the plan of the one under way. Findings that are errors come
    /// with the reply, and then nothing was written.
    ///
    /// # Errors
    /// A revision is unknown, the phase forbids it, or somebody else changed it first.
    pub async fn apply_rollout(
        &self,
        request: v1::ApplyRolloutRequest,
    ) -> Result<v1::ApplyRolloutResponse, AdminError> {
        self.done(self.rpc.clone().apply_rollout(request).await)
    }

    /// Stops at the present share until it is resumed.
    ///
    /// # Errors
    /// As for [`set_rollout`](Self::set_rollout).
    pub async fn pause_rollout(&self, request: v1::ChangeRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().pause_rollout(request).await)
    }

    /// Goes on from a pause at the next higher step.
    ///
    /// # Errors
    /// It is not paused; else as for [`set_rollout`](Self::set_rollout).
    pub async fn resume_rollout(&self, request: v1::ChangeRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().resume_rollout(request).await)
    }

    /// Gives the approval that the present step waits for.
    ///
    /// # Errors
    /// It waits for none; else as for [`set_rollout`](Self::set_rollout).
    pub async fn approve_rollout(
        &self,
        request: v1::ChangeRolloutRequest,
    ) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().approve_rollout(request).await)
    }

    /// Goes to a step at once.
    ///
    /// # Errors
    /// There is no such step; else as for [`set_rollout`](Self::set_rollout).
    pub async fn step_rollout(&self, request: v1::StepRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().step_rollout(request).await)
    }

    /// Tries an aborted rollout again from its first step.
    ///
    /// # Errors
    /// It was not aborted; else as for [`set_rollout`](Self::set_rollout).
    pub async fn retry_rollout(&self, request: v1::ChangeRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().retry_rollout(request).await)
    }

    /// Goes back to the revision that was stable before the last promotion, as a rollout of its own.
    ///
    /// # Errors
    /// There was no promotion; else as for [`set_rollout`](Self::set_rollout).
    pub async fn undo_rollout(&self, request: v1::ChangeRolloutRequest) -> Result<v1::Rollout, AdminError> {
        self.done(self.rpc.clone().undo_rollout(request).await)
    }

    /// Who changed what, newest first: at most `limit` records of `model`, or of every model where it is empty.
    ///
    /// # Errors
    /// The control plane cannot be reached, or its store is down.
    pub async fn list_audit(&self, model: &str, limit: u32) -> Result<Vec<v1::AuditRecord>, AdminError> {
        let request = v1::ListAuditRequest {
            model: model.to_owned(),
            limit,
        };
        let reply = self.rpc.clone().list_audit(request).await;
        Ok(self.done(reply)?.records)
    }

    /// Makes a checkpoint known as a revision of a model; workers load it.
    ///
    /// # Errors
    /// The revision exists with another source, or the store is down.
    pub async fn publish_model(
        &self,
        request: v1::PublishModelRequest,
    ) -> Result<v1::PublishedRevision, AdminError> {
        self.done(self.rpc.clone().publish_model(request).await)
    }

    /// Takes a revision out of service on every worker.
    ///
    /// # Errors
    /// There is no such revision, or a rollout or a model needs it.
    pub async fn retire_model(
        &self,
        request: v1::RetireModelRequest,
    ) -> Result<v1::PublishedRevision, AdminError> {
        self.done(self.rpc.clone().retire_model(request).await)
    }

    /// Every registered worker.
    ///
    /// # Errors
    /// The control plane cannot be reached.
    pub async fn list_workers(&self) -> Result<Vec<v1::Worker>, AdminError> {
        let reply = self.rpc.clone().list_workers(v1::ListWorkersRequest {}).await;
        Ok(self.done(reply)?.workers)
    }

    /// Every gateway that connected, and the epoch that they are told to apply.
    ///
    /// # Errors
    /// The control plane cannot be reached.
    pub async fn list_gateways(&self) -> Result<v1::ListGatewaysResponse, AdminError> {
        self.done(self.rpc.clone().list_gateways(v1::ListGatewaysRequest {}).await)
    }

    /// Every published model with its revisions.
    ///
    /// # Errors
    /// The control plane cannot be reached.
    pub async fn list_models(&self) -> Result<Vec<v1::PublishedModel>, AdminError> {
        let reply = self.rpc.clone().list_models(v1::ListPublishedRequest {}).await;
        Ok(self.done(reply)?.models)
    }

    /// The snapshot that gateways are told to apply.
    ///
    /// # Errors
    /// There is none yet, or it cannot be read.
    pub async fn get_snapshot(&self) -> Result<Snapshot, AdminError> {
        let reply = self.rpc.clone().get_snapshot(v1::GetSnapshotRequest {}).await;
        Ok(Snapshot::try_from(self.done(reply)?)?)
    }

    fn done<T>(&self, reply: Result<Response<T>, Status>) -> Result<T, AdminError> {
        reply
            .map(Response::into_inner)
            .map_err(|status| AdminError::new(&self.address, &status))
    }
}

impl fmt::Debug for AdminClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminClient")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Interceptor for AddMetadata {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        (self.0)(request.metadata_mut());
        Ok(request)
    }
}

// === impl AdminError ===

impl AdminError {
    /// Whether the same call may go well a moment later.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Unavailable { .. } | Self::TimedOut { .. }
        )
    }

    fn new(address: &Address, status: &Status) -> Self {
        let (address, message) = (address.clone(), status.message().to_owned());
        match status.code() {
            Code::NotFound => Self::NotFound(message),
            Code::AlreadyExists => Self::AlreadyExists(message),
            Code::Aborted => Self::Conflict(message),
            Code::InvalidArgument | Code::OutOfRange => Self::Invalid(message),
            Code::FailedPrecondition => Self::Forbidden(message),
            Code::PermissionDenied | Code::Unauthenticated => Self::Denied(message),
            Code::Unavailable => Self::Unavailable { address, message },
            Code::DeadlineExceeded => Self::TimedOut { address, message },
            // The channel's own limit; tonic keeps of it only the text.
            Code::Cancelled if message == tonic::TimeoutExpired(()).to_string() => {
                Self::TimedOut { address, message }
            }
            code => Self::Failed {
                address,
                code,
                message,
            },
        }
    }
}

#[cfg(test)]
mod tests;
