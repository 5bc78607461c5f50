//! What a worker measures.

use super::requests::{InFlight, RequestInstruments, RequestRecord, Served, counter, seconds};
use crate::{
    Metrics,
    semconv::{attribute, bucket, metric, value},
};
use opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Counter, Histogram, Meter},
};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What an engine says of itself at one moment. Counts since its start, except where noted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineObservation {
    /// Sequences running now.
    pub running: u64,
    /// Sequences waiting now.
    pub waiting: u64,
    /// KV pages.
    pub pages_total: u64,
    /// KV pages that hold nothing now.
    pub pages_free: u64,
    /// KV pages that hold a prefix nobody uses now.
    pub pages_cached: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_lookup_tokens: u64,
    /// Prompt tokens found there.
    pub prefix_hit_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Tokens sampled.
    pub tokens: u64,
    /// Sequences put back because KV ran out.
    pub retractions: u64,
}

type Source = Box<dyn Fn() -> EngineObservation + Send + Sync>;

#[derive(Default)]
struct Engines {
    next: u64,
    sources: Vec<(u64, Vec<KeyValue>, Source)>,
}

type Shared = Arc<Mutex<Engines>>;

/// A worker's instruments. Cheap to clone.
#[derive(Clone)]
pub struct WorkerMetrics {
    requests: RequestInstruments,
    queue: Histogram<f64>,
    finished: Counter<u64>,
    engines: Shared,
    origin: Vec<KeyValue>,
}

impl WorkerMetrics {
    /// Makes the instruments of the worker `endpoint` (its id), which every series names: workers of one
    /// process may serve the same revision.
    pub fn new(metrics: &Metrics, endpoint: &str) -> Self {
        let meter = metrics.meter(value::WORKER);
        let engines = Shared::default();
        observe_engines(&meter, &engines);
        let origin = vec![
            KeyValue::new(attribute::COMPONENT, value::WORKER),
            KeyValue::new(attribute::ENDPOINT, endpoint.to_owned()),
        ];
        Self {
            requests: RequestInstruments::new(&meter, origin.clone()),
            queue: seconds(
                &meter,
                metric::QUEUE_TIME,
                "Time from a sequence's admission to its first step",
                &bucket::TIME_TO_FIRST_TOKEN,
            ),
            finished: counter(
                &meter,
                metric::FINISHED,
                "{sequence}",
                "Sequences that ended, by reason",
            ),
            engines,
            origin,
        }
    }

    /// Counts a request as under way until the guard is dropped.
    pub fn in_flight(&self, served: &Served) -> InFlight {
        self.requests.in_flight(served)
    }

    /// Records a request that ended.
    pub fn record(&self, served: &Served, record: &RequestRecord<'_>) {
        self.requests.record(served, record);
    }

    /// Records how long a sequence waited for its first step.
    pub fn queued(&self, model: &str, revision: &str, time: Duration) {
        self.queue
            .record(time.as_secs_f64(), &self.labels(model, revision));
    }

    /// Records why a sequence ended: stop, length, abort or error.
    pub fn finished(&self, model: &str, revision: &str, reason: &'static str) {
        let mut labels = self.labels(model, revision);
        labels.push(KeyValue::new(attribute::FINISH_REASON, reason));
        self.finished.add(1, &labels);
    }

    /// Observes an engine at every export and scrape until the registration is dropped. `source` must be
    /// quick and must not block: it runs on the scraping thread, under a lock.
    pub fn register_engine(
        &self,
        model: &str,
        revision: &str,
        source: impl Fn() -> EngineObservation + Send + Sync + 'static,
    ) -> EngineRegistration {
        let mut engines = lock(&self.engines);
        let id = engines.next;
        engines.next += 1;
        engines
            .sources
            .push((id, self.labels(model, revision), Box::new(source)));
        EngineRegistration {
            id,
            engines: self.engines.clone(),
        }
    }

    fn labels(&self, model: &str, revision: &str) -> Vec<KeyValue> {
        let served = [
            KeyValue::new(attribute::MODEL, model.to_owned()),
            KeyValue::new(attribute::REVISION, revision.to_owned()),
        ];
        self.origin.iter().cloned().chain(served).collect()
    }
}

impl fmt::Debug for WorkerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerMetrics")
            .field("engines", &lock(&self.engines).sources.len())
            .finish_non_exhaustive()
    }
}

/// An engine is observed until this is dropped.
#[must_use = "the engine is observed until this is dropped"]
pub struct EngineRegistration {
    id: u64,
    engines: Shared,
}

impl fmt::Debug for EngineRegistration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineRegistration")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Drop for EngineRegistration {
    fn drop(&mut self) {
        lock(&self.engines).sources.retain(|(id, ..)| *id != self.id);
    }
}

fn lock(engines: &Shared) -> MutexGuard<'_, Engines> {
    // A source that panicked leaves the list whole.
    engines.lock().unwrap_or_else(PoisonError::into_inner)
}

type Field = fn(&EngineObservation) -> u64;

const GAUGES: [(&str, &str, Field); 5] = [
    (metric::ENGINE_RUNNING, "Sequences running", |o| o.running),
    (metric::ENGINE_WAITING, "Sequences waiting", |o| o.waiting),
    (metric::KV_PAGES_TOTAL, "KV pages", |o| o.pages_total),
    (metric::KV_PAGES_FREE, "KV pages that hold nothing", |o| {
        o.pages_free
    }),
    (
        metric::KV_PAGES_CACHED,
        "KV pages that hold a prefix nobody uses now",
        |o| o.pages_cached,
    ),
];

const COUNTERS: [(&str, &str, Field); 5] = [
    (
        metric::PREFIX_LOOKUP_TOKENS,
        "Prompt tokens looked up in the prefix cache",
        |o| o.prefix_lookup_tokens,
    ),
    (
        metric::PREFIX_HIT_TOKENS,
        "Prompt tokens found in the prefix cache",
        |o| o.prefix_hit_tokens,
    ),
    (metric::ENGINE_STEPS, "Steps of the engine", |o| o.steps),
    (metric::ENGINE_TOKENS, "Tokens sampled", |o| o.tokens),
    (
        metric::ENGINE_RETRACTIONS,
        "Sequences put back because KV ran out",
        |o| o.retractions,
    ),
];

fn observe_engines(meter: &Meter, engines: &Shared) {
    let callback = |field: Field| {
        let engines = engines.clone();
        move |observer: &dyn AsyncInstrument<u64>| {
            for (_, labels, source) in &lock(&engines).sources {
                observer.observe(field(&source()), labels);
            }
        }
    };
    for (name, description, field) in GAUGES {
        let gauge = meter.u64_observable_gauge(name).with_description(description);
        gauge.with_callback(callback(field)).build();
    }
    for (name, description, field) in COUNTERS {
        let counter = meter.u64_observable_counter(name).with_description(description);
        counter.with_callback(callback(field)).build();
    }
}
