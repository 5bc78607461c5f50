//! Panels times rows in AMX tiles (Intel Architecture Instruction Set Extensions, chapter 3). Rust has no stable
//! intrinsics for tiles, hence the assembly. No compiled code touches tile registers, so they keep their content from
//! one block of assembly to the next.
//!
//! A panel of 32 columns meets 32 rows of x in four tiles of sums: each tile that is loaded is used twice. Rows go
//! by in blocks of up to 256, whose packed x stays in the second-level cache while the task's panels pass, and k in blocks,
//! of which a panel's share stays in the first-level cache while the rows pass.
//!
//! To a tile bf16 and int8 look alike: a block of k is 64 bytes of a row, 32 of the one and 64 of the other, and a
//! sum is four bytes. Only the instruction differs.

use std::{arch::asm, arch::x86_64::*, cell::RefCell, ops::Range};

use super::{
    Call, Layer, PANEL,
    bf16::{self, BLOCK, TILE},
};
use crate::{
    Cpu,
    buffer::{Buffer, Zeroable},
    lanes::{Avx512, Lanes},
    shared::SharedMut,
};

/// Rows of a pair of tiles.
pub(crate) const ROWS: usize = 32;
/// Rows that go by together at most.
const ROW_BLOCK: usize = 256;
/// Bytes of x that stay in the second-level cache while panels pass.
const X_BYTES: usize = 5 << 18;
/// k that stays in the first-level cache, in blocks of 64 bytes.
const K_BLOCKS: usize = 16;
/// Bytes of a block of k: two tiles.
pub(super) const BLOCK_BYTES: usize = 2048;
/// Bytes that are fetched ahead while a block is multiplied: an eighth of what the block reads of the weights.
const AHEAD_BYTES: usize = BLOCK_BYTES / 8;
/// Sums of 32 rows and a panel: four tiles of 16 by 16.
pub(crate) const SUMS: usize = ROWS * PANEL;
/// Elements of x that are worth packing in a task of their own.
pub(super) const PACK_ELEMENTS: usize = 1 << 16;

/// What tiles hold, and what their sums mean.
pub(super) trait Product: Sync {
    /// Sums of `count` blocks of k, of 32 rows (four tiles at `sums`) or of up to 16 (two), which go on from what is
    /// there unless `fresh`. They are 32-bit integers or floats. Of what lies at `ahead`, 256 bytes a block are fetched
    /// into the second-level cache meanwhile.
    ///
    /// # Safety
    /// The machine has tiles and this thread has configured them; `x` and `weights` hold `count` blocks, and `sums`
    /// as many tiles as are written.
    unsafe fn sum(two: bool, count: usize, from: [*const u8; 3], sums: *mut f32, fresh: bool);

    /// Turns a row of a panel's sums into values of y, less the bias.
    ///
    /// # Safety
    /// AVX-512.
    unsafe fn values(&self, row: usize, panel: usize, sums: [Avx512; 2]) -> [Avx512; 2];
}

/// Sums of products of bf16.
struct Bf16;

/// What `ldtilecfg` takes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of 16 rows of 64 bytes for as long as it lives; then whatever this thread had before. Other users of
/// tiles (candle is one) remember that a thread is configured, and would fault or compute nonsense if it were not.
pub(crate) struct Tiles {
    before: TileConfig,
}

thread_local! {
    /// The packed x of a call, which the caller's tasks share.
    static PACKED: RefCell<Buffer<u16>> = RefCell::new(Buffer::zeroed(0));
    /// Sums of a block of rows and a panel.
    static SUMS_OF_BLOCK: RefCell<Buffer<f32>> = RefCell::new(Buffer::zeroed(ROW_BLOCK / ROWS * SUMS));
}

/// # Safety
/// This machine has AVX-512 with BF16 and usable AMX tiles.
pub(super) unsafe fn forward(cpu: Cpu, panels: &[u16], x: &[f32], call: &Call<'_>) {
    PACKED.with_borrow_mut(|buffer| {
        // SAFETY: the caller's promise; the machine has tiles.
        unsafe {
            let packed = pack(cpu, buffer, x, call);
            multiply_all(cpu, &Bf16, bytes(panels), bytes(packed), call);
        }
    });
}

