//! Linear layers with packed weights: `y = x Wᵀ + b`, x `[m, k]`, W `[n, k]`, y `[m, n]`, x and y in f32.
//!
//! Weights are packed once, when they are loaded, into panels of 32 output columns, so that a kernel reads them
//! front to back. Each element of y is one chain of multiply-adds over k in ascending order, whatever m is and
//! however the work is split: rows do not depend on each other, bit by bit.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
mod bf16;
mod f32;
mod int8;

use std::ops::Range;

use crate::{Cpu, buffer::Buffer, shared::SharedMut};

/// Output columns of a panel.
pub(crate) const PANEL: usize = 32;
/// Multiply-adds that are worth a task of their own.
const TASK_WORK: usize = 1 << 18;

/// What weights are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// bfloat16. Inputs are rounded to it as well; products are summed in f32.
    Bf16,
    /// 8-bit integers with a scale per output. Inputs are rounded to them as well, with a scale per row; products are
    /// summed in 32-bit integers, exactly. See the source for the error.
    Int8,
}

/// A packed weight matrix.
#[derive(Debug)]
pub struct Linear {
    outputs: usize,
    inputs: usize,
    panels: Panels,
}

#[derive(Debug)]
enum Panels {
    /// `[n / 32][k][32]`.
    F32(Buffer<f32>),
    /// See [`bf16`].
    Bf16(Buffer<u16>),
    /// See [`int8`].
    Int8(int8::Panels),
}

// === impl Linear ===

impl Linear {
    /// Packs `outputs` rows of `inputs` weights each; `row` writes the row of an index.
    ///
    /// # Panics
    /// `outputs` or `inputs` is 0.
    pub fn pack(
        cpu: Cpu,
        element: Element,
        outputs: usize,
        inputs: usize,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        assert!(outputs > 0 && inputs > 0, "a matrix has rows and columns");
        let panels = match element {
            Element::F32 => {
                let mut panels = Buffer::zeroed(outputs.div_ceil(PANEL) * PANEL * inputs);
                pack_panels(cpu, &mut panels, outputs, inputs, row, |panel, index, row| {
                    f32::pack_row(panel, index % PANEL, row);
                });
                Panels::F32(panels)
            }
            Element::Bf16 => {
                let mut panels = Buffer::zeroed(outputs.div_ceil(PANEL) * PANEL * bf16::padded(inputs));
                pack_panels(cpu, &mut panels, outputs, inputs, row, |panel, index, row| {
                    bf16::pack_row(panel, index % PANEL, row);
                });
                Panels::Bf16(panels)
            }
            Element::Int8 => Panels::Int8(int8::Panels::pack(cpu, outputs, inputs, row)),
        };
        Self {
            outputs,
            inputs,
            panels,
        }
    }

    /// Output columns, n.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Input columns, k.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes of the packed weights, which a call reads once or more.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(&panels[..]),
            Panels::Bf16(panels) => size_of_val(&panels[..]),
            Panels::Int8(panels) => panels.bytes(),
        }
    }

    /// Computes `y = x Wᵀ + b`.
    ///
    /// # Panics
    /// `x` is not `[m, k]` or `y` not `[m, n]` for one m, or `bias` not `[n]`.
    pub fn forward(&self, cpu: Cpu, y: &mut [f32], x: &[f32], bias: Option<&[f32]>) {
        let rows = x.len() / self.inputs;
        assert!(
            x.len() == rows * self.inputs && y.len() == rows * self.outputs,
            "x is [m, k], y is [m, n]"
        );
        assert!(
            bias.is_none_or(|bias| bias.len() == self.outputs),
            "the bias is [n]"
        );
        if rows == 0 {
            return;
        }
        let call = Call {
            linear: self,
            rows,
            y: SharedMut::new(y),
            bias,
        };
        match &self.panels {
            Panels::F32(panels) => f32::forward(cpu, panels, x, &call),
            Panels::Bf16(panels) => bf16::forward(cpu, panels, x, &call),
            Panels::Int8(panels) => panels.forward(cpu, x, &call),
        }
    }

    /// Writes row `index` of W as it is kept, for a matrix that is an embedding as well.
    ///
    /// # Panics
    /// There is no such row, or `row` is not `[k]`.
    pub fn row(&self, index: usize, row: &mut [f32]) {
        assert!(
            index < self.outputs && row.len() == self.inputs,
            "the row exists and has k columns"
        );
        match &self.panels {
            Panels::F32(panels) => f32::read_row(panels, index, row),
            Panels::Bf16(panels) => bf16::read_row(panels, index, row),
            Panels::Int8(panels) => panels.read_row(index, row),
        }
    }
}

