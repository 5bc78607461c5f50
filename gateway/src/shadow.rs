//! Copies of requests for the canary, whose replies are read and thrown away. No client ever waits for one or hears
//! of one.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::{BodyExt as _, Full};
use penstock_proto::{metadata, v1};
use prost::Message as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use crate::{
    counts::Entry,
    frames::Message,
    pool::{Lease, Peer},
};

/// Copies under way at most; more are not sent.
const MOST: usize = 64;
/// A copy that takes longer is given up.
const LONGEST: Duration = Duration::from_secs(120);

/// Room for copies.
#[derive(Debug)]
pub(crate) struct Shadows {
    free: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// A copy that is ready to go.
pub(crate) struct Shadow {
    pub(crate) peer: Arc<Peer>,
    pub(crate) lease: Lease,
    pub(crate) request: Request<Full<Bytes>>,
    /// Where it counts.
    pub(crate) counts: Option<Arc<Entry>>,
    pub(crate) permit: OwnedSemaphorePermit,
}

// === impl Shadows ===

impl Shadows {
    /// Room for one more copy, if there is.
    pub(crate) fn room(&self) -> Option<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_owned().ok()
    }

    /// Sends a copy, unseen by whoever asked.
    pub(crate) fn cast(&self, shadow: Shadow) {
        self.tasks.spawn(async move {
            if timeout(LONGEST, shadow.run()).await.is_err() {
                tracing::debug!("a mirrored request took longer than {LONGEST:?}");
            }
        });
    }
}

impl Default for Shadows {
    fn default() -> Self {
        Self {
            free: Arc::new(Semaphore::new(MOST)),
            tasks: TaskTracker::new(),
        }
    }
}

// === impl Shadow ===

impl Shadow {
    async fn run(self) {
        let Self {
            peer,
            lease: _lease,
            mut request,
            counts,
            permit: _permit,
        } = self;
        request
            .headers_mut()
            .insert(metadata::MIRROR, HeaderValue::from_static("1"));
        let Ok(mut sender) = peer.sender().await else {
            return;
        };
        if let Some(counts) = counts {
            counts.mirrored();
        }
        match sender.send_request(request).await {
            Ok(response) => {
                let mut body = response.into_body();
                while let Some(Ok(_)) = body.frame().await {}
            }
            Err(error) => tracing::debug!(%error, "a mirrored request failed"),
        }
    }
}

/// The request with at most so many tokens of reply; nothing if it cannot be read, which is its client's affair.
pub(crate) fn shortened(message: &Message, most: u32) -> Option<Message> {
    let mut request = v1::GenerateRequest::decode(message.payload()).ok()?;
    let sampling = request.sampling.get_or_insert_default();
    // No request may ask for no token at all.
    let most = most.max(1);
    sampling.max_tokens = Some(sampling.max_tokens.map_or(most, |own| own.min(most)));
    Some(Message::encode(&request))
}