/// A gated layer, and the layer that takes its outputs.
///
/// # Safety
/// As [`forward`]; the first layer's outputs are the second's inputs.
pub(super) unsafe fn forward_mlp(
    cpu: Cpu,
    y: &mut [f32],
    x: &[f32],
    rows: usize,
    (gate_up, first): (&[u16], Layer<'_>),
    (down, second): (&[u16], Layer<'_>),
) {
    thread_local! {
        /// What lies between the two.
        static BETWEEN: RefCell<Buffer<u16>> = RefCell::new(Buffer::zeroed(0));
    }
    let len = rows.next_multiple_of(ROWS) * bf16::padded(first.linear.outputs);
    BETWEEN.with_borrow_mut(|between| {
        let between = between.at_least(len);
        let call = Call {
            tiles: Some(SharedMut::new(between)),
            ..Call::new(first, rows, &mut [])
        };
        // SAFETY: the caller's promises; `between` holds whole groups of rows.
        unsafe {
            forward(cpu, gate_up, x, &call);
            multiply_all(
                cpu,
                &Bf16,
                bytes(down),
                bytes(between),
                &Call::new(second, rows, y),
            );
        }
    });
}

/// Rounds a call's input, in parallel.
///
/// # Safety
/// As [`forward`].
unsafe fn pack<'a>(cpu: Cpu, buffer: &'a mut Buffer<u16>, x: &[f32], call: &Call<'_>) -> &'a [u16] {
    let inputs = call.linear.inputs;
    let k = bf16::padded(inputs);
    let groups = call.rows.div_ceil(ROWS);
    let buffer = buffer.at_least(groups * ROWS * k);
    let packed = SharedMut::new(buffer);
    cpu.pool
        .run_ranges(groups, PACK_ELEMENTS.div_ceil(ROWS * k), &|range| {
            for group in range {
                let rows = ROWS.min(call.rows - group * ROWS);
                // SAFETY: every group of rows is packed by one task; the machine has AVX-512 with BF16.
                unsafe {
                    let to = packed.part(group * ROWS * k, ROWS * k);
                    pack_rows(&x[group * ROWS * inputs..][..rows * inputs], inputs, to);
                }
            }
        });
    buffer
}

/// Multiplies rows that are packed by blocks, `[rows / 32][blocks][2][16][64 bytes]`, with panels `[blocks][2][16][64
/// bytes]`.
///
/// # Safety
/// The machine has AVX-512 and tiles; `x` and `panels` hold as many blocks as the call has rows and panels.
pub(super) unsafe fn multiply_all<P: Product>(
    cpu: Cpu,
    product: &P,
    panels: &[u8],
    x: &[u8],
    call: &Call<'_>,
) {
    let blocks = x.len() / (call.rows.div_ceil(ROWS) * BLOCK_BYTES);
    // SAFETY: the caller's promises; each task owns its panels.
    call.for_panels(cpu, &|range| unsafe {
        multiply(product, panels, x, blocks, call, range);
    });
}

/// Plain numbers as their bytes.
pub(super) fn bytes<T: Zeroable>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding, and any alignment does for bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Rounds up to 32 rows into pairs of tiles: `[k / 32][2][16][32]`. What lies beyond the rows is left as it is: those
/// sums are not read.
///
/// # Safety
/// AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_rows(x: &[f32], inputs: usize, to: &mut [u16]) {
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let to = &mut to[(block * 2 + row / 16) * TILE + row % 16 * BLOCK..][..BLOCK];
            let mut padded = [0.0; BLOCK];
            let from = if x.len() == BLOCK {
                x
            } else {
                padded[..x.len()].copy_from_slice(x);
                &padded
            };
            // SAFETY: both slices are 32 long, and the vector type is as long as what it is cast from.
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

/// # Safety
/// As [`multiply_all`]; no other thread writes these panels of y.
unsafe fn multiply<P: Product>(
    product: &P,
    panels: &[u8],
    x: &[u8],
    blocks: usize,
    call: &Call<'_>,
    range: Range<usize>,
) {
    let size = blocks * BLOCK_BYTES;
    let row_block = (X_BYTES / size * ROWS).clamp(ROWS, ROW_BLOCK);
    SUMS_OF_BLOCK.with_borrow_mut(|sums| {
        // SAFETY: the machine has tiles.
        let _tiles = unsafe { Tiles::configure() };
        for first in (0..call.rows).step_by(row_block) {
            let rows = row_block.min(call.rows - first);
            let x = &x[first / ROWS * size..][..rows.div_ceil(ROWS) * size];
            for panel in range.clone() {
                let weights = &panels[panel * size..][..size];
                // SAFETY: x has whole groups of 32 rows, weights a panel, sums room for 256 rows.
                unsafe { sum_panel::<P>(weights, x, blocks, rows, sums) };
                // SAFETY: this task owns the panel; the machine has AVX-512.
                unsafe { write_panel(product, sums, call, first, rows, panel) };
            }
        }
    });
}

/// Writes the sums of `rows` rows from `first` on.
///
/// # Safety
/// AVX-512 with BF16; no other thread writes these rows of this panel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn write_panel<P: Product>(
    product: &P,
    sums: &[f32],
    call: &Call<'_>,
    first: usize,
    rows: usize,
    panel: usize,
) {
    for row in 0..rows {
        let tile = &sums[row / ROWS * SUMS + row % ROWS / 16 * 512 + row % 16 * 16..][..272];
        // SAFETY: 16 sums at each place; the rest is the caller's promise.
        unsafe {
            let sums = [Avx512::load(tile.as_ptr()), Avx512::load(tile[256..].as_ptr())];
            let values = product.values(first + row, panel, sums);
            match &call.tiles {
                Some(tiles) => write_tile_row(call, tiles, first + row, panel, values),
                None => call.write(first + row, panel, values),
            }
        }
    }
}

/// Gates a row of a panel and writes its 16 outputs where [`pack_rows`] would have put them.
///
/// # Safety
/// As [`write_panel`], with BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn write_tile_row(
    call: &Call<'_>,
    tiles: &SharedMut<'_, u16>,
    row: usize,
    panel: usize,
    values: [Avx512; 2],
) {
    let outputs = call.linear.outputs;
    let size = ROWS * bf16::padded(outputs);
    let start =
        row / ROWS * size + (panel / 2 * 2 + row % ROWS / 16) * TILE + row % 16 * BLOCK + panel % 2 * 16;
    // What pads the last block has to be zero: the weights beside it are, but zero times NaN is NaN.
    let is_last_half = panel.is_multiple_of(2) && (panel + 1) * 16 >= outputs;
    // SAFETY: 16 values of a row of a tile, or 32 where this panel is the last; the types are equally long.
    unsafe {
        let rounded = _mm512_cvtneps_pbh(call.gate(panel, values).0);
        let to = tiles.part(start, if is_last_half { 32 } else { 16 });
        _mm256_storeu_si256(
            to.as_mut_ptr().cast(),
            std::mem::transmute::<__m256bh, __m256i>(rounded),
        );
        if is_last_half {
            to[16..].fill(0);
        }
    }
}

