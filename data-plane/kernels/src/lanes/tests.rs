use super::*;
use crate::Isa;

/// # Safety
/// As [`Lanes`]; `values` is read and written 16 at a time.
#[inline(always)]
unsafe fn exp_all<L: Lanes>(values: &mut [f32]) {
    for lanes in values.chunks_exact_mut(LANES) {
        // SAFETY: a chunk holds 16.
        unsafe { L::load(lanes.as_ptr()).exp().store(lanes.as_mut_ptr()) };
    }
}

multiversion! { fn exp = exp_all(values: &mut [f32]); }

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    for isa in Isa::available() {
        let inputs: Vec<f32> = (0..16 * 1000)
            .map(|i| -87.0 + i as f32 * (175.0 / 16_000.0))
            .collect();
        let mut outputs = inputs.clone();
        // SAFETY: the length is a multiple of 16.
        unsafe { exp(isa, &mut outputs) };
        for (x, y) in inputs.iter().zip(&outputs) {
            let expected = f64::from(*x).exp();
            assert!(
                (f64::from(*y) - expected).abs() <= 2.5e-7 * expected,
                "{isa:?}: exp({x}) = {y}"
            );
        }
    }
}

#[test]
fn exp_is_exact_where_masks_need_it() {
    for isa in Isa::available() {
        let mut values = [0.0; LANES];
        values[1] = f32::NEG_INFINITY;
        values[2] = -1e30;
        // SAFETY: the length is 16.
        unsafe { exp(isa, &mut values) };
        assert_eq!(&values[..4], &[1.0, 0.0, 0.0, 1.0], "{isa:?}");
    }
}
