use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::invariants;

/// Inserts `tokens` the way a sequence does, and ends it.
fn put(cache: &mut RadixCache, namespace: u64, tokens: &[u32]) {
    let whole = tokens.len() / cache.page_size() * cache.page_size();
    let found = cache.match_prefix(namespace, tokens);
    let mut pages = found.pages.clone();
    let missing = whole / cache.page_size() - pages.len();
    assert!(
        cache.allocate_into(missing, &mut pages),
        "the test's pool is large enough"
    );
    let guard = cache.insert(found.guard, &tokens[..whole], &mut pages);
    invariants::check(cache).unwrap();
    cache.release(guard);
    invariants::check_idle(cache).unwrap();
}

#[test]
fn a_match_leaves_one_token_to_compute() {
    let mut cache = RadixCache::new(8, 2);
    put(&mut cache, 0, &[1, 2, 3, 4]);
    assert_eq!(cache.peek_prefix(0, &[1, 2, 3, 4]), 2);
    assert_eq!(cache.peek_prefix(0, &[1, 2, 3, 4, 5]), 4);
    assert_eq!(cache.peek_prefix(0, &[]), 0);
}

#[test]
fn namespaces_share_nothing() {
    let mut cache = RadixCache::new(8, 1);
    put(&mut cache, 1, &[1, 2, 3]);
    assert_eq!(cache.peek_prefix(2, &[1, 2, 3]), 0);
    assert_eq!(cache.peek_prefix(1, &[1, 2, 3]), 2);
}

#[test]
fn duplicates_are_freed_and_the_table_rewritten() {
    let mut cache = RadixCache::new(8, 2);
    let tokens = [1, 2, 3, 4];
    let (a, b) = (cache.match_prefix(0, &tokens), cache.match_prefix(0, &tokens));
    let mut first = cache.allocate(2).unwrap();
    let mut second = cache.allocate(2).unwrap();
    let a = cache.insert(a.guard, &tokens, &mut first);
    let b = cache.insert(b.guard, &tokens, &mut second);
    assert_eq!(first, second);
    assert_eq!(cache.stats().free_pages, 6);
    cache.release(a);
    cache.release(b);
    invariants::check_idle(&cache).unwrap();
}

#[test]
fn protected_pages_are_never_evicted() {
    let mut cache = RadixCache::new(4, 1);
    put(&mut cache, 0, &[1, 2, 3, 4]);
    let held = cache.match_prefix(0, &[1, 2, 9]);
    assert_eq!(held.tokens, 2);
    assert_eq!(cache.available(), 2);
    assert!(cache.allocate(3).is_none());
    let taken = cache.allocate(2).unwrap();
    assert!(taken.iter().all(|page| !held.pages.contains(page)));
    cache.free(&taken);
    cache.release(held.guard);
    invariants::check_idle(&cache).unwrap();
}

#[test]
fn the_least_recently_used_leaf_goes_first() {
    let mut cache = RadixCache::new(6, 1);
    put(&mut cache, 0, &[1, 10]);
    put(&mut cache, 0, &[2, 20]);
    put(&mut cache, 0, &[3, 30]);
    let used = cache.match_prefix(0, &[1, 10, 0]);
    cache.release(used.guard);
    assert_eq!(cache.evict(2), 2);
    assert_eq!(cache.peek_prefix(0, &[2, 20, 0]), 0);
    assert_eq!(cache.peek_prefix(0, &[1, 10, 0]), 2);
    assert_eq!(cache.peek_prefix(0, &[3, 30, 0]), 2);
}

#[test]
fn sequences_that_take_turns_keep_what_fits() {
    // Ten sequences of four pages come round and round; six fit.
    let mut cache = RadixCache::new(24, 1);
    let tokens: Vec<Vec<u32>> = (0..10).map(|s| (0..5).map(|at| s * 100 + at).collect()).collect();
    let serve = |cache: &mut RadixCache, sequence: usize| {
        let before = cache.stats().hit_tokens;
        put(cache, 0, &tokens[sequence][..4]);
        cache.stats().hit_tokens - before
    };
    let hits: u64 = (0..10)
        .flat_map(|_| 0..10)
        .map(|sequence| serve(&mut cache, sequence))
        .sum();
    // Least recently used would never find anything. Three tokens of each sequence can match, and it takes two
    // rounds to see that they are regular.
    assert!(hits > 7 * 4 * 3, "{hits}");
}

#[test]
fn a_namespace_that_nobody_uses_is_forgotten() {
    let mut cache = RadixCache::new(4, 1);
    for namespace in 0..1000 {
        put(&mut cache, namespace, &[1, 2]);
        let found = cache.match_prefix(namespace + 10_000, &[1, 2]);
        cache.release(found.guard);
    }
    assert!(cache.roots.len() <= 2);
    invariants::check_idle(&cache).unwrap();
}

