//! Who waits, and whose turn it is: priorities first, then tenants by what they were served, then cached prefixes.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, VecDeque},
};

use super::Running;

/// What it is worth, in cached tokens, that a later sequence was admitted before a waiting one: nothing waits for
/// ever.
const AGEING_TOKENS: usize = 64;
/// With more waiting sequences than this, looking all of them up costs more than it saves: first come, first served.
const LONGEST_PREFIX_LIMIT: usize = 128;
/// Tenants that were served no more than this beyond the one served least may go before it: without such a quantum,
/// fairness would give away the prefixes that they share (deficit longest prefix match, arXiv 2501.14312).
const QUANTUM_TOKENS: u64 = 4096;
/// A generated token counts like so many of a prompt, as in the Virtual Token Counter (arXiv 2401.00588).
const GENERATED_WEIGHT: u64 = 2;
/// Counters of tenants who are not here, at most.
const MOST_ABSENT: usize = 4096;

/// Sequences that wait, and how much each tenant was served.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Put back when KV ran out; they go before those that have not started.
    retracted: VecDeque<Running>,
    classes: BTreeMap<Reverse<i32>, HashMap<u64, VecDeque<Running>>>,
    count: usize,
    arrivals: u64,
    tenants: HashMap<u64, Tenant>,
}

/// Where a waiting sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Retracted(usize),
    Queued {
        priority: i32,
        tenant: u64,
        index: usize,
    },
}

/// What a tenant was served, in weighted tokens, and how many sequences it has here.
#[derive(Debug, Default)]
struct Tenant {
    served: u64,
    present: usize,
}

// === impl Waiting ===

impl Waiting {
    pub(crate) fn len(&self) -> usize {
        self.count + self.retracted.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A sequence has come. It is its tenant's until [`left`](Self::left).
    pub(crate) fn arrived(&mut self, mut sequence: Running) {
        sequence.arrival = self.arrivals;
        self.arrivals += 1;
        self.entered(sequence.tenant);
        self.count += 1;
        let class = self.classes.entry(Reverse(sequence.priority)).or_default();
        class.entry(sequence.tenant).or_default().push_back(sequence);
    }

    /// A running sequence goes back, before those that have not started.
    pub(crate) fn put_back(&mut self, sequence: Running) {
        self.retracted.push_front(sequence);
    }

    /// Takes a sequence out.
    pub(crate) fn take(&mut self, place: Place) -> Option<Running> {
        match place {
            Place::Retracted(index) => self.retracted.remove(index),
            Place::Queued {
                priority,
                tenant,
                index,
            } => {
                let class = self.classes.get_mut(&Reverse(priority))?;
                let queue = class.get_mut(&tenant)?;
                let taken = queue.remove(index)?;
                self.count -= 1;
                if queue.is_empty() {
                    class.remove(&tenant);
                }
                if class.is_empty() {
                    self.classes.remove(&Reverse(priority));
                }
                Some(taken)
            }
        }
    }

    /// Puts a sequence back where it was taken, before anything else has changed.
    pub(crate) fn untake(&mut self, place: Place, sequence: Running) {
        match place {
            Place::Retracted(index) => self.retracted.insert(index, sequence),
            Place::Queued {
                priority,
                tenant,
                index,
            } => {
                self.count += 1;
                let class = self.classes.entry(Reverse(priority)).or_default();
                class.entry(tenant).or_default().insert(index, sequence);
            }
        }
    }

    /// Whose turn it is: replies under way first. Of the highest priority, the tenants who were served least; of what
    /// these have waiting, the one with the best `score`, its cached tokens. A sequence without one is left for now.
    pub(crate) fn choose(&self, score: impl Fn(&Running) -> Option<usize>) -> Option<Place> {
        let ready = |sequence: &&Running| !sequence.sink.is_blocked() && !sequence.is_abandoned();
        if let Some(index) = self.retracted.iter().position(|sequence| ready(&sequence)) {
            return Some(Place::Retracted(index));
        }
        let in_order = self.len() > LONGEST_PREFIX_LIMIT;
        self.classes.iter().find_map(|(&Reverse(priority), class)| {
            let place = |sequence: &Running, index| Place::Queued {
                priority,
                tenant: sequence.tenant,
                index,
            };
            let least = class.keys().map(|&tenant| self.served(tenant)).min()?;
            let turn = |tenant: u64| self.served(tenant) <= least + QUANTUM_TOKENS;
            let queues = || {
                class
                    .iter()
                    .filter(|&(&tenant, _)| turn(tenant))
                    .map(|(_, queue)| queue)
            };
            if in_order {
                let heads = queues().filter_map(|queue| queue.iter().enumerate().find(|(_, s)| ready(s)));
                let first = heads.min_by_key(|(_, sequence)| sequence.arrival);
                return first.map(|(index, sequence)| place(sequence, index));
            }
            let scored = queues()
                .flat_map(|queue| queue.iter().enumerate())
                .filter(|(_, sequence)| ready(sequence))
                .filter_map(|(index, s)| {
                    let aged = score(s)? + s.passes * AGEING_TOKENS;
                    Some(((aged, Reverse(s.arrival)), place(s, index)))
                });
            scored.max_by_key(|&(score, _)| score).map(|(_, place)| place)
        })
    }

    /// A sequence was admitted: those that waited longer with the same priority were passed over.
    pub(crate) fn passed(&mut self, admitted: &Running) {
        if self.len() > LONGEST_PREFIX_LIMIT {
            return;
        }
        let class = self.classes.get_mut(&Reverse(admitted.priority));
        for sequence in class.into_iter().flat_map(HashMap::values_mut).flatten() {
            sequence.passes += usize::from(sequence.arrival < admitted.arrival);
        }
    }

    /// Keeps the sequences that `keep` wants.
    pub(crate) fn retain_mut(&mut self, mut keep: impl FnMut(&mut Running) -> bool) {
        let mut gone = Vec::new();
        let mut kept = |sequence: &mut Running| {
            let keeps = keep(sequence);
            if !keeps {
                gone.push(sequence.tenant);
            }
            keeps
        };
        self.retracted.retain_mut(&mut kept);
        for class in self.classes.values_mut() {
            for queue in class.values_mut() {
                queue.retain_mut(&mut kept);
            }
            class.retain(|_, queue| !queue.is_empty());
        }
        self.classes.retain(|_, class| !class.is_empty());
        self.count = self
            .classes
            .values()
            .flat_map(HashMap::values)
            .map(VecDeque::len)
            .sum();
        gone.into_iter().for_each(|tenant| self.left(tenant));
    }

    /// Takes all of them.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Running> {
        self.count = 0;
        self.tenants.clear();
        let classes = std::mem::take(&mut self.classes);
        let queued = classes.into_values().flat_map(HashMap::into_values).flatten();
        std::mem::take(&mut self.retracted).into_iter().chain(queued)
    }

