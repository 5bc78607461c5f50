//! Makes what is served equal to what is placed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::Duration,
};

use penstock_engine::EngineEnd;
use penstock_proto::v1::{self, revision_state::State};
use penstock_telemetry::instruments::WorkerMetrics;
use tokio::{
    sync::{Semaphore, watch},
    task::{AbortHandle, Id, JoinError, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Board, RevisionName,
    bring_up::{BringUp, BringUpError},
    cache::Cache,
    chain,
    link::Placed,
};
use crate::{
    Config,
    catalogue::{Catalogue, Served},
    generate::WatchWords,
};

/// A revision that failed is tried again after so long, or when its placement changes.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// A control plane gets so long to say what is placed here before what was placed last is taken up.
const CACHE_AFTER: Duration = Duration::from_secs(2);
/// How often it is looked whether engines that retire have ended.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The loop.
pub(crate) struct Reconciler {
    catalogue: Catalogue,
    board: Board,
    bring_up: BringUp,
    cache: Option<Cache>,
    placed: watch::Receiver<Placed>,
    /// What the command line names.
    own: BTreeSet<RevisionName>,
    wanted: BTreeMap<RevisionName, v1::PlacedRevision>,
    units: BTreeMap<RevisionName, Unit>,
    work: JoinSet<Result<Arc<Served>, BringUpError>>,
}

/// A revision that is or was placed here.
struct Unit {
    /// As it was when work on it began.
    placed: v1::PlacedRevision,
    phase: Phase,
}

enum Phase {
    Working(AbortHandle),
    Serving,
    /// Out of the catalogue; its engine ends with its last request.
    Retiring {
        served: Weak<Served>,
        end: EngineEnd,
    },
    Failed {
        retry_at: Instant,
    },
}

// === impl Reconciler ===

impl Reconciler {
    pub(crate) fn new(
        config: &Config,
        id: &str,
        catalogue: Catalogue,
        board: Board,
        metrics: WorkerMetrics,
        placed: watch::Receiver<Placed>,
    ) -> Self {
        let directory = config.data_dir.as_deref();
        Self {
            catalogue,
            board: board.clone(),
            bring_up: BringUp {
                config: config.clone(),
                board,
                metrics,
                loading: Arc::new(Semaphore::new(1)),
            },
            cache: directory.map(|directory| Cache::new(directory, id)),
            placed,
            own: config.models.iter().map(RevisionName::from).collect(),
            wanted: BTreeMap::new(),
            units: BTreeMap::new(),
            work: JoinSet::new(),
        }
    }

    /// Follows the placement until `stop`. What is served then is left as it is.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.catalogue.changes();
        self.begin(&stop).await;
        loop {
            self.reconcile();
            let wake = self.next_look();
            tokio::select! {
                Ok(()) = self.placed.changed() => self.take_placement(),
                Some(done) = self.work.join_next_with_id() => self.done(done),
                // Registration may have refused a revision.
                Ok(()) = changes.changed() => {}
                () = tokio::time::sleep_until(wake) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Waits for the first placement; a control plane that cannot be reached is not waited for long.
    async fn begin(&mut self, stop: &CancellationToken) {
        let mut placed = self.placed.clone();
        let heard = async {
            let heard = tokio::time::timeout(CACHE_AFTER, placed.wait_for(Option::is_some)).await;
            heard.is_ok_and(|heard| heard.is_ok())
        };
        match stop.run_until_cancelled(heard).await {
            Some(true) => self.take_placement(),
            Some(false) => self.take_cached(),
            None => {}
        }
    }

    fn take_cached(&mut self) {
        match self.cache.as_ref().map_or(Ok(None), Cache::load) {
            Ok(None) => {}
            Ok(Some(placement)) => {
                let version = placement.version;
                tracing::warn!(version, "no control plane; taking up the last placement");
                self.want(&placement);
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, "cannot find the last placement");
            }
        }
    }

    fn take_placement(&mut self) {
        let Some(placement) = self.placed.borrow_and_update().clone() else {
            return;
        };
        // A flush of a small file at each change; this loop has nothing better to do meanwhile.
        let kept = self.cache.as_ref().map_or(Ok(()), |cache| cache.save(&placement));
        if let Err(error) = kept {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "cannot keep the placement for a restart");
        }
        self.want(&placement);
    }

    /// This is what is to be served from now on.
    fn want(&mut self, placement: &v1::Placement) {
        let named = |placed: &v1::PlacedRevision| {
            let name = RevisionName::new(&placed.model, &placed.revision);
            (name, placed.clone())
        };
        self.wanted = placement.revisions.iter().map(named).collect();
        for served in self.catalogue.all() {
            self.watch_words(&served);
        }
    }

    fn reconcile(&mut self) {
        // Without a source a revision is from the command line, of this worker or of another.
        let here = self.wanted.iter().filter(|(_, placed)| !placed.source.is_empty());
        let both = self.units.keys().chain(here.map(|(name, _)| name));
        let names: Vec<RevisionName> = both.filter(|name| !self.own.contains(name)).cloned().collect();
        for name in names {
            let unit = self.units.remove(&name);
            let wanted = self.wanted.get(&name).filter(|placed| !placed.source.is_empty());
            let next = match (unit, wanted.cloned()) {
                (None, None) => continue,
                (None, Some(wanted)) => Some(self.start(wanted)),
                (Some(unit), None) => self.leave(&name, unit),
                (Some(unit), Some(wanted)) => Some(self.keep(&name, unit, wanted)),
            };
            match next {
                Some(unit) => {
                    self.units.insert(name, unit);
                }
                None => self.board.forget(&name),
            }
        }
    }

    /// Begins to bring a revision up.
    fn start(&mut self, placed: v1::PlacedRevision) -> Unit {
        let work = self.work.spawn(self.bring_up.clone().run(placed.clone()));
        Unit {
            placed,
            phase: Phase::Working(work),
        }
    }

    /// A revision that is wanted: as it is, or as it is to be from now on.
    fn keep(&mut self, name: &RevisionName, unit: Unit, wanted: v1::PlacedRevision) -> Unit {
        let same = unit.placed.source == wanted.source && unit.placed.digest == wanted.digest;
        match unit.phase {
            Phase::Working(work) if !same => {
                work.abort();
                self.start(wanted)
            }
            Phase::Failed { retry_at }
                if !same
                    || unit.placed.warm_prefixes != wanted.warm_prefixes
                    || Instant::now() >= retry_at =>
            {
                self.start(wanted)
            }
            Phase::Working(_) | Phase::Failed { .. } => unit,
            Phase::Serving => match self.catalogue.get(&name.model, &name.revision) {
                // Registration has told the board why.
                None => Unit {
                    phase: Phase::failed(),
                    ..unit
                },
                Some(served) if is_meant(&served, &wanted) => Unit {
                    placed: wanted,
                    ..unit
                },
                // The name means another checkpoint now: first this one goes, then that one comes.
                Some(served) => self.retire(name, unit.placed, &served),
            },
            Phase::Retiring { ref served, .. } => match served.upgrade() {
                Some(served) if is_meant(&served, &wanted) => {
                    self.serve(name, served);
                    Unit {
                        placed: wanted,
                        phase: Phase::Serving,
                    }
                }
                _ if unit.is_over() => self.start(wanted),
                _ => unit,
            },
        }
    }

    /// A revision that is no longer wanted; `None` once it is gone.
    fn leave(&mut self, name: &RevisionName, unit: Unit) -> Option<Unit> {
        match unit.phase {
            Phase::Working(work) => {
                work.abort();
                None
            }
            Phase::Failed { .. } => None,
            Phase::Serving => {
                let served = self.catalogue.get(&name.model, &name.revision)?;
                Some(self.retire(name, unit.placed, &served))
            }
            Phase::Retiring { .. } if unit.is_over() => {
                tracing::info!(revision = %name, "revision retired");
                None
            }
            Phase::Retiring { .. } => Some(unit),
        }
    }

    /// Takes a revision out of the catalogue; the record in the store follows.
    fn retire(&self, name: &RevisionName, placed: v1::PlacedRevision, served: &Arc<Served>) -> Unit {
        self.board.enter(name, State::Retiring);
        self.catalogue.remove(&name.model, &name.revision);
        Unit {
            placed,
            phase: Phase::Retiring {
                served: Arc::downgrade(served),
                end: served.engine.end(),
            },
        }
    }

    fn serve(&self, name: &RevisionName, served: Arc<Served>) {
        self.watch_words(&served);
        // The state first: registration may refuse the revision as soon as it is in the catalogue.
        self.board.enter(name, State::Serving);
        self.catalogue.add(served);
        tracing::info!(revision = %name, "revision serves");
    }

    /// A revision was brought up, or not.
    fn done(&mut self, done: Result<(Id, Result<Arc<Served>, BringUpError>), JoinError>) {
        let (id, result) = match done {
            Ok((id, result)) => (id, result.map_err(|error| chain(&error))),
            Err(error) => (error.id(), Err(error.to_string())),
        };
        let worked = |unit: &Unit| matches!(&unit.phase, Phase::Working(work) if work.id() == id);
        // What was given up meanwhile has no unit any more.
        let found = self.units.iter().find(|(_, unit)| worked(unit));
        let Some(name) = found.map(|(name, _)| name.clone()) else {
            return;
        };
        let phase = match result {
            Ok(served) => {
                self.serve(&name, served);
                Phase::Serving
            }
            Err(reason) => {
                self.board.failed(&name, reason);
                Phase::failed()
            }
        };
        if let Some(unit) = self.units.get_mut(&name) {
            unit.phase = phase;
        }
    }

    /// Counts the words that the placement names for a revision, from now on.
    fn watch_words(&self, served: &Served) {
        let wanted = self.wanted.get(&RevisionName::from(served));
        let words = wanted.map_or(&[][..], |wanted| &wanted.watch_words);
        match WatchWords::new(words) {
            Ok(words) => served.watch(Arc::new(words)),
            Err(error) => {
                tracing::error!(revision = served.name(), %error, "cannot watch for these words");
            }
        }
    }

    /// When something may be due that nothing else tells of.
    fn next_look(&self) -> Instant {
        let now = Instant::now();
        let due = self.units.values().filter_map(|unit| match unit.phase {
            Phase::Failed { retry_at } => Some(retry_at),
            Phase::Retiring { .. } => Some(now + LOOK_EVERY),
            Phase::Working(_) | Phase::Serving => None,
        });
        due.min().unwrap_or(now + RETRY_AFTER)
    }
}

// === impl Unit ===

impl Unit {
    /// Whether nothing is left of it.
    fn is_over(&self) -> bool {
        matches!(&self.phase, Phase::Retiring { end, .. } if end.is_over())
    }
}

// === impl Phase ===

impl Phase {
    fn failed() -> Self {
        Self::Failed {
            retry_at: Instant::now() + RETRY_AFTER,
        }
    }
}

/// Whether a placement means this checkpoint.
fn is_meant(served: &Served, wanted: &v1::PlacedRevision) -> bool {
    wanted.digest.is_empty() || wanted.digest == served.digest
}
