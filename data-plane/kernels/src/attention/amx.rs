//! Attention over a bf16 cache in AMX tiles: queries, keys, powers and values are bf16, sums f32.
//!
//! Keys and values of a block are laid out as panels of weights are (see [`crate::linear`]), so that scores and sums
//! are two small products of 32 rows: `[head_dim / 32]` blocks of k for the scores, two for the values. Several groups
//! of 32 rows share the keys and values that were laid out. Whatever a tile's other rows are, a row's numbers are its
//! own, and blocks are counted from the sequence's start, so prefill and decode agree bit by bit.

use std::{arch::x86_64::*, cell::RefCell};

use half::bf16;

use super::{Attention, BLOCK, Tile};
use crate::{
    buffer::Buffer,
    lanes::{Avx512, LANES, Lanes},
    linear::amx::{ROWS, SUMS, Tiles, sum_bf16},
    shared::SharedMut,
};

/// Groups of 32 rows that share a block's keys and values.
const GROUPS: usize = 4;
/// Rows of a task.
pub(super) const TILE_ROWS: usize = GROUPS * ROWS;
/// Elements of a tile.
const TILE: usize = 512;
/// k of a block of products.
const K: usize = 32;
/// Blocks of k in a block of positions.
const POSITION_BLOCKS: usize = BLOCK / K;

/// Whether heads and pages fall into whole tiles.
pub(super) fn fits(call: &Attention<'_>) -> bool {
    call.qkv.head_dim.is_multiple_of(K) && call.cache.page_size.is_multiple_of(16)
}

/// A task's working memory; `d` is `head_dim / 32`.
struct Scratch {
    /// `[group][d][2][16][32]`.
    queries: Buffer<u16>,
    /// `[2][d][2][16][16][2]`: pairs of 16 keys.
    keys: Buffer<u16>,
    /// `[d][2][2][16][16][2]`: pairs of 16 columns.
    values: Buffer<u16>,
    /// `[2][4][16][16]`: of one group.
    scores: Buffer<f32>,
    /// `[2][2][16][32]`: of one group.
    powers: Buffer<u16>,
    /// `[group][d][4][16][16]`.
    sums: Buffer<f32>,
    largest: [f32; TILE_ROWS],
    total: [f32; TILE_ROWS],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        queries: Buffer::zeroed(0),
        keys: Buffer::zeroed(0),
        values: Buffer::zeroed(0),
        scores: Buffer::zeroed(2 * SUMS),
        powers: Buffer::zeroed(POSITION_BLOCKS * 2 * TILE),
        sums: Buffer::zeroed(0),
        largest: [0.0; TILE_ROWS],
        total: [0.0; TILE_ROWS],
    });
}

/// # Safety
/// The machine has AVX-512 with BF16 and tiles; the call was checked by [`super::attention`] and [`fits`]; no other
/// thread writes the tile's part of `y`.
pub(super) unsafe fn attend_tile(
    tile: &Tile<'_>,
    y: &SharedMut<'_, f32>,
    qkv: &[f32],
    cache: &[bf16],
    call: &Attention<'_>,
) {
    let head_dim = call.qkv.head_dim;
    let groups = tile.count.div_ceil(ROWS);
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.queries.at_least(GROUPS * ROWS * head_dim);
        scratch.keys.at_least(BLOCK * head_dim);
        scratch.values.at_least(BLOCK * head_dim);
        scratch.sums.at_least(GROUPS * ROWS * head_dim);
        scratch.largest = [f32::NEG_INFINITY; TILE_ROWS];
        scratch.total = [0.0; TILE_ROWS];
        // SAFETY: the machine has tiles.
        let _tiles = unsafe { Tiles::configure() };
        // SAFETY: the buffers have the sizes that the layouts above take.
        unsafe {
            load_queries(&mut scratch.queries, tile, qkv, call);
            for (block, start) in tile.blocks(call).enumerate() {
                load_keys(&mut scratch.keys, tile, start, cache, call);
                load_values(&mut scratch.values, tile, start, cache, call);
                for group in 0..groups {
                    attend_group(scratch, tile, start, block == 0, group, call);
                }
            }
            write(scratch, tile, y, call);
        }
    });
}