    /// A tenant was served.
    pub(crate) fn serve(&mut self, tenant: u64, prompt_tokens: usize, generated_tokens: usize) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.served += prompt_tokens as u64 + GENERATED_WEIGHT * generated_tokens as u64;
        }
    }

    /// A sequence of `tenant` is over.
    pub(crate) fn left(&mut self, tenant: u64) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.present = tenant.present.saturating_sub(1);
        }
    }

    fn served(&self, tenant: u64) -> u64 {
        self.tenants.get(&tenant).map_or(0, |tenant| tenant.served)
    }

    /// Who comes back after a while has saved nothing up: the counter starts no lower than that of those who are here.
    fn entered(&mut self, tenant: u64) {
        if self.tenants.get(&tenant).is_some_and(|known| known.present > 0) {
            self.tenants.entry(tenant).or_default().present += 1;
            return;
        }
        let here = self.tenants.values().filter(|tenant| tenant.present > 0);
        let least = here.map(|tenant| tenant.served).min();
        if self.tenants.len() > MOST_ABSENT {
            // Those who owe nothing can be forgotten.
            self.tenants
                .retain(|_, tenant| tenant.present > 0 || least.is_some_and(|least| tenant.served > least));
        }
        let tenant = self.tenants.entry(tenant).or_default();
        tenant.present += 1;
        tenant.served = tenant.served.max(least.unwrap_or(0));
    }
}

#[cfg(test)]
impl Waiting {
    pub(crate) fn served_for_test(&self, tenant: u64) -> u64 {
        self.served(tenant)
    }

    pub(crate) fn known_for_test(&self) -> usize {
        self.tenants.len()
    }
}
