//! The radix tree over pages.

use std::collections::{BTreeSet, HashMap};

use crate::{PageId, PagePool};

mod node;
mod reuse;

use node::{Node, NodeId, Nodes};
use reuse::{Evicted, ReuseIntervals};

/// Prefix cache of one revision: the page pool and the tree over it.
#[derive(Debug)]
pub struct RadixCache {
    page_size: usize,
    pool: PagePool,
    nodes: Nodes,
    roots: HashMap<u64, NodeId>,
    /// Unlocked leaves, least recently used first.
    evictable_leaves: BTreeSet<(u64, NodeId)>,
    /// Counts uses; stands for time.
    clock: u64,
    reuse: ReuseIntervals,
    evicted: Evicted,
    cached_pages: usize,
    protected_pages: usize,
    lookup_tokens: u64,
    hit_tokens: u64,
}

/// Keeps the path to a node from being evicted, until it is given back to the cache.
#[derive(Debug)]
#[must_use = "pages stay protected until the guard is released"]
pub struct PrefixGuard {
    node: NodeId,
}

/// What a look-up found.
#[derive(Debug)]
pub struct PrefixMatch {
    /// Pages of the matched tokens, in order.
    pub pages: Vec<PageId>,
    /// Matched tokens: whole pages, and fewer than were asked for.
    pub tokens: usize,
    /// Protects them.
    pub guard: PrefixGuard,
}

/// Counts of pages and tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheStats {
    /// All pages.
    pub total_pages: usize,
    /// Pages that nobody uses.
    pub free_pages: usize,
    /// Pages in the tree that can be evicted.
    pub evictable_pages: usize,
    /// Pages in the tree that running sequences protect.
    pub protected_pages: usize,
    /// Tokens looked up.
    pub lookup_tokens: u64,
    /// Those of them found.
    pub hit_tokens: u64,
}

/// Where a walk down the tree ended.
struct Walk {
    node: NodeId,
    matched: usize,
    /// If a stored sequence was matched to its end: the time since its last use.
    leaf_age: Option<u64>,
}

// === impl RadixCache ===

impl RadixCache {
    /// An empty tree over `num_pages` pages of `page_size` tokens.
    ///
    /// # Panics
    /// `page_size` 0.
    pub fn new(num_pages: usize, page_size: usize) -> Self {
        assert!(page_size > 0, "a page holds at least one token");
        Self {
            page_size,
            pool: PagePool::new(num_pages),
            nodes: Nodes::default(),
            roots: HashMap::new(),
            evictable_leaves: BTreeSet::new(),
            clock: 0,
            reuse: ReuseIntervals::default(),
            evicted: Evicted::default(),
            cached_pages: 0,
            protected_pages: 0,
            lookup_tokens: 0,
            hit_tokens: 0,
        }
    }

    /// Tokens per page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Finds the longest cached prefix and protects it.
    ///
    /// Only whole pages match, and at most `tokens.len() - 1` tokens, so that one is left to compute.
    pub fn match_prefix(&mut self, namespace: u64, tokens: &[u32]) -> PrefixMatch {
        let key = &tokens[..self.matchable(tokens.len())];
        let root = self.root(namespace);
        let mut pages = Vec::with_capacity(key.len() / self.page_size);
        let Walk {
            node,
            matched,
            leaf_age,
        } = self.walk(root, key, &mut pages);
        // The age of the sequence that is used again, whether it is still here or was evicted meanwhile.
        let age = leaf_age.or_else(|| {
            let first_page = key.get(matched..matched + self.page_size)?;
            Some(self.clock - self.evicted.recall(node, first_page)?)
        });
        if let Some(age) = age {
            self.reuse.note(age);
        }
        self.lookup_tokens += tokens.len() as u64;
        self.hit_tokens += matched as u64;
        PrefixMatch {
            pages,
            tokens: matched,
            guard: self.lock(node),
        }
    }

    /// How many tokens [`Self::match_prefix`] would find; nothing is changed.
    pub fn peek_prefix(&self, namespace: u64, tokens: &[u32]) -> usize {
        let Some(&root) = self.roots.get(&namespace) else {
            return 0;
        };
        let key = &tokens[..self.matchable(tokens.len())];
        let (mut at, mut matched) = (root, 0);
        while let Some(child) = self.child(at, &key[matched..]) {
            let common = self.common(child, &key[matched..]);
            matched += common;
            if common < self.nodes[child].tokens.len() {
                break;
            }
            at = child;
        }
        matched
    }