/// # Safety
/// The machine has tiles and this thread has configured them; `x` holds `rows` rows in groups of 32, `weights` a
/// panel, and `sums` has room for the groups.
unsafe fn sum_panel<P: Product>(weights: &[u8], x: &[u8], blocks: usize, rows: usize, sums: &mut [f32]) {
    // With one group of rows nothing is read twice, so there is nothing to keep in a cache.
    let step = if rows <= ROWS { blocks } else { K_BLOCKS };
    for first in (0..blocks).step_by(step) {
        let count = step.min(blocks - first);
        for group in 0..rows.div_ceil(ROWS) {
            let two = rows - group * ROWS > 16;
            // SAFETY: the caller's promises; blocks and groups stay below what the slices hold.
            unsafe {
                let x = x.as_ptr().add((group * blocks + first) * BLOCK_BYTES);
                let weights = weights.as_ptr().add(first * BLOCK_BYTES);
                let sums = sums.as_mut_ptr().add(group * SUMS);
                // The groups share the fetching of the weights that come next, be it this panel's or another's.
                let ahead = weights.wrapping_add(count * (BLOCK_BYTES + group * AHEAD_BYTES));
                P::sum(two, count, [x, weights, ahead], sums, first == 0);
            }
        }
    }
}

/// The loops over k with one instruction that multiplies tiles.
macro_rules! tile_sums {
    ($instruction:literal, $two:ident, $one:ident) => {
        /// 32 rows: four tiles of sums.
        ///
        /// # Safety
        /// As [`Product::sum`].
        unsafe fn $two(count: usize, [x, weights, ahead]: [*const u8; 3], sums: *mut f32, fresh: bool) {
            // SAFETY: the caller's promises; tiles 0 to 7 are free for use while configured.
            unsafe {
                if fresh {
                    asm!(
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        options(nomem, nostack)
                    );
                } else {
                    asm!(
                        "tileloadd tmm0, [{sums} + {stride}*1]",
                        "tileloadd tmm1, [{sums} + {stride}*1 + 1024]",
                        "tileloadd tmm2, [{sums} + {stride}*1 + 2048]",
                        "tileloadd tmm3, [{sums} + {stride}*1 + 3072]",
                        sums = in(reg) sums, stride = in(reg) 64_usize, options(nostack)
                    );
                }
                asm!(
                    "2:",
                    "tileloadd tmm4, [{x} + {stride}*1]",
                    "tileloadd tmm6, [{weights} + {stride}*1]",
                    concat!($instruction, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{weights} + {stride}*1 + 1024]",
                    concat!($instruction, " tmm1, tmm4, tmm7"),
                    "tileloadd tmm5, [{x} + {stride}*1 + 1024]",
                    concat!($instruction, " tmm2, tmm5, tmm6"),
                    concat!($instruction, " tmm3, tmm5, tmm7"),
                    // The rows two blocks ahead, half of their lines: the hardware fetches the neighbours.
                    "prefetcht0 [{x} + 4096]",
                    "prefetcht0 [{x} + 4160]",
                    "prefetcht0 [{x} + 4224]",
                    "prefetcht0 [{x} + 4288]",
                    "prefetcht0 [{x} + 4352]",
                    "prefetcht0 [{x} + 4416]",
                    "prefetcht0 [{x} + 4480]",
                    "prefetcht0 [{x} + 4544]",
                    "prefetcht1 [{ahead}]",
                    "prefetcht1 [{ahead} + 64]",
                    "prefetcht1 [{ahead} + 128]",
                    "prefetcht1 [{ahead} + 192]",
                    "add {ahead}, 256",
                    "add {x}, 2048",
                    "add {weights}, 2048",
                    "dec {count}",
                    "jnz 2b",
                    "tilestored [{sums} + {stride}*1], tmm0",
                    "tilestored [{sums} + {stride}*1 + 1024], tmm1",
                    "tilestored [{sums} + {stride}*1 + 2048], tmm2",
                    "tilestored [{sums} + {stride}*1 + 3072], tmm3",
                    ahead = inout(reg) ahead => _,
                    x = inout(reg) x => _, weights = inout(reg) weights => _, count = inout(reg) count => _,
                    sums = in(reg) sums, stride = in(reg) 64_usize, options(nostack)
                );
            }
        }

        /// Up to 16 rows: two tiles of sums.
        ///
        /// # Safety
        /// As [`Product::sum`].
        unsafe fn $one(count: usize, [x, weights, _]: [*const u8; 3], sums: *mut f32, fresh: bool) {
            // SAFETY: the caller's promises; tiles 0 to 7 are free for use while configured.
            unsafe {
                if fresh {
                    asm!("tilezero tmm0", "tilezero tmm1", options(nomem, nostack));
                } else {
                    asm!(
                        "tileloadd tmm0, [{sums} + {stride}*1]",
                        "tileloadd tmm1, [{sums} + {stride}*1 + 1024]",
                        sums = in(reg) sums, stride = in(reg) 64_usize, options(nostack)
                    );
                }
                asm!(
                    "2:",
                    "tileloadd tmm4, [{x} + {stride}*1]",
                    "tileloadd tmm6, [{weights} + {stride}*1]",
                    concat!($instruction, " tmm0, tmm4, tmm6"),
                    "tileloadd tmm7, [{weights} + {stride}*1 + 1024]",
                    concat!($instruction, " tmm1, tmm4, tmm7"),
                    // Weights stream from memory: keep a few kilobytes under way.
                    "prefetcht1 [{weights} + 8192]",
                    "prefetcht1 [{weights} + 8704]",
                    "prefetcht1 [{weights} + 9216]",
                    "prefetcht1 [{weights} + 9728]",
                    "add {x}, 2048",
                    "add {weights}, 2048",
                    "dec {count}",
                    "jnz 2b",
                    "tilestored [{sums} + {stride}*1], tmm0",
                    "tilestored [{sums} + {stride}*1 + 1024], tmm1",
                    x = inout(reg) x => _, weights = inout(reg) weights => _, count = inout(reg) count => _,
                    sums = in(reg) sums, stride = in(reg) 64_usize, options(nostack)
                );
            }
        }
    };
}

