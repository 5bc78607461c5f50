//! A gated layer and the layer that takes its outputs, in one call.

use super::Layer;
use crate::Cpu;

/// Computes `y = down(gate_up(x))`, bit by bit what [`Linear::forward`](super::Linear::forward) of one and then of the
/// other yields; x is `[m, gate_up.inputs()]`, y `[m, down.outputs()]`. Where both run in tiles of bf16, the values
/// between them are rounded once, as they come, and never lie in memory as f32; elsewhere `between` holds them, `[m,
/// gate_up.outputs()]`.
///
/// # Panics
/// `gate_up` is not gated, `down` does not take its outputs, or a slice has not the length that the layers ask for.
pub fn mlp(cpu: Cpu, y: &mut [f32], between: &mut [f32], x: &[f32], gate_up: Layer<'_>, down: Layer<'_>) {
    assert!(
        gate_up.linear.gated && gate_up.linear.outputs == down.linear.inputs,
        "the first layer is gated, and the second takes its outputs"
    );
    #[cfg(target_arch = "x86_64")]
    if cpu.isa.level() == crate::isa::Level::Amx
        && let (super::Panels::Bf16(first), super::Panels::Bf16(second)) =
            (&gate_up.linear.panels, &down.linear.panels)
    {
        let rows = gate_up.rows(x, between);
        assert!(
            down.rows(between, y) == rows,
            "x, y and what lies between have as many rows"
        );
        if rows > 0 {
            // SAFETY: an Isa of this level exists only where the machine has AVX-512 with BF16 and usable tiles; the
            // shapes fit each other.
            unsafe { super::amx::forward_mlp(cpu, y, x, rows, (first, gate_up), (second, down)) };
        }
        return;
    }
    gate_up.linear.forward(cpu, between, x, gate_up.bias);
    down.linear.forward(cpu, y, between, down.bias);
}
