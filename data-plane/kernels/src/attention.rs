//! Causal attention over a paged cache, for prefill chunks and decodes alike.
//!
//! Keys and values are visited in blocks of 64 positions, counted from the sequence's start, with the running maximum
//! and sum of Milakov and Gimelshein 2018 (arXiv 1805.02867). The query heads that share a key head are rows of one
//! tile, so that each key is read once for all of them. A row's sums are taken in the same order whatever tile it is
//! in, so a token's output does not depend on how the prompt was cut into chunks.
//!
//! With a sliding window, blocks that no row of a tile sees are skipped, and positions before the first row's window
//! are never read: their pages may hold anything.
//!
//! A bf16 cache on a machine with AMX goes through tiles; see [`amx`].

#[cfg(target_arch = "x86_64")]
mod amx;

use std::{cell::RefCell, iter::StepBy, ops::Range};

use crate::{
    Cpu,
    buffer::Buffer,
    lanes::{LANES, Lanes, multiversion},
    rope::{CacheElement, CacheShape, QkvShape},
    shared::SharedMut,
};

/// Positions of a block.
const BLOCK: usize = 64;
/// Rows of a tile: query positions times the query heads of a group.
const TILE_ROWS: usize = 32;

/// One sequence of a ragged batch.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSequence<'a> {
    /// Its first row.
    pub query_start: usize,
    /// Its rows: the last `query_len` of its `context_len` positions.
    pub query_len: usize,
    /// Positions in the cache, those of the rows included.
    pub context_len: usize,
    /// Its pages.
    pub pages: &'a [u32],
}

/// What [`attention`] works on.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Widths of a row of q, k and v.
    pub qkv: QkvShape,
    /// Shape of the cache.
    pub cache: CacheShape,
    /// Factor of the scores.
    pub scale: f32,
    /// Positions that a token sees, its own included and at least 1; `None`: all up to its own.
    pub window: Option<usize>,
    /// The sequences.
    pub sequences: &'a [AttentionSequence<'a>],
}

/// Rows of one key head that make a tile.
struct Tile<'a> {
    sequence: AttentionSequence<'a>,
    kv_head: usize,
    /// Among the sequence's rows times the heads of a group.
    first: usize,
    count: usize,
}

/// A tile's working memory.
struct Scratch {
    /// `[rows][head_dim]`, scaled.
    queries: Buffer<f32>,
    /// `[head_dim][64]`.
    keys: Buffer<f32>,
    /// `[64][padded head_dim]`.
    values: Buffer<f32>,
    /// `[rows][64]`.
    scores: Buffer<f32>,
    /// `[rows][padded head_dim]`.
    sums: Buffer<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        queries: Buffer::zeroed(0),
        keys: Buffer::zeroed(0),
        values: Buffer::zeroed(0),
        scores: Buffer::zeroed(0),
        sums: Buffer::zeroed(0),
    });
}

