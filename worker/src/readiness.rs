//! Whether the worker takes requests, and who is told.

use std::{fmt, time::Duration};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::catalogue::Catalogue;

/// How often the engines are asked whether they still make progress.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// The service whose health is reported beside the whole server's (the empty name).
const SERVICE: &str = "penstock.v1.Inference";

/// Whether the worker takes requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Checkpoints are being loaded.
    Loading,
    /// Nothing is served: a placement is waited for.
    Empty,
    /// Requests are taken.
    Serving,
    /// No new requests; running ones finish.
    Draining,
    /// An engine completes no step: which, and why.
    Stalled(String),
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loading => f.write_str("loading its models"),
            Self::Empty => f.write_str("serving no revision: waiting for a placement"),
            Self::Serving => f.write_str("serving"),
            Self::Draining => f.write_str("draining"),
            Self::Stalled(why) => write!(f, "stalled: {why}"),
        }
    }
}

/// Moves the state; the only writer of its channel.
#[derive(Debug, Clone)]
pub(crate) struct ReadinessGate(watch::Sender<Readiness>);

impl ReadinessGate {
    /// Loading at first.
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(Readiness::Loading))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Readiness> {
        self.0.subscribe()
    }

    pub(crate) fn get(&self) -> Readiness {
        self.0.borrow().clone()
    }

    /// The command line's models are loaded. A worker that was told to drain meanwhile keeps draining.
    pub(crate) fn loaded(&self, any: bool) {
        let next = if any { Readiness::Serving } else { Readiness::Empty };
        self.change(|now| (*now == Readiness::Loading).then_some(next));
    }

    /// Whether there is any revision to serve has changed.
    pub(crate) fn serves(&self, any: bool) {
        self.change(|now| match (now, any) {
            (Readiness::Empty, true) => Some(Readiness::Serving),
            (Readiness::Serving | Readiness::Stalled(_), false) => Some(Readiness::Empty),
            _ => None,
        });
    }

    /// There is no way back from draining.
    pub(crate) fn drain(&self) {
        self.change(|_| Some(Readiness::Draining));
    }

    /// What the watchdog saw: an engine without progress, if there is one.
    pub(crate) fn observed(&self, stalled: Option<String>) {
        self.change(|now| match (now, stalled) {
            (Readiness::Serving | Readiness::Stalled(_), Some(why)) => Some(Readiness::Stalled(why)),
            (Readiness::Stalled(_), None) => Some(Readiness::Serving),
            _ => None,
        });
    }

    fn change(&self, next: impl FnOnce(&Readiness) -> Option<Readiness>) {
        self.0.send_if_modified(|now| match next(now) {
            Some(next) if next != *now => {
                tracing::info!(from = %now, to = %next, "readiness changed");
                *now = next;
                true
            }
            _ => false,
        });
    }
}

/// Tells grpc.health.v1 every change until `stop`.
pub(crate) async fn report(
    reporter: HealthReporter,
    mut state: watch::Receiver<Readiness>,
    stop: CancellationToken,
) {
    loop {
        let status = match *state.borrow_and_update() {
            Readiness::Serving => ServingStatus::Serving,
            _ => ServingStatus::NotServing,
        };
        for service in ["", SERVICE] {
            reporter.set_service_status(service, status).await;
        }
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

/// Asks until `stop` whether there is anything to serve and whether the engines make progress: a server that
/// hangs must not call itself healthy.
pub(crate) async fn watch_progress(catalogue: Catalogue, gate: ReadinessGate, stop: CancellationToken) {
    let mut changes = catalogue.changes();
    let mut ticks = tokio::time::interval(WATCH_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                gate.observed(catalogue.stalled());
                gate.serves(!catalogue.is_empty());
            }
            // The catalogue outlives this loop, which has a clone of it.
            Ok(()) = changes.changed() => gate.serves(!catalogue.is_empty()),
            () = stop.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_is_final() {
        let gate = ReadinessGate::new();
        gate.drain();
        gate.loaded(true);
        gate.serves(false);
        gate.observed(Some("demo@v1".into()));
        gate.observed(None);
        assert_eq!(gate.get(), Readiness::Draining);
    }

    #[test]
    fn a_stall_ends_when_steps_complete_again() {
        let gate = ReadinessGate::new();
        gate.observed(Some("demo@v1".into()));
        assert_eq!(gate.get(), Readiness::Loading);
        gate.loaded(true);
        gate.observed(Some("demo@v1".into()));
        assert_eq!(gate.get(), Readiness::Stalled("demo@v1".into()));
        gate.observed(None);
        assert_eq!(gate.get(), Readiness::Serving);
    }

    #[test]
    fn a_worker_without_revisions_is_not_ready_until_it_has_one() {
        let gate = ReadinessGate::new();
        gate.serves(true);
        assert_eq!(gate.get(), Readiness::Loading);
        gate.loaded(false);
        assert_eq!(gate.get(), Readiness::Empty);
        gate.serves(true);
        assert_eq!(gate.get(), Readiness::Serving);
        gate.serves(false);
        assert_eq!(gate.get(), Readiness::Empty);
    }
}