/// Rounds the queries into pairs of tiles.
///
/// # Safety
/// AVX-512 with BF16; `to` has room for the tile's rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn load_queries(to: &mut [u16], tile: &Tile<'_>, qkv: &[f32], call: &Attention<'_>) {
    let head_dim = call.qkv.head_dim;
    for row in 0..tile.count {
        let (token, head) = tile.token_and_head(row, call);
        let from = &qkv[token * call.qkv.width() + head * head_dim..][..head_dim];
        let to = &mut to[row / ROWS * ROWS * head_dim..][..ROWS * head_dim];
        for (block, from) in from.chunks_exact(K).enumerate() {
            let to = &mut to[(block * 2 + row % ROWS / 16) * TILE + row % 16 * K..][..K];
            // SAFETY: both are 32 long; the vector types are of one size.
            unsafe {
                let (low, high) = (
                    _mm512_loadu_ps(from.as_ptr()),
                    _mm512_loadu_ps(from.as_ptr().add(16)),
                );
                let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(to.as_mut_ptr().cast(), rounded);
            }
        }
    }
}

/// Interleaves 16 elements at `first` with 16 at `second`, as a row of a tile of weights takes them.
///
/// # Safety
/// AVX-512 BW; 16 elements can be read at each, and 32 written.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn interleave(first: *const bf16, second: *const bf16, to: *mut u16) {
    // SAFETY: the caller's promises.
    unsafe {
        let first = _mm512_castsi256_si512(_mm256_loadu_si256(first.cast()));
        let both = _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(second.cast()));
        // 0, 16, 1, 17, …: pairs of 16-bit indices, the lower one first.
        let pairs = _mm512_set_epi32(
            0x001f_000f,
            0x001e_000e,
            0x001d_000d,
            0x001c_000c,
            0x001b_000b,
            0x001a_000a,
            0x0019_0009,
            0x0018_0008,
            0x0017_0007,
            0x0016_0006,
            0x0015_0005,
            0x0014_0004,
            0x0013_0003,
            0x0012_0002,
            0x0011_0001,
            0x0010_0000,
        );
        _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(pairs, both));
    }
}

/// Lays out the keys of a block. Sixteens that no row sees are zero and are not read; other keys that no row sees may
/// be anything, since their scores are masked.
///
/// # Safety
/// AVX-512 BW; `to` is `[64][head_dim]` large.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_keys(to: &mut [u16], tile: &Tile<'_>, start: usize, cache: &[bf16], call: &Attention<'_>) {
    let (shape, head_dim, seen) = (&call.cache, call.qkv.head_dim, tile.seen(call));
    for sixteen in 0..BLOCK / 16 {
        let position = start + sixteen * 16;
        let to = &mut to[sixteen / 2 * 2 * 16 * head_dim..][..2 * 16 * head_dim];
        let tiles = to.chunks_exact_mut(TILE).skip(sixteen % 2).step_by(2);
        if position >= seen.end || position + 16 <= seen.start {
            tiles.for_each(|tile| tile.fill(0));
            continue;
        }
        let (page, offset) = (position / shape.page_size, position % shape.page_size);
        let head = shape.head_start(tile.sequence.pages[page] as usize, tile.kv_head);
        let from = &cache[head..][..shape.head_elements()];
        for (block, tile) in tiles.enumerate() {
            for (pair, row) in tile.chunks_exact_mut(32).enumerate() {
                let dim = block * K + pair * 2;
                let (first, second) = (
                    &from[dim * shape.page_size + offset..][..16],
                    &from[(dim + 1) * shape.page_size + offset..][..16],
                );
                // SAFETY: 16 elements each, and 32 of the row.
                unsafe { interleave(first.as_ptr(), second.as_ptr(), row.as_mut_ptr()) };
            }
        }
    }
}

