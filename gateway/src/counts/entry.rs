//! The counts of one revision in one trial.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use penstock_analysis::{Bins, Sketch};
use penstock_plan::{Outcome, RequestFacts, Revision, Route, STRATA, Signal, Trial};
use penstock_proto::v1;

use super::{Subject, keys::Keys, recent::Recent};

/// One revision in one trial.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(super) model: String,
    revision: Revision,
    rollout_uid: String,
    attempt: u32,
    step: u32,
    watched: Vec<Watched>,
    in_flight: AtomicU32,
    /// Held for the few additions of one request that ended.
    tallies: Mutex<Tallies>,
}

/// A metric of the trial, and above which value a request is a bad event.
#[derive(Debug)]
struct Watched {
    name: String,
    signal: Signal,
    over: f64,
}

#[derive(Debug)]
struct Tallies {
    requests: u64,
    errors: u64,
    timeouts: u64,
    cancelled: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    watch_word_hits: u64,
    grammar_failures: u64,
    feedback: u64,
    negative_feedback: u64,
    mirrored: u64,
    /// In the order of `Entry::watched`.
    metrics: Vec<[v1::Counts; STRATA]>,
    recent: Recent,
    ttft_s: Sketch,
    tpot_s: Sketch,
    total_s: Sketch,
    output_length: Sketch,
    repetition: Sketch,
    keys: Keys,
    /// Since when the trial is over.
    over_since: Option<Instant>,
}

/// A request that ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) facts: RequestFacts,
    /// Its client left.
    pub(crate) cancelled: bool,
}

/// A request that runs; counted so until it is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    entry: Arc<Entry>,
    /// Hash of its sticky key, if it has one.
    key: Option<u64>,
}

// === impl Running ===

impl Running {
    pub(crate) fn new(entry: Arc<Entry>, key: Option<u64>) -> Self {
        entry.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { entry, key }
    }

