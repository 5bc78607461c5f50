//! Workers that vanish all at once are more likely to have lost their store than their lives.

use std::collections::BTreeMap;

use penstock_plan::{Endpoint, EndpointSet};

/// Fewer workers than this say nothing about the store.
const LEAST: usize = 4;
/// Share of the workers, in percent, above which they are kept.
const SHARE: usize = 30;
/// Questions in a row without an answer, after which a worker is dropped: one packet may be lost.
const STRIKES: u8 = 2;

/// Workers that the last push lacks and that are served nevertheless.
#[derive(Debug, Default)]
pub(crate) struct Vanished {
    /// By id, with the questions that went without an answer.
    kept: BTreeMap<String, u8>,
}

impl Vanished {
    /// What to serve after a push: `pushed` itself, and those of `before` that are kept. Where more than 30 % of at
    /// least four workers vanish at once, they are kept until they do not answer.
    pub(crate) fn admit(&mut self, before: &EndpointSet, pushed: EndpointSet) -> EndpointSet {
        let stays = |id: &str| pushed.endpoints.iter().any(|endpoint| endpoint.id == id);
        self.kept.retain(|id, _| !stays(id));
        let gone = |endpoint: &&Endpoint| !stays(&endpoint.id) && !self.kept.contains_key(&endpoint.id);
        let gone: Vec<String> = before
            .endpoints
            .iter()
            .filter(gone)
            .map(|e| e.id.clone())
            .collect();
        let all = before.endpoints.len();
        if all >= LEAST && gone.len() * 100 > all * SHARE {
            tracing::warn!(
                gone = gone.len(),
                all,
                "many workers vanished at once; each is kept while it answers"
            );
            self.kept.extend(gone.into_iter().map(|id| (id, 0)));
        }
        if self.kept.is_empty() {
            return pushed;
        }
        let kept = before
            .endpoints
            .iter()
            .filter(|endpoint| self.keeps(&endpoint.id));
        let mut endpoints = pushed.endpoints.clone();
        endpoints.extend(kept.cloned());
        endpoints.sort_by(|a, b| a.id.cmp(&b.id));
        EndpointSet {
            version: pushed.version,
            endpoints,
        }
    }

    /// Whether the worker is served although it vanished.
    pub(crate) fn keeps(&self, id: &str) -> bool {
        self.kept.contains_key(id)
    }

    /// Notes whether it answered. Returns whether it is to be dropped.
    pub(crate) fn answered(&mut self, id: &str, answers: bool) -> bool {
        let Some(strikes) = self.kept.get_mut(id) else {
            return false;
        };
        *strikes = if answers { 0 } else { *strikes + 1 };
        let drop = *strikes >= STRIKES;
        if drop {
            self.kept.remove(id);
        }
        drop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(version: u64, ids: &[&str]) -> EndpointSet {
        let endpoint = |id: &&str| Endpoint {
            id: (*id).into(),
            address: format!("{id}:1"),
            region: String::new(),
            revisions: vec![],
        };
        EndpointSet {
            version,
            endpoints: ids.iter().map(endpoint).collect(),
        }
    }

    fn ids(set: &EndpointSet) -> Vec<&str> {
        set.endpoints
            .iter()
            .map(|endpoint| endpoint.id.as_str())
            .collect()
    }

    #[test]
    fn many_at_once_are_kept_and_few_are_dropped() {
        let mut vanished = Vanished::default();
        let ten = set(1, &["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]);
        let seven = set(2, &["d", "e", "f", "g", "h", "i", "j"]);
        let served = vanished.admit(&ten, seven.clone());
        assert_eq!(served, seven, "30 % is not more than 30 %");
        let served = vanished.admit(&ten, set(3, &["e", "f", "g", "h", "i", "j"]));
        assert_eq!((ids(&served), served.version), (ids(&ten), 3));
        let served = Vanished::default().admit(&set(1, &["a", "b", "c"]), set(2, &[]));
        assert!(served.endpoints.is_empty(), "three workers are too few to tell");
    }

    #[test]
    fn kept_ones_stay_over_later_pushes_until_they_do_not_answer_twice() {
        let mut vanished = Vanished::default();
        let all = set(1, &["a", "b", "c", "d"]);
        let served = vanished.admit(&all, set(2, &[]));
        assert_eq!(ids(&served), ["a", "b", "c", "d"]);
        let served = vanished.admit(&served, set(3, &["a"]));
        assert_eq!(ids(&served), ["a", "b", "c", "d"]);
        assert!(
            !vanished.keeps("a") && vanished.keeps("b"),
            "who is back is like any other"
        );
        assert!(!vanished.answered("b", false));
        assert!(!vanished.answered("b", true));
        assert!(!vanished.answered("b", false));
        assert!(vanished.answered("b", false));
        assert!(!vanished.answered("a", false) && !vanished.answered("a", false));
    }
}
