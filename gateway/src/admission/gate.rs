//! The gate before the workers of one revision.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use super::fair::{FairQueue, Place};

/// Time over which the pace of work is measured.
const WINDOW: Duration = Duration::from_secs(2);
/// No hint is shorter: whoever was refused must not be back before anything has changed.
const SHORTEST_HINT: Duration = Duration::from_millis(50);

/// What asks for room.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask {
    pub(crate) tenant: u64,
    pub(crate) tokens: u64,
    pub(crate) deadline: Option<Instant>,
    /// Tokens in flight that the workers take together.
    pub(crate) limit: u64,
}

#[derive(Debug)]
pub(super) struct Gate {
    max_queue: usize,
    max_wait: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    in_flight: u64,
    limit: u64,
    queue: FairQueue<oneshot::Sender<()>>,
    pace: Pace,
}

/// Tokens in flight until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    gate: Arc<Gate>,
    tokens: u64,
}

/// Why a request is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Shed {
    #[error(
        "the workers are busy: it would take {wait:?} until they have room, and at most {most:?} is waited"
    )]
    Long {
        wait: Duration,
        most: Duration,
        retry_after: Duration,
    },
    #[error("the workers are busy: it would take {wait:?} until they have room, which is after the deadline")]
    Late { wait: Duration, retry_after: Duration },
    #[error("the workers are busy, and {waiting} requests wait already")]
    Full { waiting: usize, retry_after: Duration },
}

/// Tokens that leave in a second.
#[derive(Debug)]
struct Pace {
    since: Option<Instant>,
    tokens: f64,
    at: Instant,
}

/// Leaves the queue, or gives back what was granted, when whoever waits stops.
struct Waiting {
    gate: Arc<Gate>,
    place: Place,
    tokens: u64,
    granted: Option<oneshot::Receiver<()>>,
}

// === impl Gate ===

impl Gate {
    pub(super) fn new(max_queue: usize, max_wait: Duration) -> Self {
        Self {
            max_queue,
            max_wait,
            state: Mutex::new(State {
                in_flight: 0,
                limit: 0,
                queue: FairQueue::new(),
                pace: Pace::new(Instant::now()),
            }),
        }
    }

    pub(super) async fn admit(self: &Arc<Self>, ask: Ask) -> Result<Permit, Shed> {
        let now = Instant::now();
        let Some(mut waiting) = self.enter(ask, now)? else {
            return Ok(self.permit(ask.tokens));
        };
        let until = now + self.max_wait;
        let until = ask.deadline.map_or(until, |deadline| deadline.min(until));
        let granted = match waiting.granted.as_mut() {
            Some(granted) => tokio::time::timeout_at(until, granted).await,
            None => Ok(Ok(())),
        };
        match granted {
            Ok(Ok(())) => {
                waiting.granted = None;
                Ok(self.permit(ask.tokens))
            }
            // Somebody with a better claim took the place, or the estimate was too good.
            Ok(Err(_)) | Err(_) => Err(self.shed(ask)),
        }
    }

    /// Lets the request in, or queues it where there is hope.
    fn enter(self: &Arc<Self>, ask: Ask, now: Instant) -> Result<Option<Waiting>, Shed> {
        let mut state = self.state();
        state.limit = ask.limit;
        state.grant();
        if state.queue.is_empty() && state.fits(ask.tokens) {
            state.in_flight += ask.tokens;
            return Ok(None);
        }
        let (place, before) = state.queue.place(ask.tenant);
        let wait = state.wait(before + ask.tokens, now);
        if wait > self.max_wait {
            return Err(Shed::Long {
                wait,
                most: self.max_wait,
                retry_after: (wait - self.max_wait).max(SHORTEST_HINT),
            });
        }
        if ask.deadline.is_some_and(|deadline| now + wait >= deadline) {
            let retry_after = wait.max(SHORTEST_HINT);
            return Err(Shed::Late { wait, retry_after });
        }
        let (sender, receiver) = oneshot::channel();
        let queued = state.queue.push(ask.tenant, ask.tokens, sender);
        debug_assert_eq!(queued, place);
        if state.queue.len() > self.max_queue {
            // Dropping the sender tells whoever waits.
            let last = state.queue.pop_last();
            if last.is_some_and(|(last, _)| last == place) {
                drop(state);
                return Err(self.shed(ask));
            }
        }
        Ok(Some(Waiting {
            gate: self.clone(),
            place,
            tokens: ask.tokens,
            granted: Some(receiver),
        }))
    }

