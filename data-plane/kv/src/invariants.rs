//! What must hold between two operations, checked from scratch.

use crate::RadixCache;

/// Walks the whole tree: every page has one owner, counts are right, links go both ways, locks add up.
///
/// # Errors
/// The first violation, in words.
pub fn check(cache: &RadixCache) -> Result<(), String> {
    cache.check()
}

/// Like [`check`], for a moment when no sequence runs: then free and evictable pages are all there are.
///
/// # Errors
/// The first violation, in words.
pub fn check_idle(cache: &RadixCache) -> Result<(), String> {
    check(cache)?;
    let stats = cache.stats();
    if stats.protected_pages != 0 || stats.free_pages + stats.evictable_pages != stats.total_pages {
        return Err(format!("pages leaked: {stats:?}"));
    }
    Ok(())
}
