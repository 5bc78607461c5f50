//! A sequence's grammar while it runs, and the thread that computes masks ahead.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use penstock_grammar::{Matcher, MatcherError, TokenMask};

/// Masks that may wait for the thread; a further one is computed where it is needed.
const QUEUE: usize = 256;

/// Where a running sequence stands in its grammar. Clones share it.
///
/// The mask of a place is computed once, by whoever comes first: the thread that computes ahead, while the model
/// computes the step, or the sampler.
#[derive(Debug, Clone)]
pub struct Constraint(Arc<Mutex<Matcher>>);

/// Computes masks while the model computes logits. Its thread ends with it.
#[derive(Debug)]
pub(crate) struct MasksAhead(mpsc::SyncSender<Constraint>);

// === impl Constraint ===

impl Constraint {
    /// A sequence's constraint from `matcher` on.
    pub fn new(matcher: Matcher) -> Self {
        Self(Arc::new(Mutex::new(matcher)))
    }

    /// Calls `read` with the tokens that may come next.
    ///
    /// # Errors
    /// The mask costs more than the limits allow, or the automaton failed.
    pub fn with_mask<T>(&self, read: impl FnOnce(&TokenMask) -> T) -> Result<T, MatcherError> {
        self.matcher().mask().map(read)
    }

    /// Takes the token that was sampled.
    pub(crate) fn commit(&self, token: u32) -> Result<(), MatcherError> {
        self.matcher().commit(token)
    }

    /// Tokens that leave no choice, at most `most`; they are not committed.
    pub(crate) fn forced(&self, most: usize) -> Result<Vec<u32>, MatcherError> {
        let mut tokens = self.matcher().forced()?;
        tokens.truncate(most);
        Ok(tokens)
    }

    /// Whether the grammar has ended.
    pub(crate) fn is_stopped(&self) -> bool {
        self.matcher().is_stopped()
    }

    /// Whether the reply satisfies the grammar as it is.
    pub(crate) fn may_stop(&self) -> bool {
        self.matcher().may_stop()
    }

    /// A matcher catches its automaton's panics: what the lock guards is whole.
    fn matcher(&self) -> MutexGuard<'_, Matcher> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl MasksAhead ===

impl MasksAhead {
    /// Starts the thread. Without one, masks are computed where they are needed.
    pub(crate) fn start(engine: &str) -> Self {
        let (queue, constraints) = mpsc::sync_channel::<Constraint>(QUEUE);
        let work = move || {
            for constraint in constraints {
                // An error shows again where the mask is needed.
                let _ = constraint.with_mask(|_| ());
            }
        };
        let thread = thread::Builder::new().name(format!("{engine} masks")).spawn(work);
        if let Err(error) = thread {
            tracing::warn!(%error, "no thread for masks: they are computed on the engine's");
        }
        Self(queue)
    }

    /// Computes the mask of the place where the constraint is now.
    pub(crate) fn compute(&self, constraint: &Constraint) {
        // Where the thread lags, the sampler computes it.
        let _ = self.0.try_send(constraint.clone());
    }
}
