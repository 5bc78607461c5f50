//! int8 weights, one scale per output column, times int8 inputs, one scale per row: both symmetric, the largest
//! magnitude at 127. Sums are exact 32-bit integers, so every instruction set yields the same bits.
//!
//! Panels are `[k / 64][2][16][16][4]`: blocks of 64 k, in each two tiles of 16 columns, in each 16 rows of four k, in
//! each 16 columns of four. Rows of x lie in groups of 32 as `[k / 64][2][16][64]`. k is padded with zeros to a
//! multiple of 64.
//!
//! Rounding to a step of s is off by s / 2 at most, so a product of k terms is off by about
//! `sqrt(k / 12) · (s_x |w| + s_w |x|)`: 0.8 % of the output's size for normally distributed inputs and weights. Rows
//! with single very large elements fare worse, since those set the step of all.

use std::cell::RefCell;

use super::{Call, PANEL, pack_panels};
use crate::{
    Cpu,
    buffer::Buffer,
    lanes::{LANES, Lanes, multiversion},
    shared::SharedMut,
};

/// k of a block.
const BLOCK: usize = 64;
/// Bytes of a block of a panel, or of 32 rows.
const BLOCK_BYTES: usize = 2048;
/// Rows of a group.
const ROWS: usize = 32;
/// The largest magnitude.
const LARGEST: f32 = 127.0;
/// Elements of x that are worth rounding in a task of their own.
const PACK_ELEMENTS: usize = 1 << 16;

/// A packed matrix.
#[derive(Debug)]
pub(super) struct Panels {
    weights: Buffer<i8>,
    /// Of each column, padded to whole panels.
    scales: Buffer<f32>,
    /// Of each column's weights, for instructions whose other operand is unsigned.
    sums: Buffer<i32>,
}

/// The input of a call, rounded.
struct Rounded {
    rows: Buffer<i8>,
    scales: Buffer<f32>,
}

thread_local! {
    /// Kept between calls.
    static ROUNDED: RefCell<Rounded> = RefCell::new(Rounded {
        rows: Buffer::zeroed(0),
        scales: Buffer::zeroed(0),
    });
}

fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(BLOCK)
}

/// Where k of a column lies in its panel.
fn offset(k: usize, column: usize) -> usize {
    let (block, quad, fourth) = (k / BLOCK, k % BLOCK / 4, k % 4);
    (block * 2 + column / 16) * (BLOCK_BYTES / 2) + quad * 64 + column % 16 * 4 + fourth
}

/// Where a block of a row lies among rows of `blocks` blocks.
fn row_offset(row: usize, block: usize, blocks: usize) -> usize {
    (row / ROWS * blocks + block) * BLOCK_BYTES + row % ROWS * BLOCK
}

// === impl Panels ===

impl Panels {
    pub(super) fn pack(
        cpu: Cpu,
        outputs: usize,
        inputs: usize,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        let columns = outputs.div_ceil(PANEL) * PANEL;
        let mut weights = Buffer::zeroed(columns * padded(inputs));
        let (mut scales, mut sums) = (Buffer::zeroed(columns), Buffer::zeroed(columns));
        let (shared_scales, shared_sums) = (SharedMut::new(&mut scales), SharedMut::new(&mut sums));
        pack_panels(cpu, &mut weights, outputs, inputs, row, |panel, index, row| {
            let largest = row
                .iter()
                .fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
            let mut sum = 0;
            for (block, row) in row.chunks(BLOCK).enumerate() {
                let mut rounded = [0; BLOCK];
                // SAFETY: a block is whole vectors long.
                unsafe { round(cpu.isa, row, steps(largest), &mut rounded) };
                for (quad, rounded) in rounded.chunks_exact(4).enumerate() {
                    panel[offset(block * BLOCK + quad * 4, index % PANEL)..][..4].copy_from_slice(rounded);
                }
                sum += rounded.iter().map(|&rounded| i32::from(rounded)).sum::<i32>();
            }
            // SAFETY: every column is packed by one task.
            unsafe {
                shared_scales.part(index, 1)[0] = largest / LARGEST;
                shared_sums.part(index, 1)[0] = sum;
            }
        });
        Self {
            weights,
            scales,
            sums,
        }
    }

    pub(super) fn read_row(&self, index: usize, row: &mut [f32]) {
        let panel = &self.weights[index / PANEL * PANEL * padded(row.len())..];
        for (k, weight) in row.iter_mut().enumerate() {
            *weight = f32::from(panel[offset(k, index % PANEL)]) * self.scales[index];
        }
    }