tile_sums!("tdpbf16ps", sum_two_bf16, sum_one_bf16);
tile_sums!("tdpbssd", sum_two_int8, sum_one_int8);

/// [`Product::sum`] of bf16.
///
/// # Safety
/// As there.
pub(crate) unsafe fn sum_bf16(two: bool, count: usize, from: [*const u8; 3], sums: *mut f32, fresh: bool) {
    // SAFETY: the caller's promises.
    unsafe {
        match two {
            true => sum_two_bf16(count, from, sums, fresh),
            false => sum_one_bf16(count, from, sums, fresh),
        }
    }
}

/// [`Product::sum`] of signed bytes, in 32-bit integers.
///
/// # Safety
/// As there.
pub(super) unsafe fn sum_int8(two: bool, count: usize, from: [*const u8; 3], sums: *mut f32, fresh: bool) {
    // SAFETY: the caller's promises.
    unsafe {
        match two {
            true => sum_two_int8(count, from, sums, fresh),
            false => sum_one_int8(count, from, sums, fresh),
        }
    }
}

// === impl Bf16 ===

impl Product for Bf16 {
    unsafe fn sum(two: bool, count: usize, from: [*const u8; 3], sums: *mut f32, fresh: bool) {
        // SAFETY: the caller's promises.
        unsafe { sum_bf16(two, count, from, sums, fresh) }
    }

