//! One sequence's place in its grammar.

use std::{fmt, sync::Arc};

use llguidance::{TokenParser, api::StopReason};

use crate::{TokenMask, Vocabulary, error::MatcherError};

/// Most tokens that one call of [`Matcher::forced`] looks ahead where it has no tokenizer to ask.
const MOST_FORCED: usize = 32;

/// Where a sequence stands in its grammar. A clone goes its own way from there.
#[derive(Clone)]
pub struct Matcher {
    automaton: llguidance::Matcher,
    vocabulary: Arc<Vocabulary>,
    mask: TokenMask,
    /// Whether `mask` is that of the present place.
    mask_is_current: bool,
    committed: usize,
    /// End-of-sequence tokens committed after the grammar had ended by itself; the automaton has not seen them.
    trailing: usize,
}

// === impl Matcher ===

impl Matcher {
    pub(crate) fn new(parser: TokenParser, vocabulary: Arc<Vocabulary>) -> Self {
        Self {
            automaton: llguidance::Matcher::new(Ok(parser)),
            mask: TokenMask::new(vocabulary.len()),
            vocabulary,
            mask_is_current: false,
            committed: 0,
            trailing: 0,
        }
    }

    /// The tokens that may come next: at least one, and an end-of-sequence token exactly where the grammar may
    /// end. Computed once for each place; a second call is free.
    ///
    /// # Errors
    /// The mask costs more than the limits allow, or the automaton failed; so does every later call.
    pub fn mask(&mut self) -> Result<&TokenMask, MatcherError> {
        if !self.mask_is_current {
            match self.automaton.compute_mask_or_eos() {
                Ok(bits) => self.mask.copy_from(bits.as_slice()),
                Err(_) => return Err(self.failure()),
            }
            if !self.may_stop() {
                // A Lark grammar may name the token itself (`<[2]>`), which would end the reply too early.
                let vocabulary = self.vocabulary.clone();
                vocabulary
                    .end_of_sequence()
                    .iter()
                    .for_each(|&id| self.mask.forbid(id));
            }
            if self.mask.count() == 0 {
                return Err(MatcherError::DeadEnd {
                    committed: self.committed,
                });
            }
            self.mask_is_current = true;
        }
        Ok(&self.mask)
    }

    /// Takes the token that was sampled. Tokens of a text that the grammar allows are taken even where the mask
    /// forces another spelling of it: a reply may be resumed whatever its tokens were.
    ///
    /// # Errors
    /// [`MatcherError::NotAllowed`] leaves the matcher where it was; the others end it.
    pub fn commit(&mut self, token: u32) -> Result<(), MatcherError> {
        let refused = MatcherError::NotAllowed {
            token,
            committed: self.committed,
        };
        if token as usize >= self.vocabulary.len() {
            return Err(refused);
        }
        if self.is_stopped() {
            if self.automaton.is_error() {
                return Err(self.failure());
            }
            if !self.vocabulary.end_of_sequence().contains(&token) {
                return Err(refused);
            }
            self.trailing += 1;
        } else {
            match self.automaton.try_consume_tokens(&[token]) {
                Ok(0) => return Err(refused),
                Ok(_) => self.mask_is_current = false,
                Err(_) => return Err(self.failure()),
            }
        }
        self.committed += 1;
        Ok(())
    }

    /// Tokens that must come next, in order, as far as the grammar leaves no choice; often none. They are not
    /// committed. With a tokenizer ([`Vocabulary::with_tokenizer`]) these are its tokens of the forced text.
    ///
    /// # Errors
    /// As [`Matcher::mask`].
    pub fn forced(&mut self) -> Result<Vec<u32>, MatcherError> {
        if self.is_stopped() {
            return Ok(Vec::new());
        }
        if self.vocabulary.forces_text() {
            let tokens = self.automaton.compute_ff_tokens();
            return match self.automaton.is_error() {
                true => Err(self.failure()),
                false => Ok(tokens),
            };
        }
        let mut tokens = Vec::new();
        let Some(first) = self.mask()?.only() else {
            return Ok(tokens);
        };
        let mut ahead = self.clone();
        let mut only = Some(first);
        while let Some(token) = only {
            tokens.push(token);
            ahead.commit(token)?;
            if ahead.is_stopped() || tokens.len() == MOST_FORCED {
                break;
            }
            only = ahead.mask()?.only();
        }
        Ok(tokens)
    }

    /// Whether the reply is complete: nothing but an end-of-sequence token may follow, or the matcher failed.
    pub fn is_stopped(&self) -> bool {
        self.automaton.is_stopped()
    }

    /// Whether the reply may end here, though it may go on as well.
    pub fn may_stop(&mut self) -> bool {
        match self.automaton.stop_reason() {
            StopReason::NotStopped => self.automaton.is_accepting().unwrap_or(false),
            reason => reason.is_ok(),
        }
    }

    /// The vocabulary that its masks are over.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// Tokens committed and not taken back.
    pub fn committed(&self) -> usize {
        self.committed
    }

    /// Takes the last `tokens` back.
    ///
    /// # Errors
    /// [`MatcherError::TooFarBack`] leaves the matcher where it was; a grammar that cannot go back (Lark's
    /// `max_tokens`) or that failed ends it.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), MatcherError> {
        if tokens > self.committed {
            return Err(MatcherError::TooFarBack {
                asked: tokens,
                committed: self.committed,
            });
        }
        let trailing = tokens.min(self.trailing);
        if self.automaton.rollback(tokens - trailing).is_err() {
            return Err(self.failure());
        }
        self.trailing -= trailing;
        self.committed -= tokens;
        self.mask_is_current = false;
        Ok(())
    }

    fn failure(&self) -> MatcherError {
        let committed = self.committed;
        let message = self.automaton.get_error().unwrap_or_default();
        // What follows the first line is a dump of the state.
        let message = message.lines().next().unwrap_or("no message").to_owned();
        if message.contains("NoExtensionBias") {
            return MatcherError::DeadEnd { committed };
        }
        match is_too_complex(&message) {
            true => MatcherError::TooComplex { committed, message },
            false => MatcherError::Failed { committed, message },
        }
    }
}

/// llguidance tells its limits apart by words only.
pub(crate) fn is_too_complex(message: &str) -> bool {
    [
        "too complex",
        "too large",
        "too many",
        "limit",
        "fuel",
        "exceeded",
    ]
    .iter()
    .any(|word| message.contains(word))
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher")
            .field("committed", &self.committed)
            .field("stopped", &self.is_stopped())
            .finish_non_exhaustive()
    }
}
