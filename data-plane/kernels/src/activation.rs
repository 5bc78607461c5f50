//! SwiGLU (Shazeer 2020, arXiv 2002.05202): `silu(gate) · up`, with `silu(x) = x / (1 + e^-x)`. It is part of the
//! linear layer that computes both, so that neither goes to memory; see [`crate::Linear::pack_gated`].

use crate::lanes::Lanes;

/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn swiglu<L: Lanes>(gate: L, up: L) -> L {
    // SAFETY: as this function's.
    unsafe {
        let power = L::splat(0.0).sub(gate).exp();
        gate.div(L::splat(1.0).add(power)).mul(up)
    }
}