/// Lays out the values of a block; those that no row sees are zero, so that stale pages cannot matter.
///
/// # Safety
/// As [`load_keys`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_values(to: &mut [u16], tile: &Tile<'_>, start: usize, cache: &[bf16], call: &Attention<'_>) {
    const NOTHING: [bf16; 16] = [bf16::ZERO; 16];
    let (shape, head_dim, seen) = (&call.cache, call.qkv.head_dim, tile.seen(call));
    let cached = &cache[shape.half()..];
    let row = |position: usize| {
        if !seen.contains(&position) {
            return None;
        }
        let (page, offset) = (position / shape.page_size, position % shape.page_size);
        let head = shape.head_start(tile.sequence.pages[page] as usize, tile.kv_head);
        Some(&cached[head + offset * head_dim..][..head_dim])
    };
    for pair in 0..BLOCK / 2 {
        let (first, second) = (row(start + pair * 2), row(start + pair * 2 + 1));
        for column in 0..head_dim / 16 {
            let sixteen = |row: Option<&[bf16]>| match row {
                Some(row) => row[column * 16..][..16].as_ptr(),
                None => NOTHING.as_ptr(),
            };
            let at = (column / 2 * POSITION_BLOCKS + pair / 16) * 2 + column % 2;
            let to = &mut to[at * TILE + pair % 16 * 32..][..32];
            // SAFETY: 16 elements each, and 32 of the row.
            unsafe { interleave(sixteen(first), sixteen(second), to.as_mut_ptr()) };
        }
    }
}

/// One group of 32 rows and one block; the tile's first block begins the sums.
///
/// # Safety
/// The machine has AVX-512 with BF16 and tiles, which are configured; the scratch is as its layouts say.
unsafe fn attend_group(
    scratch: &mut Scratch,
    tile: &Tile<'_>,
    start: usize,
    first: bool,
    group: usize,
    call: &Attention<'_>,
) {
    let head_dim = call.qkv.head_dim;
    let blocks = head_dim / K;
    let rows = ROWS.min(tile.count - group * ROWS);
    let two = rows > 16;
    let queries = &scratch.queries[group * ROWS * head_dim..][..ROWS * head_dim];
    // SAFETY: queries hold a group, keys two pairs of 16 keys, scores the sums of both.
    unsafe {
        for pair in 0..2 {
            let keys = &scratch.keys[pair * 32 * head_dim..][..32 * head_dim];
            let scores = &mut scratch.scores[pair * SUMS..][..SUMS];
            sum_bf16(
                two,
                blocks,
                [
                    queries.as_ptr().cast(),
                    keys.as_ptr().cast(),
                    keys.as_ptr().cast(),
                ],
                scores.as_mut_ptr(),
                true,
            );
        }
        soften(scratch, tile, start, first, group, rows, call);
        for (block, values) in scratch.values[..BLOCK * head_dim]
            .chunks_exact(BLOCK * K)
            .enumerate()
        {
            let sums = &mut scratch.sums[(group * blocks + block) * SUMS..][..SUMS];
            sum_bf16(
                two,
                POSITION_BLOCKS,
                [
                    scratch.powers.as_ptr().cast(),
                    values.as_ptr().cast(),
                    values.as_ptr().cast(),
                ],
                sums.as_mut_ptr(),
                first,
            );
        }
    }
}