#[test]
fn a_common_prefix_is_found_wherever_it_ends() {
    let a: Vec<u32> = (0..200).collect();
    for end in [0, 1, 63, 64, 65, 127, 128, 199] {
        let mut b = a.clone();
        b[end] = 1000;
        assert_eq!(common_prefix(&a, &b), end);
        assert_eq!(common_prefix(&a, &a[..end]), end);
        assert_eq!(common_prefix(&a[..end], &a), end);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Start { namespace: u64, tokens: Vec<u32> },
    Commit { sequence: usize },
    Finish { sequence: usize },
    Evict { pages: usize },
}

fn any_step() -> impl Strategy<Value = Step> {
    // Few different tokens, so that prefixes are shared often.
    let tokens = prop::collection::vec(0u32..3, 0..24);
    prop_oneof![
        4 => (0u64..2, tokens).prop_map(|(namespace, tokens)| Step::Start { namespace, tokens }),
        3 => any::<prop::sample::Index>().prop_map(|i| Step::Commit { sequence: i.index(64) }),
        3 => any::<prop::sample::Index>().prop_map(|i| Step::Finish { sequence: i.index(64) }),
        1 => (0usize..8).prop_map(|pages| Step::Evict { pages }),
    ]
}

struct Live {
    namespace: u64,
    tokens: Vec<u32>,
    pages: Vec<PageId>,
    guard: PrefixGuard,
}

/// What each page holds, as the naive model sees it: the namespace and the whole prefix up to its end.
type Contents = HashMap<PageId, (u64, Vec<u32>)>;

fn note(contents: &mut Contents, live: &Live, page_size: usize) {
    for (index, page) in live.pages.iter().enumerate() {
        let end = ((index + 1) * page_size).min(live.tokens.len());
        contents.insert(*page, (live.namespace, live.tokens[..end].to_vec()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Against a naive model that knows what was written into each page: whatever is matched holds exactly the
    /// prefix asked for.
    #[test]
    fn any_history_keeps_every_page_right(
        steps in prop::collection::vec(any_step(), 1..80),
        page_size in prop::sample::select(vec![1usize, 2, 16]),
    ) {
        let mut cache = RadixCache::new(40, page_size);
        let mut contents = Contents::new();
        let mut live: Vec<Live> = Vec::new();
        for step in steps {
            match step {
                Step::Start { namespace, tokens } => {
                    let peeked = cache.peek_prefix(namespace, &tokens);
                    let found = cache.match_prefix(namespace, &tokens);
                    prop_assert_eq!(peeked, found.tokens);
                    prop_assert!(found.tokens < tokens.len().max(1));
                    for (index, page) in found.pages.iter().enumerate() {
                        let expected = (namespace, tokens[..(index + 1) * page_size].to_vec());
                        prop_assert_eq!(contents.get(page), Some(&expected));
                    }
                    let needed = tokens.len().div_ceil(page_size) - found.pages.len();
                    let mut pages = found.pages;
                    if cache.allocate_into(needed, &mut pages) {
                        let sequence = Live { namespace, tokens, pages, guard: found.guard };
                        note(&mut contents, &sequence, page_size);
                        live.push(sequence);
                    } else {
                        cache.release(found.guard);
                    }
                }
                Step::Commit { sequence } if !live.is_empty() => {
                    let index = sequence % live.len();
                    let mut one = live.swap_remove(index);
                    let whole = one.tokens.len() / page_size;
                    one.guard = cache.insert(one.guard, &one.tokens[..whole * page_size], &mut one.pages[..whole]);
                    for (index, page) in one.pages[..whole].iter().enumerate() {
                        let expected = (one.namespace, one.tokens[..(index + 1) * page_size].to_vec());
                        prop_assert_eq!(contents.get(page), Some(&expected));
                    }
                    live.push(one);
                }
                Step::Finish { sequence } if !live.is_empty() => {
                    let mut one = live.swap_remove(sequence % live.len());
                    let whole = one.tokens.len() / page_size;
                    let guard = cache.insert(one.guard, &one.tokens[..whole * page_size], &mut one.pages[..whole]);
                    cache.free(&one.pages[whole..]);
                    cache.release(guard);
                }
                Step::Evict { pages } => {
                    let evictable = cache.stats().evictable_pages;
                    prop_assert_eq!(cache.evict(pages), pages.min(evictable));
                }
                Step::Commit { .. } | Step::Finish { .. } => {}
            }
            if let Err(violation) = invariants::check(&cache) {
                return Err(TestCaseError::fail(violation));
            }
        }
        for one in live {
            let found = one.pages.len();
            let mut pages = one.pages;
            let whole = one.tokens.len() / page_size;
            let guard = cache.insert(one.guard, &one.tokens[..whole * page_size], &mut pages[..whole]);
            cache.free(&pages[whole..found]);
            cache.release(guard);
        }
        if let Err(violation) = invariants::check_idle(&cache) {
            return Err(TestCaseError::fail(violation));
        }
    }
}
