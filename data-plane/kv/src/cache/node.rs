//! Nodes of the tree, in an arena.

use std::{
    collections::{BTreeSet, HashMap},
    ops::{Index, IndexMut},
};

use super::RadixCache;
use crate::PageId;

/// Index of a node in the arena.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NodeId(u32);

/// An edge and what lies below it. Who owns which pages: a node in the tree owns its own; whoever locks the path
/// may read them.
#[derive(Debug)]
pub(super) struct Node {
    /// `None` for a root.
    pub(super) parent: Option<NodeId>,
    /// Whose KV it is.
    pub(super) namespace: u64,
    /// Tokens of the edge: whole pages; empty for a root.
    pub(super) tokens: Vec<u32>,
    /// One page per `page_size` tokens.
    pub(super) pages: Vec<PageId>,
    /// By the first page of their edges.
    pub(super) children: HashMap<Box<[u32]>, NodeId>,
    /// Guards at this node or below.
    pub(super) locks: u32,
    /// Value of the clock at the last use.
    pub(super) last_use: u64,
}

/// The arena.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    slots: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
}

// === impl Node ===

impl Node {
    pub(super) fn root(namespace: u64) -> Self {
        Self {
            parent: None,
            namespace,
            tokens: Vec::new(),
            pages: Vec::new(),
            children: HashMap::new(),
            locks: 0,
            last_use: 0,
        }
    }

    /// An unlocked leaf, which eviction may take.
    pub(super) fn is_evictable(&self) -> bool {
        self.locks == 0 && self.children.is_empty() && self.parent.is_some()
    }
}

// === impl Nodes ===

impl Nodes {
    pub(super) fn add(&mut self, node: Node) -> NodeId {
        if let Some(id) = self.vacant.pop() {
            self.slots[id.0 as usize] = Some(node);
            return id;
        }
        let id = NodeId(u32::try_from(self.slots.len()).expect("a pool has fewer than 2^32 pages"));
        self.slots.push(Some(node));
        id
    }

    pub(super) fn remove(&mut self, id: NodeId) -> Node {
        self.vacant.push(id);
        self.slots[id.0 as usize]
            .take()
            .expect("ids in the tree are of live nodes")
    }

    fn iter(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        let id = |index: usize| NodeId(u32::try_from(index).expect("an index came from an id"));
        self.slots
            .iter()
            .enumerate()
            .filter_map(move |(index, slot)| slot.as_ref().map(|node| (id(index), node)))
    }
}

impl Index<NodeId> for Nodes {
    type Output = Node;

    fn index(&self, id: NodeId) -> &Node {
        self.slots[id.0 as usize]
            .as_ref()
            .expect("ids in the tree are of live nodes")
    }
}

impl IndexMut<NodeId> for Nodes {
    fn index_mut(&mut self, id: NodeId) -> &mut Node {
        self.slots[id.0 as usize]
            .as_mut()
            .expect("ids in the tree are of live nodes")
    }
}

/// Everything that must hold between two operations; see [`crate::invariants`].
pub(super) fn check(cache: &RadixCache) -> Result<(), String> {
    let (mut cached, mut protected) = (0, 0);
    let mut seen: BTreeSet<PageId> = cache.pool.free_pages().iter().copied().collect();
    if seen.len() != cache.pool.available() {
        return Err("a page is free twice".into());
    }
    for (id, node) in cache.nodes.iter() {
        if node.tokens.len() != node.pages.len() * cache.page_size {
            return Err(format!(
                "{id:?} has {} tokens in {} pages",
                node.tokens.len(),
                node.pages.len()
            ));
        }
        if node.parent.is_none() && (node.locks == 0 && node.children.is_empty()) {
            return Err(format!("{id:?} is the root of nothing"));
        }
        if node.parent.is_none() != (cache.roots.get(&node.namespace) == Some(&id)) {
            return Err(format!(
                "{id:?} is not the root of its namespace {}",
                node.namespace
            ));
        }
        if node.parent.is_some() && node.tokens.is_empty() {
            return Err(format!("{id:?} has an empty edge"));
        }
        if let Some(page) = node.pages.iter().find(|page| !seen.insert(**page)) {
            return Err(format!("page {page} of {id:?} has two owners"));
        }
        cached += node.pages.len();
        protected += if node.locks > 0 { node.pages.len() } else { 0 };
        let below: u32 = node
            .children
            .values()
            .map(|child| cache.nodes[*child].locks)
            .sum();
        if node.locks < below {
            return Err(format!("{id:?} has {} locks, its children {below}", node.locks));
        }
        for (first, child) in &node.children {
            let child_node = &cache.nodes[*child];
            if child_node.parent != Some(id)
                || child_node.namespace != node.namespace
                || child_node.tokens[..cache.page_size] != **first
            {
                return Err(format!("{child:?} is not linked both ways"));
            }
        }
        if node.is_evictable() != cache.evictable_leaves.contains(&(node.last_use, id)) {
            return Err(format!("{id:?} is listed wrongly among the evictable leaves"));
        }
    }
    if (cached, protected) != (cache.cached_pages, cache.protected_pages) {
        return Err(format!(
            "counted {cached} cached and {protected} protected pages, kept {} and {}",
            cache.cached_pages, cache.protected_pages
        ));
    }
    Ok(())
}