/// Masks and scales a group's scores, turns them into powers of e against the running maximum, and scales what was
/// summed before.
///
/// # Safety
/// AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn soften(
    scratch: &mut Scratch,
    tile: &Tile<'_>,
    start: usize,
    first: bool,
    group: usize,
    rows: usize,
    call: &Attention<'_>,
) {
    const WIDTH: usize = BLOCK / LANES;
    let blocks = call.qkv.head_dim / K;
    for row in 0..rows {
        let (from, until) = tile.seen_in_block(group * ROWS + row, start, call);
        if from == until {
            // Without a score there is no maximum to measure against.
            for block in 0..POSITION_BLOCKS {
                scratch.powers[(block * 2 + row / 16) * TILE + row % 16 * K..][..K].fill(0);
            }
            continue;
        }
        // SAFETY: 16 scores at each place, 32 powers at each place; lanes are enabled here.
        unsafe {
            let mut lanes = [Avx512::splat(0.0); WIDTH];
            let mut largest = Avx512::splat(f32::NEG_INFINITY);
            for (at, lanes) in lanes.iter_mut().enumerate() {
                let place = at / 2 * SUMS + row / 16 * 2 * 256 + at % 2 * 256 + row % 16 * 16;
                let scores = scratch.scores[place..][..LANES].as_mut_ptr();
                if from > at * LANES || until < (at + 1) * LANES {
                    let scores = std::slice::from_raw_parts_mut(scores, LANES);
                    let place = |position: usize| position.saturating_sub(at * LANES).min(LANES);
                    scores[..place(from)].fill(f32::NEG_INFINITY);
                    scores[place(until)..].fill(f32::NEG_INFINITY);
                }
                *lanes = Avx512::load(scores).mul(Avx512::splat(call.scale));
                largest = largest.max(*lanes);
            }
            let (before, total) = (
                &mut scratch.largest[group * ROWS + row],
                &mut scratch.total[group * ROWS + row],
            );
            let now = before.max(largest.largest());
            let mut sum = Avx512::splat(0.0);
            for lanes in &mut lanes {
                *lanes = lanes.sub(Avx512::splat(now)).exp();
                sum = sum.add(*lanes);
            }
            for (block, lanes) in lanes.chunks_exact(2).enumerate() {
                let mut powers = [0.0; 2 * LANES];
                lanes[0].store(powers.as_mut_ptr());
                lanes[1].store(powers.as_mut_ptr().add(LANES));
                let (low, high) = (
                    _mm512_loadu_ps(powers.as_ptr()),
                    _mm512_loadu_ps(powers.as_ptr().add(LANES)),
                );
                let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                let to = &mut scratch.powers[(block * 2 + row / 16) * TILE + row % 16 * K..][..K];
                _mm512_storeu_si512(to.as_mut_ptr().cast(), rounded);
            }
            if now > *before && !first {
                let mut factor = [0.0; LANES];
                let factors = Avx512::splat(*before - now).exp();
                factors.store(factor.as_mut_ptr());
                *total *= factor[0];
                for column in 0..2 * blocks {
                    let place = (group * blocks + column / 2) * SUMS
                        + row / 16 * 2 * 256
                        + column % 2 * 256
                        + row % 16 * 16;
                    let sums = scratch.sums[place..][..LANES].as_mut_ptr();
                    Avx512::load(sums).mul(factors).store(sums);
                }
            }
            *before = now;
            *total += sum.sum();
        }
    }
}

/// Divides the sums by the totals.
///
/// # Safety
/// No other thread writes the tile's part of `y`.
unsafe fn write(scratch: &Scratch, tile: &Tile<'_>, y: &SharedMut<'_, f32>, call: &Attention<'_>) {
    let head_dim = call.qkv.head_dim;
    let blocks = head_dim / K;
    for row in 0..tile.count {
        let (token, head) = tile.token_and_head(row, call);
        let (group, in_group) = (row / ROWS, row % ROWS);
        // SAFETY: a row and head belong to one tile.
        let y = unsafe { y.part((token * call.qkv.heads + head) * head_dim, head_dim) };
        let total = scratch.total[row];
        for (column, y) in y.chunks_exact_mut(16).enumerate() {
            let place = (group * blocks + column / 2) * SUMS
                + in_group / 16 * 2 * 256
                + column % 2 * 256
                + in_group % 16 * 16;
            for (y, sum) in y.iter_mut().zip(&scratch.sums[place..][..16]) {
                *y = sum / total;
            }
        }
    }
}
