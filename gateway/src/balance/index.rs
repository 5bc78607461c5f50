//! Which worker has computed which beginnings of prompts, as far as a gateway can tell.
//!
//! A node is the hash of a beginning, so that a map of hashes is a radix tree without its edges. Nodes lie in two
//! generations: when the young one is full, the old one is forgotten and the young one grows old. Whatever is used in
//! the meantime moves to the young one.

use std::collections::HashMap;

use super::Expected;

/// Workers remembered per node; those that used it last.
const HOLDERS: usize = 4;

/// The index.
#[derive(Debug)]
pub(super) struct Index {
    young: HashMap<u64, Node>,
    old: HashMap<u64, Node>,
    /// Nodes in one generation.
    room: usize,
    workers: HashMap<u64, Worker>,
}

/// A worker, as a cache.
#[derive(Debug, Clone, Copy)]
struct Worker {
    /// Tokens that it has computed.
    clock: u64,
    /// Age in tokens from which on it has forgotten what it computed.
    horizon: u64,
}

/// Who has a beginning, and its clock at the last use; newest first.
#[derive(Debug, Clone, Copy, Default)]
struct Node([Option<(u64, u64)>; HOLDERS]);

// === impl Index ===

impl Index {
    pub(super) fn new(nodes: usize) -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            room: (nodes / 2).max(1),
            workers: HashMap::new(),
        }
    }

    /// The worker has these beginnings from now on.
    pub(super) fn insert(&mut self, nodes: &[(u64, usize)], worker: u64) {
        let clock = self.workers.entry(worker).or_default().clock;
        for &(hash, _) in nodes {
            let mut node = self.node(hash).unwrap_or_default();
            node.touch(worker, clock);
            if self.young.len() >= self.room && !self.young.contains_key(&hash) {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(hash, node);
        }
    }

    /// Who has this very beginning, newest first.
    pub(super) fn holders(&mut self, hash: u64) -> Vec<u64> {
        let node = self.node(hash).unwrap_or_default();
        node.holders()
            .filter(|&(worker, clock)| self.age(worker, clock).is_some())
            .map(|(worker, _)| worker)
            .collect()
    }

    /// Who has the longest of these beginnings, if it is at least `least` bytes long.
    pub(super) fn longest(&mut self, nodes: &[(u64, usize)], least: usize) -> Vec<u64> {
        let enough = nodes.iter().rev().take_while(|(_, bytes)| *bytes >= least);
        for &(hash, _) in enough {
            let holders = self.holders(hash);
            if !holders.is_empty() {
                return holders;
            }
        }
        Vec::new()
    }

    /// What this worker has of a prompt.
    pub(super) fn expects(&self, nodes: &[(u64, usize)], worker: u64) -> Expected {
        for &(hash, bytes) in nodes.iter().rev() {
            let node = self.node(hash).unwrap_or_default();
            let clock = node.holders().find(|&(holder, _)| holder == worker);
            if let Some(age) = clock.and_then(|(_, clock)| self.age(worker, clock)) {
                return Expected { bytes, age };
            }
        }
        Expected::default()
    }

    /// The worker has computed so many tokens more.
    pub(super) fn computed(&mut self, worker: u64, tokens: u64) {
        self.workers.entry(worker).or_default().clock += tokens;
    }

    /// Whether the worker still had what it computed `age` tokens ago. A miss may have other causes than age, so the
    /// horizon comes nearer by steps.
    pub(super) fn judged(&mut self, worker: u64, age: u64, hit: bool) {
        let worker = self.workers.entry(worker).or_default();
        match hit {
            true => worker.horizon = worker.horizon.max(age.saturating_mul(2)),
            false if worker.horizon == u64::MAX => worker.horizon = age.saturating_mul(2).max(1),
            false => worker.horizon = worker.horizon.min(worker.horizon / 2 + age / 2).max(1),
        }
    }

    /// Forgets workers; what they had goes when its generation does.
    pub(super) fn retain(&mut self, known: impl Fn(u64) -> bool) {
        self.workers.retain(|&worker, _| known(worker));
    }

    /// Nodes held.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    fn node(&self, hash: u64) -> Option<Node> {
        self.young.get(&hash).or_else(|| self.old.get(&hash)).copied()
    }

    /// Tokens computed since; nothing where the worker is gone or has forgotten.
    fn age(&self, worker: u64, clock: u64) -> Option<u64> {
        let worker = self.workers.get(&worker)?;
        let age = worker.clock.checked_sub(clock)?;
        (age < worker.horizon).then_some(age)
    }
}

impl Default for Worker {
    /// How much it can hold is not known before it has forgotten something.
    fn default() -> Self {
        Self {
            clock: 0,
            horizon: u64::MAX,
        }
    }
}

// === impl Node ===

impl Node {
    fn touch(&mut self, worker: u64, clock: u64) {
        let at = self
            .0
            .iter()
            .position(|holder| holder.is_some_and(|(holder, _)| holder == worker))
            .unwrap_or(HOLDERS - 1);
        self.0[..=at].rotate_right(1);
        self.0[0] = Some((worker, clock));
    }

    fn holders(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().flatten().copied()
    }
}
