//! The handle on an engine, and its thread.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use penstock_model::Batch;

use crate::{
    Event, Finished, Sequence, SequenceError, SubmitError, TokenStream,
    runner::{Runner, RunnerError, RunnerInfo, SampledToken},
    scheduler::{QueuePlace, Running, Scheduler},
    stream,
};

/// How long the thread rests when every sequence waits for its consumer, or there is none.
const REST: Duration = Duration::from_millis(2);
const IDLE: Duration = Duration::from_millis(50);

/// Limits of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Name of its thread.
    pub name: String,
    /// Tokens per KV page; as the runner's cache has them.
    pub page_size: usize,
    /// KV pages; as the runner's cache has them.
    pub num_pages: usize,
    /// Sequences that run at once.
    pub max_running: usize,
    /// Sequences that wait at most.
    pub max_waiting: usize,
    /// Tokens of one step at most.
    pub max_batch_tokens: usize,
    /// A step that takes longer counts as a stall.
    pub stall_after: Duration,
}

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A limit that leaves nothing to do.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The thread cannot be started.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
}

/// What an engine has done and holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences running.
    pub running: usize,
    /// Sequences waiting.
    pub waiting: usize,
    /// KV pages.
    pub total_pages: usize,
    /// KV pages that hold nothing.
    pub free_pages: usize,
    /// KV pages that hold a prefix nobody uses now.
    pub cached_pages: usize,
    /// Steps run.
    pub steps: u64,
    /// Tokens generated.
    pub tokens_generated: u64,
    /// Those of them that a grammar left no choice about, taken without a step of their own.
    pub forced_tokens: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_lookup_tokens: u64,
    /// Those of them found.
    pub prefix_hit_tokens: u64,
    /// Sequences put back because KV ran out.
    pub retractions: u64,
    /// Times that the engine found its bookkeeping broken, failed its sequences and dropped all KV.
    pub faults: u64,
    /// Steps that failed because the device had no memory left for them.
    pub out_of_memory: u64,
    /// When the last step ended.
    pub last_step_at: Option<Instant>,
    /// A step has been running for longer than `stall_after`, or the runner cannot run one.
    pub progress_stalled: bool,
    /// Why the runner cannot run a step, where it says so.
    pub unavailable: Option<String>,
}

/// A running engine. Handles are cheap to clone; the thread ends with the last one.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    submissions: mpsc::SyncSender<Running>,
    end: EngineEnd,
}

/// Tells when an engine is gone: its last handle dropped, its thread ended, its model and KV freed.
#[derive(Debug, Clone)]
pub struct EngineEnd(Weak<()>);

#[derive(Debug)]
struct Shared {
    config: EngineConfig,
    vocab_size: usize,
    context_length: usize,
    info: RunnerInfo,
    stopping: AtomicBool,
    /// Submitted and not yet running, or put back.
    waiting: Arc<AtomicUsize>,
    published: Mutex<Published>,
}

#[derive(Debug, Default)]
struct Published {
    stats: EngineStats,
    step_started: Option<Instant>,
    /// Smoothed time between two sequences leaving a queue in which others wait.
    pace: Duration,
    /// When one left last, if others waited still.
    last_admission: Option<Instant>,
}

// === impl EngineConfig ===

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            name: "engine".into(),
            page_size: 16,
            num_pages: 4096,
            max_running: 64,
            max_waiting: 256,
            max_batch_tokens: 512,
            stall_after: Duration::from_secs(60),
        }
    }
}

