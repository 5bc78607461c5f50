//! What gateways counted, added up without loss and without counting anything twice.
//!
//! Each process of a gateway reports its counts since it started, whole. The newest report of a boot replaces its
//! older ones, and different boots are added up: a report that is lost or heard twice, a stream that breaks or a
//! control plane that takes over change nothing.

use std::collections::BTreeMap;

use penstock_analysis::{Counts, Stratum};
use serde::{Deserialize, Serialize};

use crate::STRATA;

/// What is counted apart: one revision in one trial of one rollout.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObservationKey {
    /// Uid of the rollout.
    pub rollout_uid: String,
    /// Try of the rollout, from 1.
    pub attempt: u32,
    /// Trial of the try, from 0.
    pub trial: u32,
    /// Name of the revision.
    pub revision: String,
}

/// Counts of one revision; all of them only grow while a gateway runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Requests.
    pub requests: u64,
    /// Requests that failed by the service's fault, timeouts included.
    pub errors: u64,
    /// Requests that ran into their deadline.
    pub timeouts: u64,
    /// Requests that their clients left.
    pub cancelled: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Those of them that were in a prefix cache.
    pub cached_tokens: u64,
    /// Tokens of replies.
    pub output_tokens: u64,
    /// Requests and bad events by metric, in strata; see [`RequestFacts::stratum`](crate::RequestFacts::stratum).
    pub metrics: BTreeMap<String, [Counts; STRATA]>,
}

/// The newest report of every boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    boots: BTreeMap<String, Report>,
}

/// One boot's newest report.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Report {
    sequence: u64,
    #[serde(with = "pairs")]
    tallies: BTreeMap<ObservationKey, Tally>,
}

/// What a verdict is made of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observations {
    /// What stable did in the present trial.
    pub stable: Tally,
    /// What the canary did.
    pub canary: Tally,
    /// Both sides by gateway process, stable first: shares may differ from one to the next, and a comparison of sums
    /// would blame the side that got more of the harder requests.
    pub boots: Vec<[Tally; 2]>,
    /// Times that workers ran out of memory on the canary since the rollout began.
    pub out_of_memory: u64,
    /// Restarts of workers that serve the canary since the rollout began.
    pub restarts: u64,
    /// The newest number of each Prometheus metric, by its name.
    pub prometheus: BTreeMap<String, Sampled>,
}

/// Numbers that a query gave.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sampled {
    /// The newest; `None` where the query gives nothing.
    pub value: Option<f64>,
    /// Evaluations above the limit, one after the other, the newest among them.
    pub above: u32,
    /// Evaluations.
    pub evaluations: u64,
}

// === impl Tally ===

impl Tally {
    /// Takes in another gateway's counts.
    pub fn add(&mut self, other: &Self) {
        let fields = [
            (&mut self.requests, other.requests),
            (&mut self.errors, other.errors),
            (&mut self.timeouts, other.timeouts),
            (&mut self.cancelled, other.cancelled),
            (&mut self.prompt_tokens, other.prompt_tokens),
            (&mut self.cached_tokens, other.cached_tokens),
            (&mut self.output_tokens, other.output_tokens),
        ];
        for (own, more) in fields {
            *own = own.saturating_add(more);
        }
        for (metric, strata) in &other.metrics {
            let own = self.metrics.entry(metric.clone()).or_default();
            for (own, more) in own.iter_mut().zip(strata) {
                own.n = own.n.saturating_add(more.n);
                own.bad = own.bad.saturating_add(more.bad);
            }
        }
    }

    /// Counts of a metric, all strata together.
    pub fn counts(&self, metric: &str) -> Counts {
        sum(&self.metrics.get(metric).copied().unwrap_or_default())
    }
}

// === impl Ledger ===