/// One call of [`Linear::forward`], as its kernels see it.
struct Call<'a> {
    linear: &'a Linear,
    rows: usize,
    y: SharedMut<'a, f32>,
    bias: Option<&'a [f32]>,
}

// === impl Call ===

impl Call<'_> {
    /// Runs `run` for ranges of panels, in parallel where it is worth it.
    fn for_panels(&self, cpu: Cpu, run: &(dyn Fn(Range<usize>) + Sync)) {
        let work = self.rows * self.linear.inputs * PANEL;
        cpu.pool
            .run_ranges(self.linear.outputs.div_ceil(PANEL), TASK_WORK.div_ceil(work), run);
    }

    /// Writes one row of one panel, less its padding, with the bias added.
    ///
    /// # Safety
    /// No other thread writes this row of this panel.
    #[inline(always)]
    unsafe fn write(&self, row: usize, panel: usize, values: &[f32; PANEL]) {
        let outputs = self.linear.outputs;
        let first = panel * PANEL;
        let len = PANEL.min(outputs - first);
        // SAFETY: the caller's promise.
        let y = unsafe { self.y.part(row * outputs + first, len) };
        match self.bias {
            None => match <&mut [f32; PANEL]>::try_from(&mut *y) {
                // Of a known length: a few moves instead of a call.
                Ok(y) => *y = *values,
                Err(_) => y.copy_from_slice(&values[..len]),
            },
            Some(bias) => {
                for ((y, value), bias) in y.iter_mut().zip(values).zip(&bias[first..]) {
                    *y = value + bias;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Call<'_> {
    /// [`Call::write`] from registers.
    ///
    /// # Safety
    /// AVX-512; no other thread writes this row of this panel.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn write_vectors(&self, row: usize, panel: usize, mut values: [std::arch::x86_64::__m512; 2]) {
        use std::arch::x86_64::*;
        let (outputs, first) = (self.linear.outputs, panel * PANEL);
        // SAFETY: whole panels lie inside of the row and of the bias; the rest is the caller's promise.
        unsafe {
            if outputs - first < PANEL {
                let mut array = [0.0; PANEL];
                _mm512_storeu_ps(array.as_mut_ptr(), values[0]);
                _mm512_storeu_ps(array.as_mut_ptr().add(16), values[1]);
                return self.write(row, panel, &array);
            }
            if let Some(bias) = self.bias {
                let bias = bias[first..][..PANEL].as_ptr();
                values[0] = _mm512_add_ps(values[0], _mm512_loadu_ps(bias));
                values[1] = _mm512_add_ps(values[1], _mm512_loadu_ps(bias.add(16)));
            }
            let y = self.y.part(row * outputs + first, PANEL).as_mut_ptr();
            _mm512_storeu_ps(y, values[0]);
            _mm512_storeu_ps(y.add(16), values[1]);
        }
    }
}

/// Fills panels from rows, in parallel; `pack_row` gets a row's panel, its index and its weights.
fn pack_panels<T: Send>(
    cpu: Cpu,
    panels: &mut [T],
    outputs: usize,
    inputs: usize,
    row: &(dyn Fn(usize, &mut [f32]) + Sync),
    pack_row: impl Fn(&mut [T], usize, &[f32]) + Sync,
) {
    let count = outputs.div_ceil(PANEL);
    let size = panels.len() / count;
    let panels = SharedMut::new(panels);
    cpu.pool.run_ranges(count, 1, &|range| {
        let mut values = vec![0.0; inputs];
        for panel in range {
            // SAFETY: every panel is written by one task.
            let packed = unsafe { panels.part(panel * size, size) };
            for column in 0..PANEL.min(outputs - panel * PANEL) {
                row(panel * PANEL + column, &mut values);
                pack_row(packed, panel * PANEL + column, &values);
            }
        }
    });
}

#[cfg(test)]
mod tests;
