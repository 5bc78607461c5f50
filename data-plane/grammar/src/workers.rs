//! Threads that compile, and the callers that wait for them.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    CompiledGrammar, Config, Grammar,
    cache::{Cache, Found, Outcome},
    error::GrammarError,
};

/// A schema may be 128 levels deep and a Lark grammar a chain of thousands of rules, each a few stack frames.
const STACK_BYTES: usize = 64 * 1024 * 1024;

type Compile = dyn Fn(&Grammar) -> Result<CompiledGrammar, GrammarError> + Send + Sync;

/// A grammar on its way, with everybody who waits for it.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
    /// When nobody waits any more.
    wanted_until: Mutex<Option<Instant>>,
}

struct Job {
    grammar: Grammar,
    flight: Arc<Flight>,
}

pub(crate) struct Workers {
    jobs: SyncSender<Job>,
    cache: Arc<Mutex<Cache>>,
    max_waiting: usize,
}

// === impl Workers ===

impl Workers {
    pub(crate) fn start(
        config: &Config,
        compile: impl Fn(&Grammar) -> Result<CompiledGrammar, GrammarError> + Send + Sync + 'static,
    ) -> Self {
        let (jobs, queue) = mpsc::sync_channel(config.max_waiting);
        let queue = Arc::new(Mutex::new(queue));
        let compile: Arc<Compile> = Arc::new(compile);
        let cache = Arc::new(Mutex::new(Cache::new(config.max_cached, config.max_cached_bytes)));
        for index in 0..config.threads.max(1) {
            let (queue, compile, cache) = (queue.clone(), compile.clone(), cache.clone());
            // A thread that cannot be had leaves the others; with none, callers time out.
            let _ = thread::Builder::new()
                .name(format!("grammar-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || work(&queue, &*compile, &cache));
        }
        Self {
            jobs,
            cache,
            max_waiting: config.max_waiting,
        }
    }

    pub(crate) fn cached(&self, grammar: &Grammar) -> Option<Arc<CompiledGrammar>> {
        match lock(&self.cache).find(grammar) {
            Some(Found::Landed(Ok(compiled))) => Some(compiled),
            _ => None,
        }
    }

    pub(crate) fn compile(
        &self,
        grammar: &Grammar,
        limit: Duration,
    ) -> Result<Arc<CompiledGrammar>, GrammarError> {
        let deadline = Instant::now() + limit;
        let flight = {
            let mut cache = lock(&self.cache);
            match cache.find(grammar) {
                Some(Found::Landed(outcome)) => return outcome,
                Some(Found::Flying(flight)) => flight,
                None => self.take_off(&mut cache, grammar)?,
            }
        };
        flight
            .wait(deadline)
            .unwrap_or(Err(GrammarError::TimedOut { limit }))
    }

    fn take_off(&self, cache: &mut Cache, grammar: &Grammar) -> Result<Arc<Flight>, GrammarError> {
        let flight = Arc::new(Flight::default());
        let job = Job {
            grammar: grammar.clone(),
            flight: flight.clone(),
        };
        match self.jobs.try_send(job) {
            Ok(()) => {
                cache.fly(grammar.clone(), flight.clone());
                Ok(flight)
            }
            Err(TrySendError::Full(_)) => Err(GrammarError::Busy {
                waiting: self.max_waiting,
            }),
            Err(TrySendError::Disconnected(_)) => Err(GrammarError::Internal {
                message: "no compiling thread is left".into(),
            }),
        }
    }
}

// === impl Flight ===

impl Flight {
    /// The outcome, if it comes before `deadline`.
    fn wait(&self, deadline: Instant) -> Option<Outcome> {
        {
            let mut wanted = lock(&self.wanted_until);
            *wanted = Some(wanted.map_or(deadline, |until| until.max(deadline)));
        }
        let limit = deadline.saturating_duration_since(Instant::now());
        let (outcome, _) = self
            .landed
            .wait_timeout_while(lock(&self.outcome), limit, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        outcome.clone()
    }

    fn land(&self, outcome: Outcome) {
        *lock(&self.outcome) = Some(outcome);
        self.landed.notify_all();
    }

    /// Whether everybody who asked has given up. One who has only just joined may not have said until when.
    fn is_unwanted(&self) -> bool {
        lock(&self.wanted_until).is_some_and(|until| until < Instant::now())
    }
}

/// Compiles one grammar after the other until the compiler is gone.
fn work(queue: &Mutex<Receiver<Job>>, compile: &Compile, cache: &Mutex<Cache>) {
    loop {
        // The guard is held while waiting: one thread waits for a job, the others for the guard.
        let Ok(job) = lock(queue).recv() else { return };
        if job.flight.is_unwanted() {
            lock(cache).forget(&job.grammar);
            continue;
        }
        let outcome = match std::panic::catch_unwind(AssertUnwindSafe(|| compile(&job.grammar))) {
            Ok(outcome) => outcome.map(Arc::new),
            Err(_) => Err(GrammarError::Internal {
                message: "the compiler panicked".into(),
            }),
        };
        lock(cache).land(&job.grammar, outcome.clone());
        job.flight.land(outcome);
    }
}

/// What these locks guard is whole at every moment, whoever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