    /// Bytes that a whole pass reads.
    pub(super) fn bytes(&self) -> usize {
        self.weights.len() + 4 * (self.scales.len() + self.sums.len())
    }

    pub(super) fn forward(&self, cpu: Cpu, x: &[f32], call: &Call<'_>) {
        let inputs = call.linear.inputs;
        let blocks = padded(inputs) / BLOCK;
        let groups = call.rows.div_ceil(ROWS);
        ROUNDED.with_borrow_mut(|Rounded { rows, scales }| {
            let rows = rows.at_least(groups * blocks * BLOCK_BYTES);
            let scales = scales.at_least(groups * ROWS);
            let (shared_rows, shared_scales) = (SharedMut::new(rows), SharedMut::new(scales));
            let fewest = PACK_ELEMENTS.div_ceil(ROWS * inputs);
            cpu.pool.run_ranges(groups, fewest, &|range| {
                for group in range {
                    let count = ROWS.min(call.rows - group * ROWS);
                    let x = &x[group * ROWS * inputs..][..count * inputs];
                    // SAFETY: every group of rows is rounded by one task; its part holds 32 rows of all blocks.
                    unsafe {
                        let size = blocks * BLOCK_BYTES;
                        let to = shared_rows.part(group * size, size);
                        let scales = shared_scales.part(group * ROWS, count);
                        round_rows(cpu.isa, x, inputs, to, scales);
                    }
                }
            });
            let input = Input { rows, scales, blocks };
            self.multiply(cpu, &input, call);
        });
    }

    fn multiply(&self, cpu: Cpu, input: &Input<'_>, call: &Call<'_>) {
        #[cfg(target_arch = "x86_64")]
        if cpu.isa.level() == crate::isa::Level::Amx {
            let product = tiles::Int8 { panels: self, input };
            // SAFETY: an Isa of this level exists only where the machine has AVX-512 and usable tiles; input and
            // panels hold whole groups and panels of the same blocks.
            return unsafe {
                super::amx::multiply_all(
                    cpu,
                    &product,
                    super::amx::bytes(&self.weights),
                    super::amx::bytes(input.rows),
                    call,
                )
            };
        }
        call.for_panels(cpu, &|range| {
            for panel in range {
                for first in (0..call.rows).step_by(TILE_ROWS) {
                    let rows = TILE_ROWS.min(call.rows - first);
                    let mut sums = [[0; PANEL]; TILE_ROWS];
                    #[cfg(target_arch = "x86_64")]
                    if cpu.isa.has_vnni() {
                        // SAFETY: the machine has the instructions; rows and panel exist.
                        unsafe { vnni::tile(self, input, panel, first, rows, &mut sums) };
                    } else {
                        self.tile(cpu, input, panel, first, rows, &mut sums);
                    }
                    #[cfg(not(target_arch = "x86_64"))]
                    self.tile(cpu, input, panel, first, rows, &mut sums);
                    for (row, sums) in (first..first + rows).zip(&sums) {
                        // SAFETY: the task owns this panel's columns of y.
                        unsafe { write_row(cpu.isa, self, call, row, panel, input.scales[row], sums) };
                    }
                }
            }
        });
    }

    fn tile(
        &self,
        cpu: Cpu,
        input: &Input<'_>,
        panel: usize,
        first: usize,
        rows: usize,
        sums: &mut [[i32; PANEL]; TILE_ROWS],
    ) {
        let size = input.blocks * BLOCK_BYTES;
        let weights = &self.weights[panel * size..][..size];
        for (row, sums) in (first..first + rows).zip(sums) {
            // SAFETY: it works on slices whose bounds are checked.
            unsafe { dot(cpu.isa, weights, input, row, sums) };
        }
    }

    /// Multiplies sums by the scales of their row and columns.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    unsafe fn scale<L: Lanes>(&self, row: f32, panel: usize, sums: [L; 2]) -> [L; 2] {
        let columns = self.scales[panel * PANEL..][..PANEL].as_ptr();
        // SAFETY: a panel has 32 scales.
        unsafe {
            let row = L::splat(row);
            [
                sums[0].mul(row.mul(L::load(columns))),
                sums[1].mul(row.mul(L::load(columns.add(LANES)))),
            ]
        }
    }
}