    /// Puts the KV of `tokens` (whole pages) into the tree of the guard's namespace.
    ///
    /// `pages` holds one page per `page_size` tokens. Where the tree already has a page for the same prefix, the
    /// given one is freed and replaced in `pages` by the tree's, so that the caller's page table stays right.
    /// The guard moves to the end of the inserted path.
    ///
    /// # Panics
    /// Lengths that do not fit each other.
    pub fn insert(&mut self, guard: PrefixGuard, tokens: &[u32], pages: &mut [PageId]) -> PrefixGuard {
        assert_eq!(
            tokens.len(),
            pages.len() * self.page_size,
            "one page per {} tokens",
            self.page_size
        );
        let root = self.root(self.nodes[guard.node].namespace);
        let mut present = Vec::with_capacity(pages.len());
        let Walk { node, matched, .. } = self.walk(root, tokens, &mut present);
        for (page, &canonical) in pages.iter_mut().zip(&present) {
            if *page != canonical {
                self.pool.give(&[*page]);
                *page = canonical;
            }
        }
        let end = match matched == tokens.len() {
            true => node,
            false => self.add_leaf(node, &tokens[matched..], &pages[matched / self.page_size..]),
        };
        let moved = self.lock(end);
        self.release(guard);
        moved
    }

    /// Ends the protection of a path.
    pub fn release(&mut self, guard: PrefixGuard) {
        let mut at = Some(guard.node);
        while let Some(id) = at {
            let node = &mut self.nodes[id];
            at = node.parent;
            node.locks -= 1;
            if node.locks == 0 {
                self.protected_pages -= node.pages.len();
                self.update_evictable(id);
                self.forget_empty_root(id);
            }
        }
    }

