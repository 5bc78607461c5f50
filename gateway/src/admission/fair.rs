//! A queue that serves tenants in turn, by the tokens that they ask for: start-time fair queueing (Goyal, Vin and
//! Cheng, 1996). Who asks for little is served soon, however long the queue of others is.

use std::collections::{BTreeMap, HashMap};

/// Place in the queue: virtual start, then arrival.
pub(super) type Place = (u64, u64);

#[derive(Debug)]
pub(super) struct FairQueue<T> {
    waiting: BTreeMap<Place, Entry<T>>,
    /// Virtual end of each tenant's last request; those before the present are forgotten.
    finished: HashMap<u64, u64>,
    now: u64,
    arrivals: u64,
}

#[derive(Debug)]
struct Entry<T> {
    tokens: u64,
    item: T,
}

// === impl FairQueue ===

impl<T> FairQueue<T> {
    pub(super) fn new() -> Self {
        Self {
            waiting: BTreeMap::new(),
            finished: HashMap::new(),
            now: 0,
            arrivals: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Where the next request of this tenant would stand, and the tokens before it.
    pub(super) fn place(&self, tenant: u64) -> (Place, u64) {
        let start = self
            .finished
            .get(&tenant)
            .map_or(self.now, |end| self.now.max(*end));
        let place = (start, self.arrivals);
        let before = self.waiting.range(..place).map(|(_, entry)| entry.tokens).sum();
        (place, before)
    }

    pub(super) fn push(&mut self, tenant: u64, tokens: u64, item: T) -> Place {
        let (place, _) = self.place(tenant);
        self.arrivals += 1;
        self.finished.insert(tenant, place.0 + tokens.max(1));
        self.waiting.insert(place, Entry { tokens, item });
        place
    }

    /// Tokens of who is next.
    pub(super) fn next_tokens(&self) -> Option<u64> {
        self.waiting.first_key_value().map(|(_, entry)| entry.tokens)
    }

    pub(super) fn pop(&mut self) -> Option<(u64, T)> {
        let ((start, _), entry) = self.waiting.pop_first()?;
        self.now = self.now.max(start);
        if self.finished.len() > 2 * self.waiting.len() + 64 {
            let now = self.now;
            self.finished.retain(|_, end| *end > now);
        }
        Some((entry.tokens, entry.item))
    }

    /// Takes out who would be last.
    pub(super) fn pop_last(&mut self) -> Option<(Place, T)> {
        let (place, entry) = self.waiting.pop_last()?;
        Some((place, entry.item))
    }

    /// Takes one out of the middle.
    pub(super) fn remove(&mut self, place: Place) -> bool {
        self.waiting.remove(&place).is_some()
    }
}
