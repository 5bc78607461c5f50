//! One revision from its source to where it can serve.

use std::sync::Arc;

use penstock_engine::{Event, SamplingParams, Sequence};
use penstock_proto::v1::{self, revision_state::State};
use penstock_telemetry::instruments::WorkerMetrics;
use tokio::sync::Semaphore;

use super::{Board, RevisionName, chain};
use crate::{Config, LoadError, ModelSpec, catalogue::Served, generate::Input, load, source::FetchProgress};

/// What bringing up a revision takes, beside the revision.
#[derive(Clone)]
pub(crate) struct BringUp {
    pub(crate) config: Config,
    pub(crate) board: Board,
    pub(crate) metrics: WorkerMetrics,
    /// One checkpoint is loaded at a time: two at once would compete for the memory and the cores of those that
    /// are served.
    pub(crate) loading: Arc<Semaphore>,
}

/// Why a placed revision is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BringUpError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("warm prefix {number} cannot be computed: {reason}")]
    Warm {
        /// From 1.
        number: usize,
        reason: String,
    },
}

// === impl BringUp ===

impl BringUp {
    /// Fetches, loads and warms a revision. Dropping it gives up.
    pub(crate) async fn run(self, placed: v1::PlacedRevision) -> Result<Arc<Served>, BringUpError> {
        let name = RevisionName::new(&placed.model, &placed.revision);
        self.board.enter(&name, State::Fetching);
        let mut spec = spec(&placed);
        let fetched = |at: FetchProgress| self.board.progress(&name, at.fetched_bytes, at.total_bytes);
        spec.path = load::locate(&self.config, &spec, &placed.digest, fetched).await?;
        // The semaphore is never closed; without a permit, loading just would not wait for its turn.
        let _turn = self.loading.acquire().await.ok();
        self.board.enter(&name, State::Loading);
        let request = load::Request {
            spec,
            digest: placed.digest,
            observer: Arc::new(self.board.clone()),
            metrics: self.metrics.clone(),
        };
        let loaded = load::load(&self.config, request).await;
        if loaded
            .as_ref()
            .is_err_and(|error| error.source.is_out_of_memory())
        {
            self.board.out_of_memory(&name);
        }
        let served = loaded?;
        self.board.loaded(&name, &served);
        self.board.enter(&name, State::Warming);
        for (index, prefix) in placed.warm_prefixes.into_iter().enumerate() {
            let number = index + 1;
            warm(&served, prefix)
                .await
                .map_err(|reason| BringUpError::Warm { number, reason })?;
        }
        Ok(served)
    }
}

/// What is to be loaded, and from where.
fn spec(placed: &v1::PlacedRevision) -> ModelSpec {
    ModelSpec {
        model: placed.model.clone(),
        revision: placed.revision.clone(),
        path: placed.source.as_str().into(),
    }
}

/// Computes a prompt, so that its KV is in the cache.
async fn warm(served: &Arc<Served>, prefix: String) -> Result<(), String> {
    let encoding = served.clone();
    let encoded = tokio::task::spawn_blocking(move || encoding.encode(Input::Prompt(prefix))).await;
    let encoded = encoded.map_err(|error| error.to_string())?;
    let mut prompt = encoded.map_err(|error| chain(&error))?.ids;
    // The token that is generated takes a place in the context.
    prompt.truncate(served.engine.context_length() - 1);
    if prompt.is_empty() {
        return Ok(());
    }
    let sequence = Sequence {
        prompt,
        sampling: SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        },
        ..Sequence::default()
    };
    let mut tokens = served.engine.submit(sequence).map_err(|error| chain(&error))?;
    loop {
        match tokens.next().await {
            Some(Event::Finished(_)) => return Ok(()),
            Some(Event::Failed(error)) => return Err(chain(&error)),
            Some(Event::Started { .. } | Event::Prompt(_) | Event::Token(_)) => {}
            None => return Err("the engine is gone".into()),
        }
    }
}