/// Attends the queries in `qkv` (`[rows, qkv width]`, rotated) to the cache; `y` becomes `[rows, heads · head_dim]`.
///
/// # Panics
/// A slice has another length than the shapes say, or a sequence does not fit into its rows or pages.
#[allow(
    private_bounds,
    reason = "the cache's elements are f32 and bf16, and no others"
)]
pub fn attention<T: CacheElement>(cpu: Cpu, y: &mut [f32], qkv: &[f32], cache: &[T], call: &Attention<'_>) {
    let QkvShape {
        heads,
        kv_heads,
        head_dim,
    } = call.qkv;
    let rows = qkv.len() / call.qkv.width();
    assert!(
        qkv.len() == rows * call.qkv.width() && y.len() == rows * heads * head_dim,
        "y has a row for each of qkv"
    );
    assert!(cache.len() == call.cache.elements(), "the cache has its shape");
    assert!(
        call.cache.kv_heads == kv_heads && call.cache.head_dim == head_dim,
        "the cache is this model's"
    );
    assert!(call.window != Some(0), "a token sees itself");
    let mut covered = 0;
    for sequence in call.sequences {
        // In order and apart, so that no two tiles write one row.
        assert!(
            sequence.query_start >= covered,
            "sequences lie one after the other"
        );
        covered = sequence.query_start + sequence.query_len;
        assert!(
            covered <= rows && sequence.query_len <= sequence.context_len,
            "a sequence lies in the batch"
        );
        assert!(
            sequence.pages.len() * call.cache.page_size >= sequence.context_len,
            "pages hold the context"
        );
        assert!(
            sequence
                .pages
                .iter()
                .all(|&page| (page as usize) < call.cache.num_pages),
            "pages lie in the cache"
        );
    }
    let group = heads / kv_heads;
    #[cfg(target_arch = "x86_64")]
    let in_tiles = T::as_bf16(cache).filter(|_| cpu.isa.level() == crate::isa::Level::Amx && amx::fits(call));
    #[cfg(target_arch = "x86_64")]
    let tile_rows = if in_tiles.is_some() {
        amx::TILE_ROWS
    } else {
        TILE_ROWS
    };
    #[cfg(not(target_arch = "x86_64"))]
    let tile_rows = TILE_ROWS;
    let tiles_of =
        |sequence: &AttentionSequence<'_>| (sequence.query_len * group).div_ceil(tile_rows) * kv_heads;
    let work: usize = call
        .sequences
        .iter()
        .map(|s| s.query_len * s.context_len.min(call.window.unwrap_or(usize::MAX)))
        .sum::<usize>()
        * heads
        * head_dim;
    let tiles: usize = call.sequences.iter().map(tiles_of).sum();
    let y = SharedMut::new(y);
    let run = |index: usize| {
        let mut index = index;
        for sequence in call.sequences {
            let tiles = tiles_of(sequence);
            if index < tiles {
                let first = index / kv_heads * tile_rows;
                let count = tile_rows.min(sequence.query_len * group - first);
                let tile = Tile {
                    sequence: *sequence,
                    kv_head: index % kv_heads,
                    first,
                    count,
                };
                #[cfg(target_arch = "x86_64")]
                if let Some(cache) = in_tiles {
                    // SAFETY: the machine has tiles, the call is checked, and a tile's rows are its own.
                    return unsafe { amx::attend_tile(&tile, &y, qkv, cache, call) };
                }
                return attend_tile(cpu, &tile, &y, qkv, cache, call);
            }
            index -= tiles;
        }
    };
    // Multiply-adds that are worth a task of their own.
    const TASK_WORK: usize = 1 << 17;
    if work < TASK_WORK {
        (0..tiles).for_each(run)
    } else {
        cpu.pool.run(tiles, &run)
    }
}

fn attend_tile<T: CacheElement>(
    cpu: Cpu,
    tile: &Tile<'_>,
    y: &SharedMut<'_, f32>,
    qkv: &[f32],
    cache: &[T],
    call: &Attention<'_>,
) {
    let head_dim = call.qkv.head_dim;
    let padded = head_dim.next_multiple_of(LANES);
    SCRATCH.with_borrow_mut(|scratch| {
        let queries = scratch.queries.at_least(TILE_ROWS * head_dim);
        let keys = scratch.keys.at_least(head_dim * BLOCK);
        let values = scratch.values.at_least(BLOCK * padded);
        let scores = scratch.scores.at_least(TILE_ROWS * BLOCK);
        let sums = scratch.sums.at_least(TILE_ROWS * padded);
        load_queries(queries, tile, qkv, call);
        sums.fill(0.0);
        let mut state = State {
            largest: [f32::NEG_INFINITY; TILE_ROWS],
            total: [0.0; TILE_ROWS],
        };
        let seen = tile.seen(call);
        for start in tile.blocks(call) {
            let here = seen.start.saturating_sub(start)..BLOCK.min(seen.end - start);
            let count = here.end;
            load_block(keys, values, padded, tile, start, here, cache, call);
            let mut limits = [(0, 0); TILE_ROWS];
            for (row, limits) in limits.iter_mut().enumerate().take(tile.count) {
                *limits = tile.seen_in_block(row, start, call);
            }
            let block = Block {
                queries,
                keys,
                values,
                head_dim,
                padded,
                count,
                limits: &limits[..tile.count],
            };
            // SAFETY: the scratch slices have the sizes that `Block` states.
            unsafe { attend_block(cpu.isa, &block, scores, sums, &mut state) };
        }
        for row in 0..tile.count {
            let (token, head) = tile.token_and_head(row, call);
            // SAFETY: a row and head belong to one tile.
            let y = unsafe { y.part((token * call.qkv.heads + head) * head_dim, head_dim) };
            for (y, sum) in y.iter_mut().zip(&sums[row * padded..]) {
                *y = sum / state.total[row];
            }
        }
    });
}

