//! f32 weights in panels `[k][32]`.

use super::{Call, PANEL};
use crate::{
    Cpu, Isa,
    lanes::{LANES, Lanes, multiversion},
};

/// Rows of x that stay in the second-level cache while the panels of a task pass by.
const ROW_BLOCK: usize = 128;

pub(super) fn pack_row(panel: &mut [f32], column: usize, row: &[f32]) {
    for (k, &weight) in row.iter().enumerate() {
        panel[k * PANEL + column] = weight;
    }
}

pub(super) fn read_row(panels: &[f32], index: usize, row: &mut [f32]) {
    let panel = &panels[index / PANEL * PANEL * row.len()..];
    for (k, weight) in row.iter_mut().enumerate() {
        *weight = panel[k * PANEL + index % PANEL];
    }
}

pub(super) fn forward(cpu: Cpu, panels: &[f32], x: &[f32], call: &Call<'_>) {
    call.for_panels(cpu, &|range| {
        for first in (0..call.rows).step_by(ROW_BLOCK) {
            for panel in range.clone() {
                rows(
                    cpu.isa,
                    panels,
                    x,
                    call,
                    panel,
                    first,
                    ROW_BLOCK.min(call.rows - first),
                );
            }
        }
    });
}

/// `count` rows from `first` on, of one panel.
fn rows(isa: Isa, panels: &[f32], x: &[f32], call: &Call<'_>, panel: usize, first: usize, count: usize) {
    let k = call.linear.inputs;
    let weights = &panels[panel * PANEL * k..][..PANEL * k];
    let x = &x[first * k..][..count * k];
    // SAFETY: `weights` is a panel and `x` has `count` rows; the task owns this panel's columns of y.
    unsafe { tiles(isa, weights, x, call, panel, first) };
}

multiversion! {
    /// # Safety
    /// `weights` is `[k][32]`, `x` `[rows][k]`, and no other thread writes this panel of these rows.
    fn tiles = tiles_body(weights: &[f32], x: &[f32], call: &Call<'_>, panel: usize, first: usize);
}

/// # Safety
/// As [`Lanes`] and [`tiles`].
#[inline(always)]
unsafe fn tiles_body<L: Lanes>(weights: &[f32], x: &[f32], call: &Call<'_>, panel: usize, first: usize) {
    let k = call.linear.inputs;
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
    weights: &[f32],
    x: *const f32,
    call: &Call<'_>,
    panel: usize,
    first: usize,
) {
    let k = call.linear.inputs;
    // SAFETY: the panel has k rows of 32, x has R rows of k; `values` holds R rows of 32.
    unsafe {
        let mut sums = [[L::splat(0.0); 2]; R];
        let mut weight = weights.as_ptr();
        for at in 0..k {
            let (low, high) = (L::load(weight), L::load(weight.add(LANES)));
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*x.add(row * k + at));
                sums[0] = low.mul_add(x, sums[0]);
                sums[1] = high.mul_add(x, sums[1]);
            }
            weight = weight.add(PANEL);
        }
        for (row, sums) in sums.into_iter().enumerate() {
            call.write(first + row, panel, sums);
        }
    }
}
