//! RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): `y = x / sqrt(mean(x²) + eps) · weight`.

use crate::{
    Cpu,
    lanes::{LANES, Lanes, multiversion},
    shared::SharedMut,
};

/// Rows that are worth a task of their own, in elements.
const TASK_ELEMENTS: usize = 1 << 14;

/// Normalises each row of `x` (`[rows, weight.len()]`) into `y`.
///
/// # Panics
/// The lengths of `x` and `y` differ or are no multiple of `weight`'s.
pub fn rms_norm(cpu: Cpu, y: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    assert!(
        x.len() == y.len() && width > 0 && x.len().is_multiple_of(width),
        "rows have the weight's width"
    );
    let y = SharedMut::new(y);
    cpu.pool
        .run_ranges(x.len() / width, TASK_ELEMENTS.div_ceil(width), &|rows| {
            for row in rows {
                // SAFETY: every row is written by one task.
                let y = unsafe { y.part(row * width, width) };
                // SAFETY: the three slices are `width` long.
                unsafe { norm_row(cpu.isa, y, &x[row * width..][..width], weight, eps) };
            }
        });
}

/// Adds `delta` to the residual stream `x`, then normalises the sum into `y`; all are `[rows, weight.len()]`.
///
/// # Panics
/// The lengths of `x`, `delta` and `y` differ or are no multiple of `weight`'s.
pub fn add_rms_norm(cpu: Cpu, y: &mut [f32], x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    assert!(
        x.len() == y.len() && x.len() == delta.len(),
        "x, delta and y have one shape"
    );
    assert!(
        width > 0 && x.len().is_multiple_of(width),
        "rows have the weight's width"
    );
    let rows = x.len() / width;
    let (x, y) = (SharedMut::new(x), SharedMut::new(y));
    cpu.pool.run_ranges(rows, TASK_ELEMENTS.div_ceil(width), &|rows| {
        for row in rows {
            // SAFETY: every row is written by one task.
            let (x, y) = unsafe { (x.part(row * width, width), y.part(row * width, width)) };
            for (x, delta) in x.iter_mut().zip(&delta[row * width..][..width]) {
                *x += delta;
            }
            // SAFETY: the three slices are `width` long.
            unsafe { norm_row(cpu.isa, y, x, weight, eps) };
        }
    });
}

multiversion! {
    /// # Safety
    /// The slices have one length.
    pub(crate) fn norm_row = norm_row_body(y: &mut [f32], x: &[f32], weight: &[f32], eps: f32);
}

/// # Safety
/// As [`Lanes`]; the slices have one length.
#[inline(always)]
unsafe fn norm_row_body<L: Lanes>(y: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let whole = x.len() - x.len() % LANES;
    // SAFETY: offsets stay below `whole`, which none of the slices is shorter than.
    unsafe {
        let mut squares = L::splat(0.0);
        for at in (0..whole).step_by(LANES) {
            let x = L::load(x.as_ptr().add(at));
            squares = x.mul_add(x, squares);
        }
        let mut sum = squares.sum();
        for x in &x[whole..] {
            sum += x * x;
        }
        let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
        let scales = L::splat(scale);
        for at in (0..whole).step_by(LANES) {
            let x = L::load(x.as_ptr().add(at)).mul(scales);
            x.mul(L::load(weight.as_ptr().add(at)))
                .store(y.as_mut_ptr().add(at));
        }
        for ((y, x), weight) in y[whole..].iter_mut().zip(&x[whole..]).zip(&weight[whole..]) {
            *y = x * scale * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Isa, Pool, reference};

    proptest! {
        #[test]
        fn norms_agree_with_the_reference(rows in 1..5_usize, width in 1..100_usize, seed: u64) {
            let x = reference::noise(seed, rows * width);
            let delta = reference::noise(seed ^ 1, rows * width);
            let weight = reference::noise(seed ^ 2, width);
            let expected = reference::rms_norm(&x, &weight, 1e-5);
            let sums: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
            let expected_of_sums = reference::rms_norm(&sums, &weight, 1e-5);
            for isa in Isa::available() {
                let cpu = Cpu { isa, pool: Pool::process() };
                let mut y = vec![0.0; x.len()];
                rms_norm(cpu, &mut y, &x, &weight, 1e-5);
                reference::assert_close(&y, &expected, 1e-5);
                let mut x = x.clone();
                add_rms_norm(cpu, &mut y, &mut x, &delta, &weight, 1e-5);
                prop_assert_eq!(&x, &sums);
                reference::assert_close(&y, &expected_of_sums, 1e-5);
            }
        }
    }
}
