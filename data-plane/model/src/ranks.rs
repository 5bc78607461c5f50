//! The ranks of a model: the first one runs on the caller's thread, each further one on its own.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use candle_core::Tensor;
use penstock_kernels::{AttentionSequence, CacheShape};

use crate::{
    Batch, LoadError, ModelError,
    decoder::{Decoder, Step, Workspace},
};

/// One rank: its weights, its KV, its activations.
pub(crate) struct Rank {
    pub(crate) decoder: Decoder,
    pub(crate) cache_shape: CacheShape,
    /// One tensor a layer.
    pub(crate) cache: Vec<Tensor>,
    pub(crate) workspace: Workspace,
}

/// One step, the same for every rank.
#[derive(Debug, Clone, Default)]
pub(crate) struct Job {
    pub(crate) batch: Batch,
    /// Slot in the cache of each token.
    pub(crate) slots: Vec<usize>,
    /// Tokens whose logits are wanted.
    pub(crate) logit_rows: Vec<usize>,
}

/// All ranks.
pub(crate) struct Ranks {
    first: Rank,
    others: Vec<Other>,
    timeout: Duration,
    /// The ranks' sums failed in the last step.
    failed: bool,
    gathered: Vec<f32>,
}

/// A rank on a thread of its own, which ends with the channel.
struct Other {
    jobs: mpsc::SyncSender<Arc<Job>>,
    /// Logits of its part of the vocabulary.
    done: mpsc::Receiver<Result<Vec<f32>, String>>,
    vocabulary: usize,
    /// Since when a step that it has not come back from was given up.
    stuck_since: Option<Instant>,
}

// === impl Rank ===

impl Rank {
    /// Runs a step; `logits` gets one row of this rank's vocabulary for each that is wanted.
    fn run(&mut self, job: &Job, logits: &mut Vec<f32>) -> candle_core::Result<()> {
        let batch = &job.batch;
        let attention = |sequence: &crate::BatchSequence| AttentionSequence {
            query_start: sequence.query_start,
            query_len: sequence.query_len,
            context_len: sequence.context_len,
            pages: batch.pages(sequence),
        };
        let sequences: Vec<_> = batch.sequences.iter().map(attention).collect();
        let step = Step {
            batch,
            slots: &job.slots,
            sequences: &sequences,
            logit_rows: &job.logit_rows,
        };
        self.decoder
            .forward(&step, &self.cache, self.cache_shape, &mut self.workspace)?;
        let vocabulary = self.decoder.vocabulary().len();
        self.workspace
            .read_logits(job.logit_rows.len(), vocabulary, logits)
    }

    /// As [`run`](Self::run). Whatever goes wrong, the other ranks do not wait for this one.
    fn run_with_others(&mut self, job: &Job, logits: &mut Vec<f32>) -> Result<(), String> {
        let result = match catch_unwind(AssertUnwindSafe(|| self.run(job, logits))) {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(panic) => Err(panicked(&*panic)),
        };
        if let Err(reason) = &result {
            self.decoder.ranks().abort(reason);
        }
        result
    }
}

fn panicked(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("it panicked: {}", message.unwrap_or("for an unknown reason"))
}

// === impl Ranks ===

impl Ranks {
    /// Starts the threads of all ranks but the first. A rank has `timeout` to come back once another one has.
    pub(crate) fn start(first: Rank, others: Vec<Rank>, timeout: Duration) -> Result<Self, LoadError> {
        let others = others.into_iter().zip(1..).map(|(rank, number)| {
            Other::start(rank, number).map_err(|source| LoadError::Rank { rank: number, source })
        });
        Ok(Self {
            first,
            others: others.collect::<Result<_, _>>()?,
            timeout,
            failed: false,
            gathered: Vec::new(),
        })
    }

    pub(crate) fn first(&self) -> &Rank {
        &self.first
    }

    pub(crate) fn size(&self) -> usize {
        1 + self.others.len()
    }