    fn shed(&self, ask: Ask) -> Shed {
        let state = self.state();
        let (_, before) = state.queue.place(ask.tenant);
        Shed::Full {
            waiting: state.queue.len(),
            retry_after: state.wait(before + ask.tokens, Instant::now()).max(SHORTEST_HINT),
        }
    }

    fn permit(self: &Arc<Self>, tokens: u64) -> Permit {
        Permit {
            gate: self.clone(),
            tokens,
        }
    }

    fn release(&self, tokens: u64, worked: bool) {
        let mut state = self.state();
        state.in_flight = state.in_flight.saturating_sub(tokens);
        if worked {
            state.pace.left(tokens, Instant::now());
        }
        state.grant();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (u64, usize) {
        let state = self.state();
        (state.in_flight, state.queue.len())
    }
}

// === impl State ===

impl State {
    /// A request alone always fits, however large it is.
    fn fits(&self, tokens: u64) -> bool {
        self.in_flight == 0 || self.in_flight + tokens <= self.limit
    }

    fn grant(&mut self) {
        while self.queue.next_tokens().is_some_and(|tokens| self.fits(tokens)) {
            let Some((tokens, sender)) = self.queue.pop() else {
                return;
            };
            if sender.send(()).is_ok() {
                self.in_flight += tokens;
            }
        }
    }

    /// Time until so many tokens more have room; none while the pace is not known.
    fn wait(&self, tokens: u64, now: Instant) -> Duration {
        let missing = (self.in_flight + tokens).saturating_sub(self.limit);
        match self.pace.per_second(now) {
            Some(pace) => {
                Duration::try_from_secs_f64(missing as f64 / pace).unwrap_or(Duration::from_secs(3600))
            }
            None => Duration::ZERO,
        }
    }
}

// === impl Pace ===

impl Pace {
    fn new(now: Instant) -> Self {
        Self {
            since: None,
            tokens: 0.0,
            at: now,
        }
    }

    fn left(&mut self, tokens: u64, now: Instant) {
        self.tokens = self.faded(now) + tokens as f64;
        self.at = now;
        self.since.get_or_insert(now);
    }

    fn per_second(&self, now: Instant) -> Option<f64> {
        let age = now.saturating_duration_since(self.since?).as_secs_f64();
        // What has faded of a constant flow since it began.
        let window = WINDOW.as_secs_f64() * (1.0 - (-age / WINDOW.as_secs_f64()).exp());
        (age > 0.1).then(|| (self.faded(now) / window).max(1.0))
    }

    fn faded(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens * (-age / WINDOW.as_secs_f64()).exp()
    }
}

// === impl Waiting, Permit, Shed ===

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some(granted) = &mut self.granted else { return };
        let removed = self.gate.state().queue.remove(self.place);
        if !removed && granted.try_recv().is_ok() {
            self.gate.release(self.tokens, false);
        }
    }
}

impl Permit {
    /// The workers take so many tokens now: whoever waits must not wait for the next request to tell.
    pub(crate) fn refresh(&self, limit: u64) {
        let mut state = self.gate.state();
        state.limit = limit;
        state.grant();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.release(self.tokens, true);
    }
}

impl Shed {
    /// When it is worth to ask again.
    pub(super) fn retry_after(&self) -> Duration {
        match self {
            Self::Long { retry_after, .. }
            | Self::Late { retry_after, .. }
            | Self::Full { retry_after, .. } => *retry_after,
        }
    }
}