    #[inline(always)]
    unsafe fn values(&self, _: usize, _: usize, sums: [Avx512; 2]) -> [Avx512; 2] {
        sums
    }
}

// === impl TileConfig ===

impl TileConfig {
    const UNCONFIGURED: Self = Self {
        palette: 0,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };

    const FULL: Self = {
        let mut config = Self {
            palette: 1,
            ..Self::UNCONFIGURED
        };
        let mut tile = 0;
        while tile < 8 {
            config.row_bytes[tile] = 64;
            config.rows[tile] = 16;
            tile += 1;
        }
        config
    };
}

// === impl Tiles ===

impl Tiles {
    /// # Safety
    /// The machine has tiles that this process may use.
    pub(crate) unsafe fn configure() -> Self {
        let mut before = TileConfig::UNCONFIGURED;
        // SAFETY: both configurations are 64 bytes, aligned to 64; ours is valid for palette 1.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack));
            asm!("ldtilecfg [{}]", in(reg) &TileConfig::FULL, options(nostack));
        }
        Self { before }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the configuration is what the processor stored before.
        unsafe {
            if self.before.palette == 0 {
                asm!("tilerelease", options(nomem, nostack));
            } else {
                asm!("ldtilecfg [{}]", in(reg) &raw const self.before, options(nostack));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;

    #[test]
    fn a_thread_keeps_the_tiles_that_it_had() {
        let cpu = Cpu::detect();
        if cpu.isa.level() != Level::Amx {
            return;
        }
        let stored = || {
            let mut config = TileConfig::UNCONFIGURED;
            // SAFETY: the machine has tiles; the configuration is 64 bytes, aligned to 64.
            unsafe { asm!("sttilecfg [{}]", in(reg) &raw mut config, options(nostack)) };
            (config.palette, config.row_bytes, config.rows)
        };
        let mut other = TileConfig::FULL;
        other.rows[3] = 5;
        // SAFETY: as above; the configuration is valid for palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const other, options(nostack)) };
        let before = stored();
        assert_eq!(before.2[3], 5);
        let linear =
            super::super::Linear::pack(cpu, super::super::Element::Bf16, 64, 64, &|_, row| row.fill(1.0));
        let mut y = vec![0.0; 64];
        linear.forward(cpu, &mut y, &[1.0; 64], None);
        assert_eq!(y, [64.0; 64]);
        assert_eq!(stored(), before);
        // SAFETY: the machine has tiles.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
        linear.forward(cpu, &mut y, &[1.0; 64], None);
        assert_eq!(stored().0, 0);
    }
}