// === impl Engine ===

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// A limit of 0, or no thread.
    pub fn start(config: EngineConfig, runner: Box<dyn Runner>) -> Result<Self, EngineError> {
        for (name, value) in [
            ("page_size", config.page_size),
            ("num_pages", config.num_pages),
            ("max_running", config.max_running),
            ("max_waiting", config.max_waiting),
            ("max_batch_tokens", config.max_batch_tokens),
        ] {
            if value == 0 {
                return Err(EngineError::Zero(name));
            }
        }
        let (submissions, queue) = mpsc::sync_channel(config.max_waiting);
        let waiting = Arc::new(AtomicUsize::new(0));
        let scheduler = Scheduler::new(&config, waiting.clone());
        let name = config.name.clone();
        // A sequence must fit into the pool even when it runs alone.
        let context_length = runner.context_length().min(config.num_pages * config.page_size);
        let shared = Arc::new(Shared {
            vocab_size: runner.vocab_size(),
            context_length,
            info: runner.describe(),
            stopping: AtomicBool::new(false),
            waiting,
            published: Mutex::default(),
            config,
        });
        let alive = Arc::new(());
        let end = EngineEnd(Arc::downgrade(&alive));
        let mut thread = EngineThread {
            shared: shared.clone(),
            queue,
            scheduler,
            runner,
            batch: Batch::default(),
            sampled: Vec::new(),
            _alive: alive,
        };
        thread.publish();
        thread::Builder::new()
            .name(name)
            .spawn(move || thread.run())
            .map_err(EngineError::Thread)?;
        Ok(Self {
            shared,
            submissions,
            end,
        })
    }

    /// Queues a sequence. Never blocks.
    ///
    /// # Errors
    /// The sequence cannot be run, or the queue is full.
    pub fn submit(&self, sequence: Sequence) -> Result<TokenStream, SubmitError> {
        self.check(&sequence)?;
        if let Some(reason) = sequence.ended(self.shared.context_length) {
            let (mut sink, tokens) = stream::channel();
            let completion_tokens = sequence.resumed;
            sink.close(Event::Finished(Finished {
                reason,
                completion_tokens,
                grammar_satisfied: sequence.grammar.map(|mut grammar| grammar.may_stop()),
            }));
            return Ok(tokens);
        }
        let place = QueuePlace::take(&self.shared.waiting);
        let waiting = place.taken() - 1;
        let full = || SubmitError::QueueFull {
            waiting,
            retry_after: self.retry_after(),
        };
        if waiting >= self.shared.config.max_waiting {
            return Err(full());
        }
        let (sink, tokens) = stream::channel();
        let running = Running::new(sequence, sink, place, self.shared.context_length);
        match self.submissions.try_send(running) {
            Ok(()) => Ok(tokens),
            Err(mpsc::TrySendError::Full(_)) => Err(full()),
            Err(mpsc::TrySendError::Disconnected(_)) => Err(SubmitError::ShuttingDown),
        }
    }

    /// What it has done and holds.
    pub fn stats(&self) -> EngineStats {
        let published = self.shared.published();
        let stalled = published
            .step_started
            .is_some_and(|at| at.elapsed() > self.shared.config.stall_after);
        EngineStats {
            waiting: self.shared.waiting.load(Ordering::Acquire),
            progress_stalled: stalled || published.stats.unavailable.is_some(),
            ..published.stats.clone()
        }
    }

    /// Longest sequence, prompt and reply together, in tokens.
    pub fn context_length(&self) -> usize {
        self.shared.context_length
    }

    /// Size of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.shared.vocab_size
    }

    /// What runs the model.
    pub fn runner(&self) -> &RunnerInfo {
        &self.shared.info
    }

    /// Tells when it is gone, without keeping it.
    pub fn end(&self) -> EngineEnd {
        self.end.clone()
    }

    /// Ends the thread; what is left fails with [`SequenceError::ShuttingDown`](crate::SequenceError).
    pub fn shutdown(&self) {
        self.shared.stopping.store(true, Ordering::Release);
    }

    fn check(&self, sequence: &Sequence) -> Result<(), SubmitError> {
        if self.shared.stopping.load(Ordering::Acquire) {
            return Err(SubmitError::ShuttingDown);
        }
        sequence.sampling.validate()?;
        let context = self.shared.context_length;
        let prompt = sequence.prompt.len().saturating_sub(sequence.resumed);
        if prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if prompt >= context {
            return Err(SubmitError::PromptTooLong { prompt, context });
        }
        let vocab_size = self.shared.vocab_size;
        if let Some(grammar) = sequence
            .grammar
            .as_ref()
            .map(|grammar| grammar.vocabulary().len())
            && grammar > vocab_size
        {
            return Err(SubmitError::GrammarVocabulary { grammar, vocab_size });
        }
        match sequence.prompt.iter().position(|&id| id as usize >= vocab_size) {
            Some(position) => Err(SubmitError::TokenOutOfRange {
                id: sequence.prompt[position],
                position,
                vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// When a place in the queue is likely to be free: after one admission, at the pace of the last ones.
    fn retry_after(&self) -> Duration {
        let pace = self.shared.published().pace;
        pace.clamp(Duration::from_millis(50), Duration::from_secs(30))
    }
}

// === impl EngineEnd ===

impl EngineEnd {
    /// Whether everything that the engine held is freed.
    pub fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

// === impl Shared ===

impl Shared {
    fn published(&self) -> MutexGuard<'_, Published> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything that the engine's thread owns.
struct EngineThread {
    shared: Arc<Shared>,
    queue: mpsc::Receiver<Running>,
    scheduler: Scheduler,
    runner: Box<dyn Runner>,
    batch: Batch,
    sampled: Vec<Result<SampledToken, RunnerError>>,
    /// The last field: it is dropped when everything above is freed.
    _alive: Arc<()>,
}

impl EngineThread {
    fn run(mut self) {
        while !self.shared.stopping.load(Ordering::Acquire) {
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => self.start_over(),
            }
        }
        self.shared.stopping.store(true, Ordering::Release);
        while let Ok(waiting) = self.queue.try_recv() {
            self.scheduler.enqueue(waiting);
        }
        self.scheduler.fail_all(&SequenceError::ShuttingDown);
        self.publish();
    }

    /// Takes what is new and runs one step; false once there is nobody left to work for.
    fn turn(&mut self) -> bool {
        if self.scheduler.is_idle() && !self.scheduler.is_sound() {
            self.start_over();
        }
        if !self.receive() {
            return false;
        }
        if !self.runner_is_ready() {
            return true;
        }
        let now = Instant::now();
        self.scheduler.sweep(now);
        let admitted = self.scheduler.schedule(now, &mut self.batch);
        self.note_admissions(admitted, now);
        if !self.batch.is_empty() {
            self.step();
        } else if !self.scheduler.is_idle() {
            thread::sleep(REST);
        }
        self.publish();
        true
    }

    /// Whether a step can be run. Where it cannot, nobody waits for it: another worker may do better.
    fn runner_is_ready(&mut self) -> bool {
        let reason = self.runner.ready().err().map(|error| error.to_string());
        let before = self.shared.published().stats.unavailable.clone();
        if reason == before && reason.is_none() {
            return true;
        }
        if let Some(reason) = &reason {
            if before.is_none() {
                tracing::error!(
                    engine = self.shared.config.name,
                    reason,
                    "the engine stands still"
                );
            }
            self.scheduler
                .fail_all(&SequenceError::Unavailable(reason.clone()));
            thread::sleep(REST);
        } else {
            tracing::info!(engine = self.shared.config.name, "the engine goes on");
        }
        let ready = reason.is_none();
        self.shared.published().stats.unavailable = reason;
        self.publish();
        ready
    }

    /// The bookkeeping is broken: its sequences fail, its KV is dropped, the engine goes on.
    fn start_over(&mut self) {
        tracing::error!(
            engine = self.shared.config.name,
            "broken bookkeeping: all KV is dropped"
        );
        self.scheduler = Scheduler::replacing(&mut self.scheduler, &self.shared.config);
        self.shared.published().step_started = None;
        self.publish();
    }

    /// Takes new sequences; waits for one where there is nothing else to do. False once every handle is gone.
    fn receive(&mut self) -> bool {
        if self.scheduler.is_idle() {
            match self.queue.recv_timeout(IDLE) {
                Ok(sequence) => self.scheduler.enqueue(sequence),
                Err(mpsc::RecvTimeoutError::Timeout) => return true,
                Err(mpsc::RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.queue.try_recv() {
                Ok(sequence) => self.scheduler.enqueue(sequence),
                Err(mpsc::TryRecvError::Empty) => return true,
                // Running sequences finish first.
                Err(mpsc::TryRecvError::Disconnected) => return !self.scheduler.is_idle(),
            }
        }
    }

    fn step(&mut self) {
        self.shared.published().step_started = Some(Instant::now());
        self.sampled.clear();
        let (runner, batch, sampled) = (&mut self.runner, &self.batch, &mut self.sampled);
        let samples = self.scheduler.samples();
        // A panic of the runner fails the sequences of this step; the engine goes on.
        let result = catch_unwind(AssertUnwindSafe(|| runner.step(batch, &samples, sampled)));
        let expected = samples.len();
        drop(samples);
        let now = Instant::now();
        let out_of_memory = matches!(result, Ok(Err(RunnerError::OutOfMemory(_))));
        let failed = |reason: &str| Err(RunnerError::Model(reason.to_owned()));
        let outcome = match result {
            Ok(Ok(())) if self.sampled.len() == expected => Ok(()),
            Ok(Ok(())) => failed("the runner yielded another number of tokens than asked for"),
            Ok(Err(error)) => Err(error),
            Err(_) => failed("the runner panicked"),
        };
        match outcome {
            Ok(()) => self.scheduler.advance(now, &mut self.sampled),
            Err(error) => self.scheduler.fail_step(&error.into()),
        }
        let mut published = self.shared.published();
        published.step_started = None;
        published.stats.last_step_at = Some(now);
        published.stats.out_of_memory += u64::from(out_of_memory);
    }

    fn note_admissions(&self, admitted: usize, now: Instant) {
        if admitted == 0 {
            return;
        }
        // Only while others still wait does the time to the next admission say how fast the queue moves.
        let busy = self.shared.waiting.load(Ordering::Acquire) > 0;
        let mut published = self.shared.published();
        if let Some(last) = published.last_admission.take() {
            let share = u32::try_from(admitted).unwrap_or(u32::MAX);
            published.pace = published.pace * 7 / 8 + (now - last) / share / 8;
        }
        published.last_admission = busy.then_some(now);
    }

    fn publish(&mut self) {
        self.scheduler.fill(&mut self.shared.published().stats);
    }
}

#[cfg(test)]
mod tests;