multiversion! {
    /// Scales a row's sums and writes them.
    ///
    /// # Safety
    /// No other thread writes this row of this panel.
    fn write_row = write_row_body(panels: &Panels, call: &Call<'_>, row: usize, panel: usize, scale: f32, sums: &[i32; PANEL]);
}

/// # Safety
/// As [`Lanes`] and [`write_row`].
#[inline(always)]
unsafe fn write_row_body<L: Lanes>(
    panels: &Panels,
    call: &Call<'_>,
    row: usize,
    panel: usize,
    scale: f32,
    sums: &[i32; PANEL],
) {
    let values = sums.map(|sum| sum as f32);
    // SAFETY: the array holds two vectors; the rest is the caller's promise.
    unsafe {
        let values = [L::load(values.as_ptr()), L::load(values.as_ptr().add(LANES))];
        call.write(row, panel, panels.scale(scale, panel, values));
    }
}

/// Rows of x that share the weights that are loaded.
const TILE_ROWS: usize = 4;

/// Rounded rows.
struct Input<'a> {
    rows: &'a [i8],
    scales: &'a [f32],
    blocks: usize,
}

multiversion! {
    /// # Safety
    /// None of its own: it works on slices.
    fn dot = dot_body(weights: &[i8], input: &Input<'_>, row: usize, sums: &mut [i32; PANEL]);
}

/// # Safety
/// As [`dot`].
#[inline(always)]
unsafe fn dot_body<L: Lanes>(weights: &[i8], input: &Input<'_>, row: usize, sums: &mut [i32; PANEL]) {
    for block in 0..input.blocks {
        let x = &input.rows[row_offset(row, block, input.blocks)..][..BLOCK];
        let weights = &weights[block * BLOCK_BYTES..][..BLOCK_BYTES];
        for (half, weights) in weights.chunks_exact(BLOCK_BYTES / 2).enumerate() {
            let sums = &mut sums[half * 16..][..16];
            for (x, weights) in x.chunks_exact(4).zip(weights.chunks_exact(64)) {
                for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(4)) {
                    for (&x, &weight) in x.iter().zip(weights) {
                        *sum += i32::from(x) * i32::from(weight);
                    }
                }
            }
        }
    }
}

multiversion! {
    /// Rounds rows into a group, and says what their steps are: not a number for a row that holds an element that is
    /// none, or is infinite.
    ///
    /// # Safety
    /// `x` has as many rows of `inputs` as `scales` is long, and `to` has room for 32.
    fn round_rows = round_rows_body(x: &[f32], inputs: usize, to: &mut [i8], scales: &mut [f32]);
}

/// # Safety
/// As [`Lanes`] and [`round_rows`].
#[inline(always)]
unsafe fn round_rows_body<L: Lanes>(x: &[f32], inputs: usize, to: &mut [i8], scales: &mut [f32]) {
    let blocks = padded(inputs) / BLOCK;
    for ((row, x), scale) in x.chunks_exact(inputs).enumerate().zip(scales) {
        let (whole, rest) = x.split_at(inputs / LANES * LANES);
        let mut padding = [0.0; LANES];
        padding[..rest.len()].copy_from_slice(rest);
        // SAFETY: every chunk and the padding hold a vector of floats.
        let (largest, nothing) = unsafe {
            // Several of each, so that one instruction need not wait for the one before.
            let zero = L::splat(0.0);
            let (mut largest, mut nothing) = ([zero; 4], [zero; 4]);
            let chunks = whole.chunks_exact(LANES).chain([&padding[..]]);
            for (at, chunk) in chunks.enumerate() {
                let x = L::load(chunk.as_ptr());
                largest[at % 4] = largest[at % 4].max(x).max(zero.sub(x));
                nothing[at % 4] = x.mul_add(zero, nothing[at % 4]);
            }
            let largest = largest[0].max(largest[1]).max(largest[2].max(largest[3]));
            let nothing = nothing[0].add(nothing[1]).add(nothing[2].add(nothing[3]));
            (largest.largest(), nothing.sum())
        };
        *scale = largest / LARGEST + nothing;
        let steps = steps(largest);
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let to = &mut to[row_offset(row, block, blocks)..][..BLOCK];
            // SAFETY: as for `round`.
            unsafe { round_body::<L>(x, steps, to) };
        }
    }
}

/// Steps a unit for a row whose largest magnitude this is.
fn steps(largest: f32) -> f32 {
    if largest > 0.0 { LARGEST / largest } else { 0.0 }
}

multiversion! {
    /// Rounds numbers to bytes; what is left of `to` becomes 0.
    ///
    /// # Safety
    /// `to` is a multiple of 16 long, and no shorter than `x`.
    fn round = round_body(x: &[f32], steps: f32, to: &mut [i8]);
}