// === impl Tile ===

impl Tile<'_> {
    /// Row of the batch and query head of a row of the tile.
    fn token_and_head(&self, row: usize, call: &Attention<'_>) -> (usize, usize) {
        let group = call.qkv.heads / call.qkv.kv_heads;
        let row = self.first + row;
        (
            self.sequence.query_start + row / group,
            self.kv_head * group + row % group,
        )
    }

    /// The end of what a row of the tile sees: one past its own position.
    fn limit(&self, row: usize, call: &Attention<'_>) -> usize {
        let group = call.qkv.heads / call.qkv.kv_heads;
        self.sequence.context_len - self.sequence.query_len + (self.first + row) / group + 1
    }

    /// The first position that a row of the tile sees.
    fn first_seen(&self, row: usize, call: &Attention<'_>) -> usize {
        self.limit(row, call)
            .saturating_sub(call.window.unwrap_or(usize::MAX))
    }

    /// Positions that at least one row sees. Rows are in the order of their positions.
    fn seen(&self, call: &Attention<'_>) -> Range<usize> {
        self.first_seen(0, call)..self.limit(self.count - 1, call)
    }

    /// Starts of the blocks that at least one row sees.
    fn blocks(&self, call: &Attention<'_>) -> StepBy<Range<usize>> {
        let seen = self.seen(call);
        (seen.start / BLOCK * BLOCK..seen.end).step_by(BLOCK)
    }

    /// Which positions of the block from `start` on a row sees: from the first up to the second, none where they are
    /// equal.
    fn seen_in_block(&self, row: usize, start: usize, call: &Attention<'_>) -> (usize, usize) {
        let until = self.limit(row, call).saturating_sub(start).min(BLOCK);
        let from = self.first_seen(row, call).saturating_sub(start).min(until);
        (from, until)
    }
}

fn load_queries(queries: &mut [f32], tile: &Tile<'_>, qkv: &[f32], call: &Attention<'_>) {
    let head_dim = call.qkv.head_dim;
    for (row, query) in queries.chunks_exact_mut(head_dim).enumerate().take(tile.count) {
        let (token, head) = tile.token_and_head(row, call);
        let from = &qkv[token * call.qkv.width() + head * head_dim..][..head_dim];
        for (query, from) in query.iter_mut().zip(from) {
            *query = from * call.scale;
        }
    }
}

/// Gathers the positions `here` of the block from `start` on, as f32. What lies around them is zero, so that stale
/// pages cannot matter; values beyond them are not read.
#[allow(clippy::too_many_arguments, reason = "two outputs and where they come from")]
fn load_block<T: CacheElement>(
    keys: &mut [f32],
    values: &mut [f32],
    padded: usize,
    tile: &Tile<'_>,
    start: usize,
    here: Range<usize>,
    cache: &[T],
    call: &Attention<'_>,
) {
    let CacheShape {
        page_size, head_dim, ..
    } = call.cache;
    let (cached_keys, cached_values) = cache.split_at(call.cache.half());
    if here.len() < BLOCK {
        keys.fill(0.0);
        values[..here.start * padded].fill(0.0);
    }
    let mut at = here.start;
    while at < here.end {
        let (page, offset) = ((start + at) / page_size, (start + at) % page_size);
        let len = (page_size - offset).min(here.end - at);
        let head = call
            .cache
            .head_start(tile.sequence.pages[page] as usize, tile.kv_head);
        let from = &cached_keys[head..][..call.cache.head_elements()];
        for (to, from) in keys.chunks_exact_mut(BLOCK).zip(from.chunks_exact(page_size)) {
            for (to, from) in to[at..at + len].iter_mut().zip(&from[offset..]) {
                *to = from.to_f32();
            }
        }
        let from = &cached_values[head + offset * head_dim..][..len * head_dim];
        for (to, from) in values[at * padded..]
            .chunks_exact_mut(padded)
            .zip(from.chunks_exact(head_dim))
        {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.to_f32();
            }
        }
        at += len;
    }
}