    /// Whether every rank is there for a step.
    ///
    /// # Errors
    /// One has not come back from an earlier step.
    pub(crate) fn ready(&mut self) -> Result<(), ModelError> {
        for (other, rank) in self.others.iter_mut().zip(1..) {
            if let Some(since) = other.stuck_since {
                // Its result is of a step that was given up.
                match other.done.try_recv() {
                    Ok(_) => other.stuck_since = None,
                    Err(_) => {
                        let seconds = since.elapsed().as_secs();
                        return Err(ModelError::Rank(format!(
                            "tensor-parallel rank {rank} has not come back from a step that was given up \
                             {seconds} s ago"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Runs a step on all ranks; `logits` gets one row of the whole vocabulary for each that is wanted.
    pub(crate) fn run(&mut self, job: &Arc<Job>, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        if self.others.is_empty() {
            return Ok(self.first.run(job, logits)?);
        }
        self.ready()?;
        if std::mem::take(&mut self.failed) {
            self.first.decoder.ranks().reset();
        }
        for other in &self.others {
            // A thread that is gone shows when its result is waited for.
            let _ = other.jobs.try_send(job.clone());
        }
        let first = self.first.run_with_others(job, &mut self.gathered);
        let parts = self.collect();
        match (first, parts) {
            (Ok(()), Ok(parts)) => {
                let own = self.first.decoder.vocabulary().len();
                self.interleave(job.logit_rows.len(), own, &parts, logits);
                Ok(())
            }
            (Err(reason), _) | (_, Err(reason)) => {
                self.failed = true;
                Err(ModelError::Rank(reason))
            }
        }
    }

    /// Waits for all ranks but the first. Each is waited for even if another one failed: a step ends for all.
    fn collect(&mut self) -> Result<Vec<Vec<f32>>, String> {
        let mut parts = Ok(Vec::with_capacity(self.others.len()));
        for (other, rank) in self.others.iter_mut().zip(1..) {
            let part = match other.done.recv_timeout(self.timeout) {
                Ok(part) => part,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    other.stuck_since = Some(Instant::now());
                    let reason = format!(
                        "tensor-parallel rank {rank} has not come back from its step within {} s",
                        self.timeout.as_secs_f32()
                    );
                    self.first.decoder.ranks().abort(&reason);
                    Err(reason)
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    Err(format!("the thread of tensor-parallel rank {rank} is gone"))
                }
            };
            match (&mut parts, part) {
                (Ok(parts), Ok(part)) => parts.push(part),
                (Ok(_), Err(reason)) => parts = Err(reason),
                (Err(_), _) => {}
            }
        }
        parts
    }

    /// Lays the ranks' parts of each row side by side.
    fn interleave(&self, rows: usize, own: usize, parts: &[Vec<f32>], logits: &mut Vec<f32>) {
        logits.clear();
        for row in 0..rows {
            logits.extend_from_slice(&self.gathered[row * own..][..own]);
            for (other, part) in self.others.iter().zip(parts) {
                logits.extend_from_slice(&part[row * other.vocabulary..][..other.vocabulary]);
            }
        }
    }
}

// === impl Other ===

impl Other {
    fn start(mut rank: Rank, number: usize) -> std::io::Result<Self> {
        let vocabulary = rank.decoder.vocabulary().len();
        // One step at a time: a rank that is stuck gets no further one.
        let (jobs, steps) = mpsc::sync_channel::<Arc<Job>>(1);
        let (finished, done) = mpsc::sync_channel(1);
        let serve = move || {
            while let Ok(job) = steps.recv() {
                let mut logits = Vec::new();
                let result = rank.run_with_others(&job, &mut logits).map(|()| logits);
                if finished.send(result).is_err() {
                    break;
                }
            }
        };
        thread::Builder::new()
            .name(format!("rank-{number}"))
            .spawn(serve)?;
        Ok(Self {
            jobs,
            done,
            vocabulary,
            stuck_since: None,
        })
    }
}