    /// Counts what the request was in the end.
    pub(crate) fn ended(&self, ended: &Ended) {
        self.entry.record(self.key, ended, Instant::now());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.entry.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Entry ===

impl Entry {
    pub(super) fn new(subject: Subject<'_>, trial: Option<&Trial>) -> Self {
        let thresholds = trial.map_or(&[][..], |trial| &trial.thresholds);
        // A metric of a newer control plane, or one that is not counted by request, is left out.
        let watched: Vec<Watched> = thresholds
            .iter()
            .filter_map(|threshold| {
                let signal: Signal = threshold.metric.parse().ok()?;
                signal.is_counted().then(|| Watched {
                    name: threshold.metric.clone(),
                    signal,
                    over: threshold.over,
                })
            })
            .collect();
        let window = Duration::from_secs(trial.map_or(0, |trial| trial.window_s).into());
        Self {
            model: subject.model.to_owned(),
            revision: subject.revision.clone(),
            rollout_uid: subject.rollout_uid.to_owned(),
            attempt: subject.attempt,
            step: subject.step,
            in_flight: AtomicU32::new(0),
            tallies: Mutex::new(Tallies::new(watched.len(), window)),
            watched,
        }
    }

    /// Whether `route` is in this trial.
    pub(super) fn is_of(&self, route: &Route) -> bool {
        let present = Subject::of(route, &self.revision);
        (present.rollout_uid, present.attempt, present.step)
            == (self.rollout_uid.as_str(), self.attempt, self.step)
    }

    /// How long its trial has been over, with no request running any more.
    pub(super) fn idle(&self, in_force: bool, now: Instant) -> Duration {
        let mut tallies = self.tallies();
        if in_force || self.in_flight.load(Ordering::Relaxed) > 0 {
            tallies.over_since = None;
            return Duration::ZERO;
        }
        now.saturating_duration_since(*tallies.over_since.get_or_insert(now))
    }

    /// Since when its trial is known to be over, with no request running any more.
    pub(super) fn over_since(&self) -> Option<Instant> {
        self.tallies().over_since
    }

    pub(super) fn record(&self, key: Option<u64>, ended: &Ended, now: Instant) {
        let facts = &ended.facts;
        let stratum = facts.stratum();
        let mut tallies = self.tallies();
        tallies.add(key, ended);
        let Tallies { metrics, recent, .. } = &mut *tallies;
        for (index, (watched, strata)) in self.watched.iter().zip(metrics).enumerate() {
            let Some(bad) = watched.signal.is_bad(facts, watched.over) else {
                continue;
            };
            strata[stratum].requests += 1;
            strata[stratum].bad += u64::from(bad && recent.counts(key, index, now));
        }
    }

    /// A copy of somebody's request was sent to it.
    pub(crate) fn mirrored(&self) {
        self.tallies().mirrored += 1;
    }

    /// A user said whether a reply was bad.
    pub(crate) fn judged(&self, bad: bool) {
        let mut tallies = self.tallies();
        tallies.feedback += 1;
        tallies.negative_feedback += u64::from(bad);
        for (watched, strata) in self.watched.iter().zip(&mut tallies.metrics) {
            if watched.signal == Signal::NegativeFeedback {
                // Nothing is known of the prompt any more.
                strata[0].requests += 1;
                strata[0].bad += u64::from(bad);
            }
        }
    }

    pub(super) fn report(&self) -> v1::RevisionStats {
        let tallies = self.tallies();
        let metrics = self.watched.iter().zip(&tallies.metrics);
        v1::RevisionStats {
            model: self.model.clone(),
            revision: self.revision.name.clone(),
            rollout_uid: self.rollout_uid.clone(),
            attempt: self.attempt,
            step: self.step,
            requests: tallies.requests,
            errors: tallies.errors,
            timeouts: tallies.timeouts,
            cancelled: tallies.cancelled,
            prompt_tokens: tallies.prompt_tokens,
            cached_tokens: tallies.cached_tokens,
            output_tokens: tallies.output_tokens,
            watch_word_hits: tallies.watch_word_hits,
            grammar_failures: tallies.grammar_failures,
            feedback: tallies.feedback,
            negative_feedback: tallies.negative_feedback,
            mirrored: tallies.mirrored,
            in_flight: self.in_flight.load(Ordering::Relaxed),
            metrics: metrics
                .map(|(watched, strata)| v1::MetricCounts {
                    metric: watched.name.clone(),
                    strata: strata.to_vec(),
                })
                .collect(),
            ttft_s: sketch(&tallies.ttft_s),
            tpot_s: sketch(&tallies.tpot_s),
            total_s: sketch(&tallies.total_s),
            output_length: sketch(&tallies.output_length),
            repetition: sketch(&tallies.repetition),
            keys: tallies.keys.registers().into(),
        }
    }

    fn tallies(&self) -> MutexGuard<'_, Tallies> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Tallies ===

impl Tallies {
    fn new(metrics: usize, window: Duration) -> Self {
        Self {
            requests: 0,
            errors: 0,
            timeouts: 0,
            cancelled: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            watch_word_hits: 0,
            grammar_failures: 0,
            feedback: 0,
            negative_feedback: 0,
            mirrored: 0,
            metrics: vec![Default::default(); metrics],
            recent: Recent::new(window, Instant::now()),
            ttft_s: Sketch::default(),
            tpot_s: Sketch::default(),
            total_s: Sketch::default(),
            output_length: Sketch::default(),
            repetition: Sketch::default(),
            keys: Keys::default(),
            over_since: None,
        }
    }

    fn add(&mut self, key: Option<u64>, ended: &Ended) {
        let Ended { facts, cancelled } = ended;
        self.requests += 1;
        self.cancelled += u64::from(*cancelled);
        self.errors += u64::from(matches!(facts.outcome, Outcome::Error | Outcome::Timeout));
        self.timeouts += u64::from(facts.outcome == Outcome::Timeout);
        self.prompt_tokens += u64::from(facts.prompt_tokens.unwrap_or_default());
        self.cached_tokens += u64::from(facts.cached_tokens);
        self.output_tokens += u64::from(facts.output_tokens.unwrap_or_default());
        self.watch_word_hits += u64::from(facts.watch_word_hits);
        self.grammar_failures += u64::from(facts.grammar_failed);
        if let Some(key) = key {
            self.keys.insert(key);
        }
        if facts.outcome == Outcome::Excluded {
            return;
        }
        self.total_s.add(facts.total_s);
        for (sketch, value) in [
            (&mut self.ttft_s, facts.ttft_s),
            (&mut self.tpot_s, facts.tpot_s),
            (&mut self.output_length, facts.output_tokens.map(f64::from)),
            (&mut self.repetition, facts.repetition),
        ] {
            if let Some(value) = value {
                sketch.add(value);
            }
        }
    }
}

fn sketch(sketch: &Sketch) -> Option<v1::Sketch> {
    let Bins {
        index,
        count,
        zeros,
        sum,
    } = Bins::from(sketch);
    Some(v1::Sketch {
        index,
        count,
        zeros,
        sum,
    })
}