/// What a tile attends to in one block.
struct Block<'a> {
    /// `[rows][head_dim]`, scaled.
    queries: &'a [f32],
    /// `[head_dim][64]`.
    keys: &'a [f32],
    /// `[64][padded]`.
    values: &'a [f32],
    head_dim: usize,
    padded: usize,
    /// One past the last position that at least one row sees.
    count: usize,
    /// Where what each row sees begins and ends; as many as there are rows.
    limits: &'a [(usize, usize)],
}

/// Running maximum and sum of each row.
struct State {
    largest: [f32; TILE_ROWS],
    total: [f32; TILE_ROWS],
}

multiversion! {
    /// # Safety
    /// The block's slices have the sizes that it states; `scores` is `[rows][64]`, `sums` `[rows][padded]`.
    fn attend_block = attend_block_body(block: &Block<'_>, scores: &mut [f32], sums: &mut [f32], state: &mut State);
}

/// # Safety
/// As [`Lanes`] and [`attend_block`].
#[inline(always)]
unsafe fn attend_block_body<L: Lanes>(
    block: &Block<'_>,
    scores: &mut [f32],
    sums: &mut [f32],
    state: &mut State,
) {
    let rows = block.limits.len();
    // SAFETY: rows and columns stay below what the caller promises.
    unsafe {
        let mut row = 0;
        if L::MANY_REGISTERS {
            while rows - row >= 4 {
                score_rows::<L, 4>(block, scores, row);
                row += 4;
            }
        }
        while row < rows {
            score_rows::<L, 1>(block, scores, row);
            row += 1;
        }
        for row in 0..rows {
            soften_row::<L>(block, scores, sums, state, row);
        }
        let mut row = 0;
        if L::MANY_REGISTERS {
            while rows - row >= 4 {
                mix_rows::<L, 4>(block, scores, sums, row);
                row += 4;
            }
        }
        while row < rows {
            mix_rows::<L, 1>(block, scores, sums, row);
            row += 1;
        }
    }
}

/// Scores of R rows: queries times keys.
///
/// # Safety
/// As [`attend_block`]; R rows are left.
#[inline(always)]
unsafe fn score_rows<L: Lanes, const R: usize>(block: &Block<'_>, scores: &mut [f32], first: usize) {
    const WIDTH: usize = BLOCK / LANES;
    // SAFETY: queries has R rows from `first` on, keys `head_dim` rows of 64, scores R rows of 64.
    unsafe {
        let queries = block.queries.as_ptr().add(first * block.head_dim);
        let mut sums = [[L::splat(0.0); WIDTH]; R];
        for dim in 0..block.head_dim {
            let keys = block.keys.as_ptr().add(dim * BLOCK);
            let mut lanes = [L::splat(0.0); WIDTH];
            for (at, lanes) in lanes.iter_mut().enumerate() {
                *lanes = L::load(keys.add(at * LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let query = L::splat(*queries.add(row * block.head_dim + dim));
                for (sum, keys) in sums.iter_mut().zip(lanes) {
                    *sum = keys.mul_add(query, *sum);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (at, sum) in sums.iter().enumerate() {
                sum.store(scores.as_mut_ptr().add((first + row) * BLOCK + at * LANES));
            }
        }
    }
}

/// Masks a row's scores, turns them into powers of e against the running maximum, and scales what was summed before.
///
/// # Safety
/// As [`attend_block`].
#[inline(always)]
unsafe fn soften_row<L: Lanes>(
    block: &Block<'_>,
    scores: &mut [f32],
    sums: &mut [f32],
    state: &mut State,
    row: usize,
) {
    let scores = &mut scores[row * BLOCK..][..BLOCK];
    let (from, until) = block.limits[row];
    if from == until {
        // Without a score there is no maximum to measure against.
        return scores.fill(0.0);
    }
    scores[..from].fill(f32::NEG_INFINITY);
    scores[until..].fill(f32::NEG_INFINITY);
    // SAFETY: a row of scores is 64 long, a row of sums a multiple of 16.
    unsafe {
        let mut lanes = L::load(scores.as_ptr());
        for at in (LANES..BLOCK).step_by(LANES) {
            lanes = lanes.max(L::load(scores.as_ptr().add(at)));
        }
        let before = state.largest[row];
        let largest = before.max(lanes.largest());
        let mut total = L::splat(0.0);
        for at in (0..BLOCK).step_by(LANES) {
            let power = L::load(scores.as_ptr().add(at)).sub(L::splat(largest)).exp();
            power.store(scores.as_mut_ptr().add(at));
            total = total.add(power);
        }
        if largest > before {
            let mut factor = [0.0; LANES];
            let factors = L::splat(before - largest).exp();
            factors.store(factor.as_mut_ptr());
            state.total[row] *= factor[0];
            for at in (0..block.padded).step_by(LANES) {
                let sum = sums.as_mut_ptr().add(row * block.padded + at);
                L::load(sum).mul(factors).store(sum);
            }
        }
        state.largest[row] = largest;
        state.total[row] += total.sum();
    }
}

/// Adds the values, weighted by the powers, for R rows.
///
/// # Safety
/// As [`attend_block`]; R rows are left.
#[inline(always)]
unsafe fn mix_rows<L: Lanes, const R: usize>(
    block: &Block<'_>,
    powers: &[f32],
    sums: &mut [f32],
    first: usize,
) {
    let mut dim = 0;
    // SAFETY: columns stay below `padded`.
    unsafe {
        while block.padded - dim >= 4 * LANES {
            mix_tile::<L, R, 4>(block, powers, sums, first, dim);
            dim += 4 * LANES;
        }
        while dim < block.padded {
            mix_tile::<L, R, 1>(block, powers, sums, first, dim);
            dim += LANES;
        }
    }
}

/// # Safety
/// As [`mix_rows`], with C vectors left from `dim` on.
#[inline(always)]
unsafe fn mix_tile<L: Lanes, const R: usize, const C: usize>(
    block: &Block<'_>,
    powers: &[f32],
    sums: &mut [f32],
    first: usize,
    dim: usize,
) {
    // SAFETY: values has `count` rows of `padded`, sums and powers R rows from `first` on.
    unsafe {
        let sum_at = sums.as_mut_ptr().add(first * block.padded + dim);
        let mut tile = [[L::splat(0.0); C]; R];
        for (row, tile) in tile.iter_mut().enumerate() {
            for (column, sum) in tile.iter_mut().enumerate() {
                *sum = L::load(sum_at.add(row * block.padded + column * LANES));
            }
        }
        for position in 0..block.count {
            let values = block.values.as_ptr().add(position * block.padded + dim);
            let mut lanes = [L::splat(0.0); C];
            for (column, lanes) in lanes.iter_mut().enumerate() {
                *lanes = L::load(values.add(column * LANES));
            }
            for (row, tile) in tile.iter_mut().enumerate() {
                let power = L::splat(*powers.as_ptr().add((first + row) * BLOCK + position));
                for (sum, values) in tile.iter_mut().zip(lanes) {
                    *sum = values.mul_add(power, *sum);
                }
            }
        }
        for (row, tile) in tile.iter().enumerate() {
            for (column, sum) in tile.iter().enumerate() {
                sum.store(sum_at.add(row * block.padded + column * LANES));
            }
        }
    }
}

#[cfg(test)]
mod tests;
