//! Hashes of a prompt's beginnings.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The smallest chunk in bytes: about 32 tokens of text.
const CHUNK: usize = 128;
/// A chunk is at least this part of what stands before it, so that long prompts have few.
const GROWTH: usize = 16;
/// Heads are told apart by so many bytes: prompts with a longer beginning in common belong together.
const ANCHOR: usize = 8 << 10;

/// The hash of a prompt up to each end of a chunk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prefix {
    /// Hash and length in bytes, growing.
    nodes: Vec<(u64, usize)>,
    /// Index of the node that tells conversations apart.
    head: usize,
}

/// Hashes bytes for use by every gateway alike.
pub fn hash(seed: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, seed)
}

// === impl Prefix ===

impl Prefix {
    /// Of `input`, whose first `head` bytes tell conversations apart.
    pub fn of(input: &[u8], head: usize, namespace: u64) -> Self {
        let mut prefix = Self::default();
        let head = head.min(ANCHOR).min(input.len());
        let (mut sofar, mut from) = (namespace, 0);
        while from < input.len() {
            let step = (from / GROWTH).next_multiple_of(CHUNK).max(CHUNK);
            let fixed = (from / CHUNK * CHUNK) + step;
            let to = if from < head { fixed.min(head) } else { fixed };
            let Some(chunk) = input.get(from..to) else { break };
            sofar = hash(sofar, chunk);
            prefix.nodes.push((sofar, to));
            if to == head {
                prefix.head = prefix.nodes.len() - 1;
            }
            from = to;
        }
        prefix
    }

    /// Hash and length in bytes of each beginning, shortest first.
    pub fn nodes(&self) -> &[(u64, usize)] {
        &self.nodes
    }

    /// Who knows the prompt up to here, in bytes, knows the conversation.
    pub fn head(&self) -> usize {
        self.nodes.get(self.head).map_or(0, |&(_, bytes)| bytes)
    }

    /// What ranks the workers for a conversation that nobody knows.
    pub fn anchor(&self) -> Option<u64> {
        self.nodes.get(self.head).map(|&(hash, _)| hash)
    }
}