    /// Takes `count` pages, evicting if need be; all or none.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<PageId>> {
        let mut pages = Vec::with_capacity(count);
        self.allocate_into(count, &mut pages).then_some(pages)
    }

    /// Like [`Self::allocate`], adding to `pages`.
    pub fn allocate_into(&mut self, count: usize, pages: &mut Vec<PageId>) -> bool {
        if count > self.available() {
            return false;
        }
        if let missing @ 1.. = count.saturating_sub(self.pool.available()) {
            self.evict(missing);
        }
        self.pool.take(count, pages)
    }

    /// Gives back pages that are not in the tree.
    pub fn free(&mut self, pages: &[PageId]) {
        self.pool.give(pages);
    }

    /// Evicts `count` pages, or all that can be; returns how many. Least recently used leaves go first, but see
    /// `pop_victim`.
    pub fn evict(&mut self, count: usize) -> usize {
        let mut evicted = 0;
        while evicted < count {
            let Some(leaf) = self.pop_victim() else { break };
            // Only as many pages as needed: the end of an edge goes first.
            let wanted = count - evicted;
            let len = self.nodes[leaf].pages.len();
            evicted += if wanted < len {
                self.shorten(leaf, wanted)
            } else {
                self.remove_leaf(leaf)
            };
        }
        evicted
    }

    /// Takes the leaf to evict next off the list: the one used least recently, unless sequences come back at
    /// regular intervals and not even that one is overdue. Then all of them will come back, the one just used
    /// last of all, and that one goes (Belady's rule on the predicted next use); least recently used would evict
    /// each sequence just before its turn, and find none.
    fn pop_victim(&mut self) -> Option<NodeId> {
        let &(oldest, _) = self.evictable_leaves.first()?;
        let age = (self.clock - oldest) as f64;
        let victim = match self.reuse.overdue_after() {
            Some(limit) if age <= limit => self.evictable_leaves.pop_last(),
            _ => self.evictable_leaves.pop_first(),
        };
        victim.map(|(_, leaf)| leaf)
    }

    /// Pages that can be had: free ones and those that can be evicted.
    pub fn available(&self) -> usize {
        self.pool.available() + self.cached_pages - self.protected_pages
    }

    /// Counts.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            total_pages: self.pool.total(),
            free_pages: self.pool.available(),
            evictable_pages: self.cached_pages - self.protected_pages,
            protected_pages: self.protected_pages,
            lookup_tokens: self.lookup_tokens,
            hit_tokens: self.hit_tokens,
        }
    }

    fn matchable(&self, tokens: usize) -> usize {
        tokens.saturating_sub(1) / self.page_size * self.page_size
    }

    fn root(&mut self, namespace: u64) -> NodeId {
        let nodes = &mut self.nodes;
        *self
            .roots
            .entry(namespace)
            .or_insert_with(|| nodes.add(Node::root(namespace)))
    }

    /// Drops the root of a namespace that nobody uses any more: there may be any number of namespaces over time.
    fn forget_empty_root(&mut self, id: NodeId) {
        let node = &self.nodes[id];
        if node.parent.is_none() && node.locks == 0 && node.children.is_empty() {
            self.roots.remove(&node.namespace);
            self.nodes.remove(id);
        }
    }

    /// Follows `key` down from `root`, splitting an edge that it leaves half way, and counts as a use.
    fn walk(&mut self, root: NodeId, key: &[u32], pages: &mut Vec<PageId>) -> Walk {
        self.clock += 1;
        let (mut at, mut matched, mut leaf_age) = (root, 0, None);
        while let Some(child) = self.child(at, &key[matched..]) {
            let common = self.common(child, &key[matched..]);
            matched += common;
            at = if common < self.nodes[child].tokens.len() {
                self.split(child, common)
            } else {
                let whole = &self.nodes[child];
                leaf_age = whole.children.is_empty().then(|| self.clock - whole.last_use);
                child
            };
            self.touch(at);
            pages.extend_from_slice(&self.nodes[at].pages);
        }
        Walk {
            node: at,
            matched,
            leaf_age,
        }
    }

    /// The child whose edge starts with the first page of `key`.
    fn child(&self, parent: NodeId, key: &[u32]) -> Option<NodeId> {
        self.nodes[parent]
            .children
            .get(key.get(..self.page_size)?)
            .copied()
    }

    /// Tokens that a node's edge has in common with `key`, in whole pages.
    fn common(&self, node: NodeId, key: &[u32]) -> usize {
        common_prefix(&self.nodes[node].tokens, key) / self.page_size * self.page_size
    }

    /// Cuts an edge after `at` tokens. The new upper node shares the locks; the lower one keeps its id, which
    /// guards hold.
    fn split(&mut self, lower: NodeId, at: usize) -> NodeId {
        let node = &mut self.nodes[lower];
        let rest_tokens = node.tokens.split_off(at);
        let rest_pages = node.pages.split_off(at / self.page_size);
        let upper = Node {
            parent: node.parent,
            namespace: node.namespace,
            tokens: std::mem::replace(&mut node.tokens, rest_tokens),
            pages: std::mem::replace(&mut node.pages, rest_pages),
            children: HashMap::new(),
            locks: node.locks,
            last_use: node.last_use,
        };
        let parent = node.parent.expect("a root has no edge to split");
        let upper = self.nodes.add(upper);
        self.nodes[lower].parent = Some(upper);
        let first: Box<[u32]> = self.nodes[lower].tokens[..self.page_size].into();
        self.nodes[upper].children.insert(first, lower);
        let first: Box<[u32]> = self.nodes[upper].tokens[..self.page_size].into();
        self.nodes[parent].children.insert(first, upper);
        upper
    }

    fn add_leaf(&mut self, parent: NodeId, tokens: &[u32], pages: &[PageId]) -> NodeId {
        let leaf = Node {
            parent: Some(parent),
            namespace: self.nodes[parent].namespace,
            tokens: tokens.to_vec(),
            pages: pages.to_vec(),
            children: HashMap::new(),
            locks: 0,
            last_use: self.clock,
        };
        self.cached_pages += pages.len();
        let leaf = self.nodes.add(leaf);
        // The parent is a leaf no longer.
        self.evictable_leaves
            .remove(&(self.nodes[parent].last_use, parent));
        self.nodes[parent]
            .children
            .insert(tokens[..self.page_size].into(), leaf);
        self.update_evictable(leaf);
        leaf
    }

    fn remove_leaf(&mut self, leaf: NodeId) -> usize {
        let node = self.nodes.remove(leaf);
        self.cached_pages -= node.pages.len();
        self.pool.give(&node.pages);
        if let Some(parent) = node.parent {
            let first_page = &node.tokens[..self.page_size];
            self.evicted.remember(parent, first_page, node.last_use);
            self.nodes[parent].children.remove(first_page);
            self.update_evictable(parent);
            self.forget_empty_root(parent);
        }
        node.pages.len()
    }

    /// Takes the last `count` pages off an unlocked leaf's edge.
    fn shorten(&mut self, leaf: NodeId, count: usize) -> usize {
        let node = &mut self.nodes[leaf];
        let left = node.pages.len() - count;
        node.tokens.truncate(left * self.page_size);
        let gone = node.pages.split_off(left);
        self.cached_pages -= gone.len();
        self.pool.give(&gone);
        self.update_evictable(leaf);
        gone.len()
    }

    fn lock(&mut self, node: NodeId) -> PrefixGuard {
        let mut at = Some(node);
        while let Some(id) = at {
            let locked = &mut self.nodes[id];
            locked.locks += 1;
            at = locked.parent;
            if locked.locks == 1 {
                self.protected_pages += locked.pages.len();
                if locked.children.is_empty() {
                    self.evictable_leaves.remove(&(locked.last_use, id));
                }
            }
        }
        PrefixGuard { node }
    }

    fn touch(&mut self, id: NodeId) {
        let node = &mut self.nodes[id];
        let listed = node.is_evictable() && self.evictable_leaves.remove(&(node.last_use, id));
        node.last_use = self.clock;
        if listed {
            self.evictable_leaves.insert((self.clock, id));
        }
    }

    /// Lists a node among the evictable leaves if it is one.
    fn update_evictable(&mut self, id: NodeId) {
        let node = &self.nodes[id];
        if node.is_evictable() {
            self.evictable_leaves.insert((node.last_use, id));
        }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        node::check(self)
    }
}

/// How many tokens at the start are the same.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    // Slices of this length are compared at memory speed; only the last one is looked at token by token.
    const BLOCK: usize = 64;
    let len = a.len().min(b.len());
    let blocks = a[..len].chunks_exact(BLOCK).zip(b.chunks_exact(BLOCK));
    let start = blocks.take_while(|(a, b)| a == b).count() * BLOCK;
    let rest = a[start..len].iter().zip(&b[start..len]);
    start + rest.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests;
