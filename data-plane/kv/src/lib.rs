//! KV pages and the radix tree that shares them between sequences (RadixAttention, arXiv 2312.07104).
//!
//! ```text
//!            match_prefix ──▶ pages to reuse, path locked
//! free pages ──allocate──▶ a sequence's own pages ──insert──▶ tree (duplicates freed, table rewritten)
//!      ▲                                                        │
//!      └──────────────── evict: unlocked leaves, oldest first ──┘
//! ```
//!
//! Page ids stand for memory that belongs to somebody else: this crate does no I/O, reads no clock, and never
//! sees a key or a value. KV of one namespace is never found by another.
//!
//! ```
//! use penstock_kv::RadixCache;
//!
//! let mut cache = RadixCache::new(8, 2);
//! let tokens = [1, 2, 3, 4, 5];
//! let found = cache.match_prefix(0, &tokens);
//! assert_eq!(found.tokens, 0);
//! let mut pages = cache.allocate(3).expect("eight are free");
//! // Whole pages go into the tree; the last token's page stays the sequence's own.
//! let guard = cache.insert(found.guard, &tokens[..4], &mut pages[..2]);
//! cache.release(guard);
//! cache.free(&pages[2..]);
//! assert_eq!(cache.match_prefix(0, &tokens).tokens, 4);
//! ```

mod cache;
pub mod invariants;
mod pool;

pub use cache::{CacheStats, PrefixGuard, PrefixMatch, RadixCache};
pub use pool::{PageId, PagePool};
