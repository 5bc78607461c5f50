//! SwiGLU (Shazeer 2020, arXiv 2002.05202): `silu(gate) · up`, with `silu(x) = x / (1 + e^-x)`.

use crate::{
    Cpu,
    lanes::{LANES, Lanes, multiversion},
    shared::SharedMut,
};

/// Rows that are worth a task of their own, in elements.
const TASK_ELEMENTS: usize = 1 << 13;

/// `gate_up` is `[rows, 2 · width]`, each row the gate and then what it gates; `y` becomes `[rows, width]`.
///
/// # Panics
/// `gate_up` is not twice as long as `y`, or `width` does not divide `y`'s length.
pub fn swiglu(cpu: Cpu, y: &mut [f32], gate_up: &[f32], width: usize) {
    assert!(
        gate_up.len() == 2 * y.len() && width > 0 && y.len().is_multiple_of(width),
        "rows of gate and up"
    );
    let rows = y.len() / width;
    let y = SharedMut::new(y);
    cpu.pool.run_ranges(rows, TASK_ELEMENTS.div_ceil(width), &|rows| {
        for row in rows {
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            // SAFETY: every row is written by one task; the three slices are `width` long.
            unsafe { swiglu_row(cpu.isa, y.part(row * width, width), gate, up) };
        }
    });
}

multiversion! {
    /// # Safety
    /// The slices have one length.
    fn swiglu_row = swiglu_row_body(y: &mut [f32], gate: &[f32], up: &[f32]);
}

/// # Safety
/// As [`Lanes`]; the slices have one length.
#[inline(always)]
unsafe fn swiglu_row_body<L: Lanes>(y: &mut [f32], gate: &[f32], up: &[f32]) {
    let whole = y.len() - y.len() % LANES;
    // SAFETY: offsets stay below `whole`, which none of the slices is shorter than; the tail's arrays hold 16.
    unsafe {
        for at in (0..whole).step_by(LANES) {
            let value = gated::<L>(gate.as_ptr().add(at), up.as_ptr().add(at));
            value.store(y.as_mut_ptr().add(at));
        }
        let rest = y.len() - whole;
        if rest > 0 {
            let (mut gates, mut ups) = ([0.0; LANES], [0.0; LANES]);
            gates[..rest].copy_from_slice(&gate[whole..]);
            ups[..rest].copy_from_slice(&up[whole..]);
            gated::<L>(gates.as_ptr(), ups.as_ptr()).store(gates.as_mut_ptr());
            y[whole..].copy_from_slice(&gates[..rest]);
        }
    }
}

/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn gated<L: Lanes>(gate: *const f32, up: *const f32) -> L {
    // SAFETY: as this function's.
    unsafe {
        let gate = L::load(gate);
        let power = L::splat(0.0).sub(gate).exp();
        gate.div(L::splat(1.0).add(power)).mul(L::load(up))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Isa, Pool, reference};

    proptest! {
        #[test]
        fn swiglu_agrees_with_the_reference(rows in 1..5_usize, width in 1..70_usize, scale in 0.1..60_f32, seed: u64) {
            let gate_up: Vec<f32> =
                reference::noise(seed, rows * width * 2).into_iter().map(|value| value * scale).collect();
            let expected = reference::swiglu(&gate_up, width);
            for isa in Isa::available() {
                let mut y = vec![0.0; rows * width];
                swiglu(Cpu { isa, pool: Pool::process() }, &mut y, &gate_up, width);
                reference::assert_close(&y, &expected, 1e-5);
            }
        }
    }
}