/// # Safety
/// As [`Lanes`] and [`round`].
#[inline(always)]
unsafe fn round_body<L: Lanes>(x: &[f32], steps: f32, to: &mut [i8]) {
    // SAFETY: as this function's.
    let steps = unsafe { L::splat(steps) };
    let whole = x.len() / LANES;
    for (at, to) in to.chunks_exact_mut(LANES).enumerate() {
        let mut padding = [0.0; LANES];
        let from = if at < whole {
            x[at * LANES..].as_ptr()
        } else {
            let rest = x.get(at * LANES..).unwrap_or_default();
            padding[..rest.len()].copy_from_slice(rest);
            padding.as_ptr()
        };
        // SAFETY: 16 floats can be read, and 16 bytes written.
        unsafe { L::load(from).mul(steps).round().store_bytes(to.as_mut_ptr()) };
    }
}

/// AMX.
#[cfg(target_arch = "x86_64")]
mod tiles {
    use std::arch::x86_64::*;

    use super::{Input, Panels};
    use crate::{lanes::Avx512, linear::amx};

    pub(super) struct Int8<'a> {
        pub(super) panels: &'a Panels,
        pub(super) input: &'a Input<'a>,
    }

    impl amx::Product for Int8<'_> {
        unsafe fn sum(two: bool, count: usize, from: [*const u8; 3], sums: *mut f32, fresh: bool) {
            // SAFETY: the caller's promises.
            unsafe { amx::sum_int8(two, count, from, sums, fresh) }
        }

        #[inline(always)]
        unsafe fn values(&self, row: usize, panel: usize, sums: [Avx512; 2]) -> [Avx512; 2] {
            // SAFETY: the caller's promise. The tile's elements are integers.
            let sums = sums.map(|sum| unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_castps_si512(sum.0))) });
            // SAFETY: as above.
            unsafe { self.panels.scale(self.input.scales[row], panel, sums) }
        }
    }
}

/// AVX-512 with dot products of bytes, of which one is unsigned: x is moved up by 128, and 128 times the column's sum
/// taken off again.
#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use super::{BLOCK_BYTES, Input, PANEL, Panels, TILE_ROWS, row_offset};

    /// # Safety
    /// The machine has AVX-512 with VNNI; `rows` rows from `first` on and the panel exist.
    pub(super) unsafe fn tile(
        panels: &Panels,
        input: &Input<'_>,
        panel: usize,
        first: usize,
        rows: usize,
        sums: &mut [[i32; PANEL]; TILE_ROWS],
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            match rows {
                TILE_ROWS => of::<TILE_ROWS>(panels, input, panel, first, sums),
                _ => {
                    for (row, sums) in sums.iter_mut().enumerate().take(rows) {
                        of::<1>(panels, input, panel, first + row, std::slice::from_mut(sums));
                    }
                }
            }
        }
    }

    /// # Safety
    /// As [`tile`], for R rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn of<const R: usize>(
        panels: &Panels,
        input: &Input<'_>,
        panel: usize,
        first: usize,
        sums: &mut [[i32; PANEL]],
    ) {
        let size = input.blocks * BLOCK_BYTES;
        let weights = &panels.weights[panel * size..][..size];
        let columns = &panels.sums[panel * PANEL..][..PANEL];
        // SAFETY: a block of weights is 32 vectors; rows lie inside of `input`, by whole blocks.
        unsafe {
            let mut totals = [[_mm512_setzero_si512(); 2]; R];
            for block in 0..input.blocks {
                let weights = weights.as_ptr().add(block * BLOCK_BYTES);
                let x: [*const i8; R] = std::array::from_fn(|row| {
                    input.rows[row_offset(first + row, block, input.blocks)..].as_ptr()
                });
                for quad in 0..16 {
                    let low = _mm512_loadu_si512(weights.add(quad * 64).cast());
                    let high = _mm512_loadu_si512(weights.add(BLOCK_BYTES / 2 + quad * 64).cast());
                    for (totals, x) in totals.iter_mut().zip(x) {
                        let four = x.add(quad * 4).cast::<i32>().read_unaligned();
                        // Turning the highest bit adds 128.
                        let x = _mm512_set1_epi32(four ^ 0x8080_8080_u32.cast_signed());
                        totals[0] = _mm512_dpbusd_epi32(totals[0], x, low);
                        totals[1] = _mm512_dpbusd_epi32(totals[1], x, high);
                    }
                }
            }
            for (totals, sums) in totals.iter().zip(sums) {
                _mm512_storeu_si512(sums.as_mut_ptr().cast(), totals[0]);
                _mm512_storeu_si512(sums.as_mut_ptr().add(16).cast(), totals[1]);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum -= 128 * column;
                }
            }
        }
    }
}
