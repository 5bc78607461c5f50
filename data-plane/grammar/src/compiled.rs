//! A grammar with its automaton.

use std::{
    fmt,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
};

use llguidance::TokenParser;

use crate::{
    Matcher, Vocabulary,
    error::{GrammarError, MatcherError},
    language,
};

/// A compiled grammar, shared by all sequences that follow it.
///
/// Its lexer's states are made as sequences come to need them and kept for the next one, up to the limit. A
/// sequence that exhausts them, or meets a fault, takes only itself down: the next matcher starts from the
/// automaton as it was compiled.
pub struct CompiledGrammar {
    vocabulary: Arc<Vocabulary>,
    /// As compiled; nobody walks it.
    pristine: TokenParser,
    /// What matchers are cloned from; they share its lexer.
    shared: Mutex<TokenParser>,
    /// Lexer states at which the shared one is made anew.
    renew_at_states: usize,
}

// === impl CompiledGrammar ===

impl CompiledGrammar {
    /// Takes `parser`, fresh from the compiler.
    ///
    /// # Errors
    /// A grammar that allows no first token, or that cannot end.
    pub(crate) fn new(vocabulary: Arc<Vocabulary>, mut parser: TokenParser) -> Result<Self, GrammarError> {
        language::check_ends(&parser)?;
        let renew_at_states = parser.limits.max_lexer_states / 2;
        if parser.is_fresh() {
            parser.start_without_prompt();
        }
        let compiled = Self {
            vocabulary,
            shared: Mutex::new(parser.deep_clone()),
            pristine: parser,
            renew_at_states,
        };
        compiled.check_begins()?;
        Ok(compiled)
    }

    /// Where the first mask has a token, something satisfies the grammar as far as one can see.
    fn check_begins(&self) -> Result<(), GrammarError> {
        let mut first = self.matcher_of(self.pristine.deep_clone());
        match first.mask() {
            Ok(_) => Ok(()),
            Err(MatcherError::DeadEnd { .. }) => Err(GrammarError::Empty {
                reason: "it allows no first token".into(),
            }),
            Err(MatcherError::TooComplex { message, .. }) => Err(GrammarError::TooComplex { message }),
            Err(error) => Err(GrammarError::Internal {
                message: error.to_string(),
            }),
        }
    }

    /// A matcher at the beginning of a reply. Cheap: the automaton is shared.
    pub fn matcher(self: &Arc<Self>) -> Matcher {
        let parser = {
            let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            if states(&shared).is_none_or(|states| states > self.renew_at_states) {
                *shared = self.pristine.deep_clone();
            }
            shared.clone()
        };
        self.matcher_of(parser)
    }

    /// The vocabulary that masks are over.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// Memory that the automaton takes at present, in bytes.
    pub fn bytes(&self) -> usize {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |parser: &TokenParser| lexer(parser).map_or(0, |lexer| lexer.num_bytes);
        size_of::<Self>() + of(&shared) + of(&self.pristine)
    }

    fn matcher_of(&self, parser: TokenParser) -> Matcher {
        Matcher::new(parser, self.vocabulary.clone())
    }
}

/// States of the lexer; none where a fault or the limit has made it useless.
fn states(parser: &TokenParser) -> Option<usize> {
    lexer(parser)
        .filter(|lexer| !lexer.error)
        .map(|lexer| lexer.num_states)
}

/// A panic inside the automaton, in whatever sequence, leaves its lock poisoned and reading it panics.
fn lexer(parser: &TokenParser) -> Option<llguidance::earley::regexvec::LexerStats> {
    std::panic::catch_unwind(AssertUnwindSafe(|| parser.parser.lexer_stats())).ok()
}

impl fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompiledGrammar").finish_non_exhaustive()
    }
}
