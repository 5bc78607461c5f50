//! bf16 weights in panels `[k / 32][2][16][16][2]`: blocks of 32 k, in each two tiles of 16 columns, in each 16 rows
//! of one pair of k, in each 16 columns of two. That is what a tile register takes, and a row is a vector of pairs
//! for the other instruction sets. k is padded with zeros to a multiple of 32.

use std::cell::RefCell;

use half::bf16;

use super::{Call, PANEL};
use crate::{
    Cpu,
    buffer::Buffer,
    lanes::{Lanes, multiversion},
};

/// k of a block.
pub(super) const BLOCK: usize = 32;
/// Elements of a tile: 16 pairs of k, 16 columns.
pub(super) const TILE: usize = 512;
/// Rows of x that stay in the second-level cache while the panels of a task pass by.
const ROW_BLOCK: usize = 128;

pub(super) fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(BLOCK)
}

/// Where k of a column lies in its panel.
fn offset(k: usize, column: usize) -> usize {
    let (block, pair, second) = (k / BLOCK, k % BLOCK / 2, k % 2);
    (block * 2 + column / 16) * TILE + pair * 32 + column % 16 * 2 + second
}

pub(super) fn pack_row(panel: &mut [u16], column: usize, row: &[f32]) {
    for (k, &weight) in row.iter().enumerate() {
        panel[offset(k, column)] = bf16::from_f32(weight).to_bits();
    }
}

pub(super) fn read_row(panels: &[u16], index: usize, row: &mut [f32]) {
    let panel = &panels[index / PANEL * PANEL * padded(row.len())..];
    for (k, weight) in row.iter_mut().enumerate() {
        *weight = bf16::from_bits(panel[offset(k, index % PANEL)]).to_f32();
    }
}

pub(super) fn forward(cpu: Cpu, panels: &[u16], x: &[f32], call: &Call<'_>) {
    #[cfg(target_arch = "x86_64")]
    if cpu.isa.level() == crate::isa::Level::Amx {
        // SAFETY: an Isa of this level exists only where the machine has AVX-512 with BF16 and usable tiles.
        return unsafe { super::amx::forward(cpu, panels, x, call) };
    }
    forward_in_lanes(cpu, panels, x, call);
}

fn forward_in_lanes(cpu: Cpu, panels: &[u16], x: &[f32], call: &Call<'_>) {
    thread_local! {
        /// The rounded input of a call, kept between calls.
        static ROUNDED: RefCell<Buffer<f32>> = RefCell::new(Buffer::zeroed(0));
    }
    let k = padded(call.linear.inputs);
    ROUNDED.with_borrow_mut(|buffer| {
        let rounded = buffer.at_least(call.rows * k);
        for (to, from) in rounded
            .chunks_exact_mut(k)
            .zip(x.chunks_exact(call.linear.inputs))
        {
            let (to, padding) = to.split_at_mut(from.len());
            padding.fill(0.0);
            for (to, &from) in to.iter_mut().zip(from) {
                *to = bf16::from_f32(from).to_f32();
            }
        }
        let rounded = &*rounded;
        call.for_panels(cpu, &|range| {
            for first in (0..call.rows).step_by(ROW_BLOCK) {
                let x = &rounded[first * k..][..ROW_BLOCK.min(call.rows - first) * k];
                for panel in range.clone() {
                    let weights = &panels[panel * PANEL * k..][..PANEL * k];
                    // SAFETY: `weights` is a panel, `x` whole rows; the task owns this panel's columns of y.
                    unsafe { tiles(cpu.isa, weights, x, call, panel, first) };
                }
            }
        });
    });
}

multiversion! {
    /// # Safety
    /// `weights` is a panel, `x` `[rows][k]` with k padded, and no other thread writes this panel of these rows.
    fn tiles = tiles_body(weights: &[u16], x: &[f32], call: &Call<'_>, panel: usize, first: usize);
}

/// # Safety
/// As [`Lanes`] and [`tiles`].
#[inline(always)]
unsafe fn tiles_body<L: Lanes>(weights: &[u16], x: &[f32], call: &Call<'_>, panel: usize, first: usize) {
    let k = padded(call.linear.inputs);
    let (rows, mut row) = (x.len() / k, 0);
    // SAFETY: a tile of R rows starts only where R rows are left.
    unsafe {
        if L::MANY_REGISTERS {
            while rows - row >= 8 {
                tile::<L, 8>(weights, x.as_ptr().add(row * k), call, panel, first + row);
                row += 8;
            }
            if rows - row >= 4 {
                tile::<L, 4>(weights, x.as_ptr().add(row * k), call, panel, first + row);
                row += 4;
            }
        }
        while rows - row >= 2 {
            tile::<L, 2>(weights, x.as_ptr().add(row * k), call, panel, first + row);
            row += 2;
        }
        if row < rows {
            tile::<L, 1>(weights, x.as_ptr().add(row * k), call, panel, first + row);
        }
    }
}

/// # Safety
/// As [`tiles`], for R rows at `x`.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize>(
    weights: &[u16],
    x: *const f32,
    call: &Call<'_>,
    panel: usize,
    first: usize,
) {
    let k = padded(call.linear.inputs);
    // SAFETY: the panel has k / 32 blocks of two tiles, x has R rows of k; `values` holds a row of 32.
    unsafe {
        let mut sums = [[L::splat(0.0); 2]; R];
        for block in 0..k / BLOCK {
            let tiles = weights.as_ptr().add(block * 2 * TILE);
            for pair in 0..BLOCK / 2 {
                let low = L::load_bf16_pairs(tiles.add(pair * 32));
                let high = L::load_bf16_pairs(tiles.add(TILE + pair * 32));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = x.add(row * k + block * BLOCK + pair * 2);
                    let (first, second) = (L::splat(*x), L::splat(*x.add(1)));
                    sums[0] = low.1.mul_add(second, low.0.mul_add(first, sums[0]));
                    sums[1] = high.1.mul_add(second, high.0.mul_add(first, sums[1]));
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            call.write(first + row, panel, sums);
        }
    }
}