impl Ledger {
    /// A gateway's report. One that is not newer than what is known of this boot says nothing new.
    pub fn hear(&mut self, boot_id: &str, sequence: u64, tallies: BTreeMap<ObservationKey, Tally>) -> bool {
        let known = self.boots.get(boot_id);
        if known.is_some_and(|known| known.sequence >= sequence) {
            return false;
        }
        self.boots
            .insert(boot_id.to_owned(), Report { sequence, tallies });
        true
    }

    /// Takes in what another control plane had heard: of each boot the newer report stays.
    pub fn merge(&mut self, other: Self) {
        for (boot_id, report) in other.boots {
            self.hear(&boot_id, report.sequence, report.tallies);
        }
    }

    /// All boots' counts of one revision in one trial.
    pub fn total(&self, key: &ObservationKey) -> Tally {
        let mut total = Tally::default();
        for tally in self.boots.values().filter_map(|report| report.tallies.get(key)) {
            total.add(tally);
        }
        total
    }

    /// Two keys' counts by boot, where either has any.
    pub fn sides(&self, stable: &ObservationKey, canary: &ObservationKey) -> Vec<[Tally; 2]> {
        let side = |report: &Report, key| report.tallies.get(key).cloned();
        let boots =
            self.boots
                .values()
                .filter_map(|report| match (side(report, stable), side(report, canary)) {
                    (None, None) => None,
                    (stable, canary) => Some([stable.unwrap_or_default(), canary.unwrap_or_default()]),
                });
        boots.collect()
    }

    /// Forgets every trial but these; boots that have nothing left are kept for their sequence number.
    pub fn keep(&mut self, wanted: impl Fn(&ObservationKey) -> bool) {
        for report in self.boots.values_mut() {
            report.tallies.retain(|key, _| wanted(key));
        }
        self.boots.retain(|_, report| !report.tallies.is_empty());
    }

    /// The part that belongs to one rollout, to be written to the store.
    pub fn of_rollout(&self, uid: &str) -> Self {
        let mut part = self.clone();
        part.keep(|key| key.rollout_uid == uid);
        part
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.boots.is_empty()
    }
}

// === impl Observations ===

impl Observations {
    /// Both sides of a metric among requests that the split assigned, by gateway process; by cached ratio too where
    /// asked for.
    pub fn strata(&self, metric: &str, stratified: bool) -> Vec<Stratum> {
        let split = |tally: &Tally| -> Vec<Counts> {
            let strata = tally.metrics.get(metric).copied().unwrap_or_default();
            let split = &strata[..STRATA / 2];
            if stratified {
                split.to_vec()
            } else {
                vec![sum(split)]
            }
        };
        let of_boot = |[stable, canary]: &[Tally; 2]| -> Vec<Stratum> {
            let pairs = split(canary).into_iter().zip(split(stable));
            pairs.map(|(canary, stable)| Stratum { canary, stable }).collect()
        };
        self.boots.iter().flat_map(of_boot).collect()
    }

    /// The canary's share of requests and of output tokens in the present trial, in [0, 1].
    pub fn shares(&self) -> (Option<f64>, Option<f64>) {
        let share = |canary: u64, stable: u64| {
            let all = canary.saturating_add(stable);
            (all > 0).then(|| canary as f64 / all as f64)
        };
        (
            share(self.canary.requests, self.stable.requests),
            share(self.canary.output_tokens, self.stable.output_tokens),
        )
    }
}

fn sum(strata: &[Counts]) -> Counts {
    strata.iter().fold(Counts::default(), |sum, stratum| Counts {
        n: sum.n.saturating_add(stratum.n),
        bad: sum.bad.saturating_add(stratum.bad),
    })
}

/// JSON has no maps with structures for keys.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{ObservationKey, Tally};

    pub(super) fn serialize<S: Serializer>(
        map: &BTreeMap<ObservationKey, Tally>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        map.iter().collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<ObservationKey, Tally>, D::Error> {
        Ok(Vec::<(ObservationKey, Tally)>::deserialize(deserializer)?
            .into_iter()
            .collect())
    }
}

#[cfg(test)]
mod tests;
