//! What gateways and workers have counted: the material of verdicts, charts and statuses.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use penstock_plan::{Ledger, ObservationKey, Observations, Rollout, Sampled};
use penstock_proto::v1;

mod charts;
mod merge;

use charts::Charts;
use merge::{add_stats, tally};

/// Reports of boots that were heard last longer ago than this tell nothing of what runs now.
const PRESENT_MS: u64 = 15_000;
/// Boots whose newest report is kept for charts and requests in flight.
const BOOTS: usize = 4_096;

/// Everything that was heard since this process started, and what it read from the store.
#[derive(Debug, Default)]
pub(crate) struct Observed(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    ledger: Ledger,
    /// The newest report of each boot of a gateway.
    boots: BTreeMap<String, Boot>,
    workers: BTreeMap<String, Worker>,
    sampled: BTreeMap<(String, String), Sampled>,
    charts: BTreeMap<String, Charts>,
    /// Overrides that gateways told of and that are not audited yet.
    overrides: VecDeque<(String, v1::OverrideRecord)>,
    told: BTreeSet<(String, bool)>,
    /// Models whose counts have changed since they were written to the store.
    unsaved: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Boot {
    sequence: u64,
    heard_ms: u64,
    revisions: Vec<v1::RevisionStats>,
    /// Requests a second by model, over the last reports.
    rates: BTreeMap<String, f64>,
}

#[derive(Debug, Default)]
struct Worker {
    boot_id: String,
    /// When it came back under another boot id, in milliseconds since the Unix epoch.
    restarts_ms: Vec<u64>,
    /// Out-of-memory events of former boots, by revision.
    earlier: BTreeMap<(String, String), u64>,
    states: Vec<v1::RevisionState>,
}

// === impl Observed ===

impl Observed {
    /// A gateway's report. What is not newer than what is known of this boot says nothing new.
    pub(crate) fn hear_gateway(&self, node: &str, boot_id: &str, stats: v1::Stats, now_ms: u64) {
        let mut state = self.state();
        if state
            .boots
            .get(boot_id)
            .is_some_and(|boot| boot.sequence >= stats.sequence)
        {
            return;
        }
        let tallies: BTreeMap<_, _> = stats
            .revisions
            .iter()
            .filter(|revision| !revision.rollout_uid.is_empty())
            .map(|revision| (key(revision), tally(revision)))
            .collect();
        if !tallies.is_empty() && state.ledger.hear(boot_id, stats.sequence, tallies) {
            let models = stats.revisions.iter().map(|revision| revision.model.clone());
            state.unsaved.extend(models);
        }
        for record in stats.overrides {
            let ended = record.ended_ms > 0;
            if state.told.insert((record.id.clone(), ended)) {
                state.overrides.push_back((node.to_owned(), record));
            }
        }
        let rates = state
            .boots
            .get(boot_id)
            .map(|before| rates(before, &stats.revisions, now_ms));
        let boot = Boot {
            sequence: stats.sequence,
            heard_ms: now_ms,
            rates: rates.unwrap_or_default(),
            revisions: stats.revisions,
        };
        state.boots.insert(boot_id.to_owned(), boot);
        while state.boots.len() > BOOTS {
            let oldest = state.boots.iter().min_by_key(|(_, boot)| boot.heard_ms);
            let Some(oldest) = oldest.map(|(id, _)| id.clone()) else {
                break;
            };
            state.boots.remove(&oldest);
        }
    }

    /// A worker's report.
    pub(crate) fn hear_worker(&self, id: &str, boot_id: &str, report: v1::WorkerReport, now_ms: u64) {
        let mut state = self.state();
        let worker = state.workers.entry(id.to_owned()).or_default();
        if worker.boot_id != boot_id {
            if !worker.boot_id.is_empty() {
                worker.restarts_ms.push(now_ms);
            }
            for was in std::mem::take(&mut worker.states) {
                *worker.earlier.entry((was.model, was.revision)).or_default() += was.out_of_memory;
            }
            boot_id.clone_into(&mut worker.boot_id);
        }
        worker.states = report.revisions;
    }

    /// What each worker has of a revision, by the worker's id.
    pub(crate) fn placements(&self, model: &str, revision: &str) -> Vec<v1::PlacementStatus> {
        let state = self.state();
        let of = |worker: &Worker| {
            let mut states = worker.states.iter();
            states
                .find(|state| state.model == model && state.revision == revision)
                .cloned()
        };
        state
            .workers
            .iter()
            .filter_map(|(id, worker)| {
                Some(v1::PlacementStatus {
                    worker: id.clone(),
                    state: Some(of(worker)?),
                })
            })
            .collect()
    }

    /// What the workers that do not serve a revision yet do about it, in words.
    pub(crate) fn not_ready(&self, model: &str, revision: &str) -> String {
        use v1::revision_state::State as Is;
        let words = self
            .placements(model, revision)
            .into_iter()
            .filter_map(|placement| {
                let state = placement.state?;
                let doing = match state.state() {
                    Is::Serving => return None,
                    Is::Failed => format!("failed: {}", state.message),
                    Is::Fetching => progress("fetches it", &state),
                    Is::Loading => progress("loads it", &state),
                    Is::Warming => "warms it".to_owned(),
                    Is::Retiring => "retires it".to_owned(),
                    Is::Unspecified => "says nothing of it".to_owned(),
                };
                Some(format!("{} {doing}", placement.worker))
            });
        words.collect::<Vec<_>>().join("; ")
    }

    /// A number that a query gave.
    pub(crate) fn sample(&self, uid: &str, metric: &str, value: Option<f64>, limit: f64) {
        let mut state = self.state();
        let sampled = state
            .sampled
            .entry((uid.to_owned(), metric.to_owned()))
            .or_default();
        sampled.evaluations += 1;
        sampled.value = value;
        // No data is neither good nor bad: it breaks no row and makes none longer.
        if let Some(value) = value {
            sampled.above = if value > limit { sampled.above + 1 } else { 0 };
        }
    }

    /// The material of a rollout's verdicts.
    pub(crate) fn of(&self, rollout: &Rollout) -> Observations {
        let state = self.state();
        let [stable, canary] =
            [&rollout.stable, &rollout.canary].map(|revision| trial_key(rollout, revision));
        let sampled = state.sampled.iter().filter(|((uid, _), _)| *uid == rollout.uid);
        Observations {
            stable: state.ledger.total(&stable),
            canary: state.ledger.total(&canary),
            boots: state.ledger.sides(&stable, &canary),
            out_of_memory: state.out_of_memory(&rollout.model, &rollout.canary),
            restarts: state.restarts(&rollout.model, &rollout.canary, rollout.created_ms),
            prometheus: sampled
                .map(|((_, metric), sampled)| (metric.clone(), *sampled))
                .collect(),
        }
    }

    /// What both sides did in the present trial, with sketches: stable, then canary.
    pub(crate) fn sides(&self, rollout: &Rollout) -> [v1::RevisionStats; 2] {
        let state = self.state();
        [&rollout.stable, &rollout.canary]
            .map(|revision| state.stats(&trial_key(rollout, revision), &rollout.model))
    }

    /// The canary's share of the distinct keys of the present trial, as the sketches estimate it.
    pub(crate) fn key_share(sides: &[v1::RevisionStats; 2]) -> Option<f64> {
        let [stable, canary] = sides.each_ref().map(|side| merge::distinct(&side.keys));
        (stable + canary > 0.0).then(|| canary / (stable + canary))
    }

    /// Requests that run on a revision now, whatever trial they belong to.
    pub(crate) fn in_flight(&self, model: &str, revision: &str, now_ms: u64) -> u64 {
        let state = self.state();
        let present = state
            .boots
            .values()
            .filter(|boot| boot.heard_ms + PRESENT_MS >= now_ms);
        present
            .flat_map(|boot| &boot.revisions)
            .filter(|stats| stats.model == model && stats.revision == revision)
            .map(|stats| u64::from(stats.in_flight))
            .sum()
    }

    /// Requests a second of a model, whatever revision serves them, over the last reports of all gateways.
    pub(crate) fn requests_per_second(&self, model: &str, now_ms: u64) -> f64 {
        let state = self.state();
        let present = state
            .boots
            .values()
            .filter(|boot| boot.heard_ms + PRESENT_MS >= now_ms);
        present.filter_map(|boot| boot.rates.get(model)).sum()
    }

    /// Takes a point of the charts of a rollout.
    pub(crate) fn point(&self, rollout: &Rollout, now_ms: u64) {
        let due = |state: &State| {
            state
                .charts
                .get(&rollout.model)
                .is_none_or(|charts| charts.due(now_ms))
        };
        // Adding up what all gateways said is worth it once a second only.
        if !due(&self.state()) {
            return;
        }
        let sides = self.sides(rollout);
        let mut state = self.state();
        let charts = state.charts.entry(rollout.model.clone()).or_default();
        charts.take(rollout, sides, now_ms);
    }

    /// The points of the charts of a model's rollout, oldest first.
    pub(crate) fn points(&self, rollout: &Rollout) -> Vec<v1::ChartPoint> {
        let state = self.state();
        state
            .charts
            .get(&rollout.model)
            .map(Charts::points)
            .unwrap_or_default()
    }

    /// Counts that another control plane wrote down.
    pub(crate) fn restore(&self, ledger: Ledger) {
        self.state().ledger.merge(ledger);
    }

    /// What is to be written down of a rollout, if there is anything new; and forgets its former trials.
    pub(crate) fn unsaved(&self, rollout: &Rollout) -> Option<Ledger> {
        let mut state = self.state();
        if !state.unsaved.remove(&rollout.model) {
            return None;
        }
        let trial = trial_key(rollout, "");
        state.ledger.keep(|key| {
            key.rollout_uid != trial.rollout_uid || (key.attempt, key.trial) == (trial.attempt, trial.trial)
        });
        Some(state.ledger.of_rollout(&rollout.uid))
    }

    /// It could not be written after all.
    pub(crate) fn still_unsaved(&self, model: &str) {
        self.state().unsaved.insert(model.to_owned());
    }

    /// Overrides that are to be audited: the gateway and the record.
    pub(crate) fn overrides(&self) -> Vec<(String, v1::OverrideRecord)> {
        self.state().overrides.drain(..).collect()
    }

    /// One of them could not be audited now.
    pub(crate) fn override_again(&self, told: (String, v1::OverrideRecord)) {
        self.state().overrides.push_back(told);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // State is whole after every statement that changes it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    /// Every boot's newest report on one revision in one trial, added up.
    fn stats(&self, wanted: &ObservationKey, model: &str) -> v1::RevisionStats {
        let mut total = v1::RevisionStats {
            model: model.to_owned(),
            revision: wanted.revision.clone(),
            rollout_uid: wanted.rollout_uid.clone(),
            attempt: wanted.attempt,
            step: wanted.trial,
            ..v1::RevisionStats::default()
        };
        for stats in self.boots.values().flat_map(|boot| &boot.revisions) {
            if stats.model == model && is_of(stats, wanted) {
                add_stats(&mut total, stats);
            }
        }
        total
    }

    fn out_of_memory(&self, model: &str, revision: &str) -> u64 {
        let id = (model.to_owned(), revision.to_owned());
        let of = |worker: &Worker| {
            let now = worker
                .states
                .iter()
                .filter(|s| s.model == model && s.revision == revision);
            now.map(|state| state.out_of_memory).sum::<u64>()
                + worker.earlier.get(&id).copied().unwrap_or_default()
        };
        self.workers.values().map(of).sum()
    }

    fn restarts(&self, model: &str, revision: &str, since_ms: u64) -> u64 {
        let serves = |worker: &&Worker| {
            let mut states = worker.states.iter();
            states.any(|state| state.model == model && state.revision == revision)
        };
        let of = |worker: &Worker| worker.restarts_ms.iter().filter(|at| **at >= since_ms).count() as u64;
        self.workers.values().filter(serves).map(of).sum()
    }
}

/// Rates after another report, each new one counting for a tenth.
fn rates(before: &Boot, now: &[v1::RevisionStats], now_ms: u64) -> BTreeMap<String, f64> {
    let sum = |revisions: &[v1::RevisionStats], model: &str| -> u64 {
        let of_model = revisions.iter().filter(|stats| stats.model == model);
        of_model.map(|stats| stats.requests).sum()
    };
    let seconds = (now_ms.saturating_sub(before.heard_ms) as f64 / 1e3).max(1e-3);
    let models: BTreeSet<&String> = now.iter().map(|stats| &stats.model).collect();
    let rate = |model: &String| {
        let new = sum(now, model).saturating_sub(sum(&before.revisions, model)) as f64 / seconds;
        before.rates.get(model).map_or(new, |old| old * 0.9 + new * 0.1)
    };
    models
        .into_iter()
        .map(|model| (model.clone(), rate(model)))
        .collect()
}

fn trial_key(rollout: &Rollout, revision: &str) -> ObservationKey {
    ObservationKey {
        rollout_uid: rollout.uid.clone(),
        attempt: rollout.attempt,
        trial: rollout.trial,
        revision: revision.to_owned(),
    }
}

/// Whether [`key`] is this one.
fn is_of(stats: &v1::RevisionStats, wanted: &ObservationKey) -> bool {
    stats.revision == wanted.revision
        && stats.rollout_uid == wanted.rollout_uid
        && (stats.attempt, stats.step) == (wanted.attempt, wanted.trial)
}

fn key(stats: &v1::RevisionStats) -> ObservationKey {
    ObservationKey {
        rollout_uid: stats.rollout_uid.clone(),
        attempt: stats.attempt,
        trial: stats.step,
        revision: stats.revision.clone(),
    }
}

fn progress(doing: &str, state: &v1::RevisionState) -> String {
    match state.total_bytes {
        0 => doing.to_owned(),
        total => format!("{doing} ({} %)", state.done_bytes.saturating_mul(100) / total),
    }
}

#[cfg(test)]
mod tests;
