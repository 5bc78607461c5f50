//! A request on its way: assigned, sent, observed.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::extract::ConnectInfo;
use http::{Extensions, HeaderMap};
use penstock_client::View;
use penstock_proto::metadata;
use penstock_telemetry::instruments::GatewayMetrics;
use tokio::{sync::watch, time::Instant};
use tonic::Status;

use crate::{
    admission::Admission,
    budget::RetryBudget,
    counts::Ledger,
    dispatch::{Dispatch, Sent},
    error,
    feedback::Judged,
    frames::Message,
    hedge::Hedge,
    observe::Observation,
    overrides::Overrides,
    pool::Pool,
    relay::Relay,
    routing::{self, Assigned, Caller},
    shadow::{self, Shadow, Shadows},
};

/// Name of the method that generates.
pub(crate) const GENERATE: &str = "Generate";
/// Name of the method that scores continuations.
pub(crate) const SCORE: &str = "Score";

/// Sends requests to workers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Forwarder {
    pub(crate) view: watch::Receiver<Arc<View>>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) metrics: GatewayMetrics,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) overrides: Arc<Overrides>,
    pub(crate) shadows: Arc<Shadows>,
    pub(crate) judged: Arc<Judged>,
    pub(crate) budget: Arc<RetryBudget>,
    pub(crate) hedge: Arc<Hedge>,
    pub(crate) admission: Arc<Admission>,
    /// For requests whose caller does not say how long it waits.
    pub(crate) default_timeout: Duration,
}

/// A call of a method of `Inference`.
pub(crate) struct Call {
    /// Name of the method, e.g. `Generate`.
    pub(crate) method: &'static str,
    /// The caller's headers, read for assignment and passed on.
    pub(crate) headers: HeaderMap,
    /// Address of the other end of the caller's connection.
    pub(crate) peer: Option<IpAddr>,
    pub(crate) message: Message,
    pub(crate) deadline: Option<Instant>,
    pub(crate) observation: Observation,
}

/// A reply that has begun.
pub(crate) struct Reply {
    /// The worker's response metadata.
    pub(crate) headers: HeaderMap,
    pub(crate) assigned: Assigned,
    pub(crate) body: Relay,
}

impl Forwarder {
    /// The view in force.
    pub(crate) fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Assigns the request, sends it and waits for the first part of the reply.
    ///
    /// A status before that is an error here; it carries the assignment, if there is one, in its metadata.
    pub(crate) async fn call(&self, mut call: Call) -> Result<Reply, Status> {
        match self.serve(&mut call).await {
            Ok((dispatch, mut sent)) => {
                let headers = std::mem::take(&mut sent.begun.headers);
                let seed = headers
                    .get(metadata::SEED)
                    .and_then(|seed| seed.to_str().ok()?.parse().ok());
                Ok(Reply {
                    assigned: dispatch.assigned().clone(),
                    body: Relay::new(sent, seed, dispatch, call.observation),
                    headers,
                })
            }
            Err(status) => {
                call.observation.failed(&status);
                Err(status)
            }
        }
    }

    async fn serve(&self, call: &mut Call) -> Result<(Dispatch, Sent), Status> {
        let asked = call.message.model()?;
        let assigned = routing::assign(&self.view(), &self.overrides, asked, call.caller())?;
        let counts = assigned.counts(&self.ledger);
        if asked != assigned.model {
            call.message = call.message.with_model(&assigned.model);
        }
        let deadline = call.deadline;
        let mut dispatch = Dispatch::new(self.clone(), call, assigned);
        // Who asks for too much is no affair of the revision.
        dispatch
            .charge()
            .map_err(|status| dispatch.assigned().told(status))?;
        call.observation.assigned(dispatch.assigned(), counts);
        self.budget.earn();
        let observation = &mut call.observation;
        let model = dispatch.assigned().model.clone();
        let sending = async {
            dispatch.admit().await.inspect_err(|_| observation.shed())?;
            dispatch
                .send(|endpoint, attempt| {
                    if attempt > 0 {
                        observation.retried(&model);
                    }
                    observation.sent_to(endpoint);
                })
                .await
        };
        let sent = match deadline {
            Some(at) => tokio::time::timeout_at(at, sending)
                .await
                .unwrap_or_else(|_| Err(error::deadline())),
            None => sending.await,
        };
        match sent {
            Ok(sent) => {
                // Of two that were asked, this one is heard.
                call.observation.sent_to(&sent.endpoint);
                self.mirror(&dispatch);
                Ok((dispatch, sent))
            }
            Err(status) => Err(dispatch.assigned().told(status)),
        }
    }

    /// Sends a copy to the canary, if the route wants one and there is room. The client's own request is served
    /// already, and whatever becomes of the copy is nothing to it.
    fn mirror(&self, original: &Dispatch) {
        if !original.generates() {
            return;
        }
        let copy = || {
            let (assigned, most) = original.assigned().mirrored(rand::random_range(0..1_000_000))?;
            let permit = self.shadows.room()?;
            let message = shadow::shortened(original.message(), most)?;
            let copy = original.copied(assigned, message);
            let picked = copy.pick()?;
            Some(Shadow {
                request: copy.request(&picked.peer).ok()?,
                counts: copy.assigned().counts(&self.ledger),
                lease: copy.lease(&picked),
                peer: picked.peer.clone(),
                permit,
            })
        };
        if let Some(shadow) = copy() {
            self.shadows.cast(shadow);
        }
    }
}

impl Call {
    fn caller(&self) -> Caller<'_> {
        Caller {
            headers: &self.headers,
            peer: self.peer,
        }
    }
}

/// The other end of a request's connection.
pub(crate) fn peer(extensions: &Extensions) -> Option<IpAddr> {
    let ConnectInfo(peer) = extensions.get::<ConnectInfo<SocketAddr>>()?;
    Some(peer.ip())
}
