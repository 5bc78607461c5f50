//! Compiled grammars by what they say, the least recently used ones dropped first.

use std::{collections::HashMap, sync::Arc};

use crate::{CompiledGrammar, Grammar, error::GrammarError, workers::Flight};

/// What became of a grammar.
pub(crate) type Outcome = Result<Arc<CompiledGrammar>, GrammarError>;

/// Grammars whole as keys: two that hash alike are still two.
#[derive(Debug)]
pub(crate) struct Cache {
    entries: HashMap<Grammar, Entry>,
    clock: u64,
    max_entries: usize,
    max_bytes: usize,
}

#[derive(Debug)]
struct Entry {
    found: Found,
    used: u64,
}

#[derive(Debug, Clone)]
pub(crate) enum Found {
    /// Compiled, or refused for good.
    Landed(Outcome),
    /// On its way.
    Flying(Arc<Flight>),
}

// === impl Cache ===

impl Cache {
    pub(crate) fn new(max_entries: usize, max_bytes: usize) -> Self {
        Self {
            entries: HashMap::new(),
            clock: 0,
            max_entries,
            max_bytes,
        }
    }

    pub(crate) fn find(&mut self, grammar: &Grammar) -> Option<Found> {
        self.clock += 1;
        let entry = self.entries.get_mut(grammar)?;
        entry.used = self.clock;
        Some(entry.found.clone())
    }

    pub(crate) fn fly(&mut self, grammar: Grammar, flight: Arc<Flight>) {
        self.insert(grammar, Found::Flying(flight));
    }

    /// Keeps the outcome, unless it says nothing about the grammar itself.
    pub(crate) fn land(&mut self, grammar: &Grammar, outcome: Outcome) {
        match outcome {
            Err(error) if error.is_retryable() || error.is_internal() => self.forget(grammar),
            outcome => {
                self.insert(grammar.clone(), Found::Landed(outcome));
                self.evict();
            }
        }
    }

    pub(crate) fn forget(&mut self, grammar: &Grammar) {
        self.entries.remove(grammar);
    }

    fn insert(&mut self, grammar: Grammar, found: Found) {
        self.clock += 1;
        let used = self.clock;
        self.entries.insert(grammar, Entry { found, used });
    }

    /// Drops the least recently used until what is left fits. The newest stays, however large.
    fn evict(&mut self) {
        // Automata grow as they are used, so each is measured anew.
        let mut landed: Vec<(u64, usize, Grammar)> = self
            .entries
            .iter()
            .filter_map(|(grammar, entry)| Some((entry.used, entry.bytes(grammar)?, grammar.clone())))
            .collect();
        landed.sort_unstable_by_key(|&(used, ..)| std::cmp::Reverse(used));
        let mut total = 0_usize;
        for (index, (_, bytes, grammar)) in landed.into_iter().enumerate() {
            total = total.saturating_add(bytes);
            if index > 0 && (index >= self.max_entries || total > self.max_bytes) {
                self.entries.remove(&grammar);
            }
        }
    }
}

// === impl Entry ===

impl Entry {
    /// Memory, in bytes; none for a grammar on its way.
    fn bytes(&self, grammar: &Grammar) -> Option<usize> {
        match &self.found {
            Found::Landed(Ok(compiled)) => Some(grammar.bytes() + compiled.bytes()),
            Found::Landed(Err(_)) => Some(grammar.bytes() + size_of::<Entry>()),
            Found::Flying(_) => None,
        }
    }
}
