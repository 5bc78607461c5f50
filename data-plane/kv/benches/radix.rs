//! Times of single operations and hit rates over chat traces, printed as two tables.
//!
//! `cargo bench -p penstock-kv`. The traces are made from a hash, so that any other prefix cache can be measured
//! on the very same tokens.

#![allow(clippy::print_stdout, reason = "its tables are what it is for")]

use std::{hint::black_box, time::Instant};

use penstock_kv::{RadixCache, invariants};

const VOCAB_SIZE: u64 = 151_936;
const SEQUENCES: u64 = 1000;
const LENGTH: u64 = 2048;
const CONVERSATIONS: u64 = 64;
const TURNS: u64 = 6;
const SYSTEM: u64 = 300;
const USER: u64 = 120;
const REPLY: u64 = 80;

fn main() {
    println!("median us      insert  full hit  partial hit  insert again  evict {LENGTH} tokens");
    for page_size in [1, 16] {
        let [insert, full, partial, again, evict] = micro(page_size).map(|mut times| median(&mut times));
        println!(
            "page {page_size:>2}      {insert:>9.2} {full:>9.2} {partial:>12.2} {again:>13.2} {evict:>12.2}"
        );
    }
    println!();
    println!("hit rate            25 %    50 %    75 %   100 % of the trace's tokens");
    let unique = (SYSTEM + CONVERSATIONS * TURNS * (USER + REPLY)) as usize;
    for (name, order) in [
        ("random", random()),
        ("turns", by_turn()),
        ("convs", by_conversation()),
    ] {
        for page_size in [1, 16] {
            let rate = |share| chat(&order, page_size, unique * share / 100 / page_size);
            let [a, b, c, d] = [25, 50, 75, 100].map(rate);
            println!("{name:<6} page {page_size:>2}   {a:.4}  {b:.4}  {c:.4}  {d:.4}");
        }
    }
}

fn splitmix64(state: u64) -> u64 {
    let x = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Tokens `range` of a stream.
fn tokens(stream: u64, range: std::ops::Range<u64>) -> impl Iterator<Item = u32> {
    range.map(move |at| (splitmix64((stream << 32).wrapping_add(at)) % VOCAB_SIZE) as u32)
}

/// The first `shared` tokens of one of 20 base streams, then those of `own`.
fn forked(index: u64, shared: [u64; 6], own: u64) -> Vec<u32> {
    let shared = shared[(index / 20 % 6) as usize];
    tokens(index % 20, 0..shared)
        .chain(tokens(own, shared..LENGTH))
        .collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Microseconds of each operation: insert, match in full, match in part, insert again, evict.
fn micro(page_size: usize) -> [Vec<f64>; 5] {
    let inserted: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|i| forked(i, [0, 256, 512, 1024, 1536, 1920], 1000 + i))
        .collect();
    let probes: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|i| forked(i, [128, 384, 768, 1280, 1728, 2000], 1_000_000 + i))
        .collect();
    let mut cache = RadixCache::new((SEQUENCES + 1) as usize * LENGTH as usize / page_size, page_size);
    let insert = inserted.iter().map(|tokens| insert(&mut cache, tokens)).collect();
    let full = inserted.iter().map(|tokens| find(&mut cache, tokens)).collect();
    let partial = probes.iter().map(|tokens| find(&mut cache, tokens)).collect();
    let again = inserted
        .iter()
        .map(|tokens| self::insert(&mut cache, tokens))
        .collect();
    let mut evict = Vec::new();
    while cache.stats().evictable_pages > 0 {
        let start = Instant::now();
        black_box(cache.evict(LENGTH as usize / page_size));
        evict.push(start.elapsed().as_secs_f64() * 1e6);
    }
    invariants::check_idle(&cache).expect("no page is lost");
    [insert, full, partial, again, evict]
}

/// Time to insert a sequence all of whose pages were computed anew.
fn insert(cache: &mut RadixCache, tokens: &[u32]) -> f64 {
    // What a sequence without a match holds before it commits; not timed.
    let none = cache.match_prefix(0, &[]);
    let mut pages = cache
        .allocate(tokens.len() / cache.page_size())
        .expect("the pool holds all sequences");
    let start = Instant::now();
    let guard = cache.insert(none.guard, tokens, &mut pages);
    cache.release(guard);
    start.elapsed().as_secs_f64() * 1e6
}

fn find(cache: &mut RadixCache, tokens: &[u32]) -> f64 {
    let start = Instant::now();
    let found = black_box(cache.match_prefix(0, tokens));
    cache.release(found.guard);
    start.elapsed().as_secs_f64() * 1e6
}

/// Share of prompt tokens found when the turns of `order` are served one at a time over `num_pages` pages.
fn chat(order: &[(u64, u64)], page_size: usize, num_pages: usize) -> f64 {
    let mut cache = RadixCache::new(num_pages, page_size);
    let (mut hit, mut asked) = (0, 0);
    for &(conversation, turn) in order {
        let past = turn * (USER + REPLY);
        let until = |end| {
            tokens(0, 0..SYSTEM)
                .chain(tokens(1 + conversation, 0..end))
                .collect::<Vec<u32>>()
        };
        let prompt = until(past + USER);
        let whole = until(past + USER + REPLY);
        let found = cache.match_prefix(0, &prompt);
        (hit, asked) = (hit + found.tokens, asked + prompt.len());
        let mut pages = found.pages;
        let missing = whole.len().div_ceil(page_size) - pages.len();
        if !cache.allocate_into(missing, &mut pages) {
            cache.release(found.guard);
            continue;
        }
        // The last token's KV is never computed.
        let committed = (whole.len() - 1) / page_size;
        let guard = cache.insert(
            found.guard,
            &whole[..committed * page_size],
            &mut pages[..committed],
        );
        cache.free(&pages[committed..]);
        cache.release(guard);
    }
    invariants::check_idle(&cache).expect("no page is lost");
    hit as f64 / asked as f64
}

fn by_turn() -> Vec<(u64, u64)> {
    (0..TURNS)
        .flat_map(|turn| (0..CONVERSATIONS).map(move |c| (c, turn)))
        .collect()
}

fn by_conversation() -> Vec<(u64, u64)> {
    (0..CONVERSATIONS)
        .flat_map(|c| (0..TURNS).map(move |turn| (c, turn)))
        .collect()
}

/// At each step the next turn of a conversation drawn from those that have turns left.
fn random() -> Vec<(u64, u64)> {
    let mut left: Vec<u64> = (0..CONVERSATIONS).collect();
    let mut done = [0; CONVERSATIONS as usize];
    let mut order = Vec::new();
    for draw in 0.. {
        if left.is_empty() {
            break;
        }
        let at = (splitmix64((1 << 40) + draw) % left.len() as u64) as usize;
        let conversation = left[at];
        order.push((conversation, done[conversation as usize]));
        done[conversation as usize] += 1;
        if done[conversation as usize] == TURNS {
            left.remove(at);
        }
    }
    order
}
