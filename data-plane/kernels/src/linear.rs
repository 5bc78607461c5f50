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
mod mlp;

pub use mlp::mlp;

use std::ops::Range;

use crate::{
    Cpu,
    activation::swiglu,
    buffer::Buffer,
    lanes::{LANES, Lanes},
    shared::SharedMut,
};

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
    /// Each panel is 16 columns of a gate and the 16 columns that it gates.
    gated: bool,
    panels: Panels,
}

/// A matrix and its bias.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// W.
    pub linear: &'a Linear,
    /// `[n]`, or `[2 n]` of a gated layer.
    pub bias: Option<&'a [f32]>,
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
        Self {
            outputs,
            inputs,
            gated: false,
            panels: Panels::pack(cpu, element, outputs, inputs, row),
        }
    }

    /// Packs a layer whose outputs are `silu(gate) · up`: of `2 · outputs` rows the first half are the gate's. A panel
    /// holds 16 columns of each, so that both meet in registers.
    ///
    /// # Panics
    /// `outputs` or `inputs` is 0.
    pub fn pack_gated(
        cpu: Cpu,
        element: Element,
        outputs: usize,
        inputs: usize,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        assert!(outputs > 0 && inputs > 0, "a matrix has rows and columns");
        let column_of = |column: usize, values: &mut [f32]| {
            let (output, is_up) = (column / PANEL * LANES + column % LANES, column % PANEL >= LANES);
            match output < outputs {
                true => row(output + usize::from(is_up) * outputs, values),
                false => values.fill(0.0),
            }
        };
        let columns = 2 * outputs.next_multiple_of(LANES);
        Self {
            outputs,
            inputs,
            gated: true,
            panels: Panels::pack(cpu, element, columns, inputs, &column_of),
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

    /// Computes `y = x Wᵀ + b`, or of a gated layer `y = silu(x Gᵀ + b₁) · (x Uᵀ + b₂)`.
    ///
    /// # Panics
    /// `x` is not `[m, k]` or `y` not `[m, n]` for one m, or `bias` not `[n]` (`[2 n]` where gated).
    pub fn forward(&self, cpu: Cpu, y: &mut [f32], x: &[f32], bias: Option<&[f32]>) {
        let layer = Layer { linear: self, bias };
        let rows = layer.rows(x, y);
        if rows == 0 {
            return;
        }
        let call = Call::new(layer, rows, y);
        match &self.panels {
            Panels::F32(panels) => f32::forward(cpu, panels, x, &call),
            Panels::Bf16(panels) => bf16::forward(cpu, panels, x, &call),
            Panels::Int8(panels) => panels.forward(cpu, x, &call),
        }
    }

    /// Writes row `index` of W as it is kept, for a matrix that is an embedding as well.
    ///
    /// # Panics
    /// There is no such row, `row` is not `[k]`, or the layer is gated.
    pub fn row(&self, index: usize, row: &mut [f32]) {
        assert!(
            index < self.outputs && row.len() == self.inputs && !self.gated,
            "the row exists and has k columns"
        );
        match &self.panels {
            Panels::F32(panels) => f32::read_row(panels, index, row),
            Panels::Bf16(panels) => bf16::read_row(panels, index, row),
            Panels::Int8(panels) => panels.read_row(index, row),
        }
    }
}

// === impl Panels ===

impl Panels {
    fn pack(
        cpu: Cpu,
        element: Element,
        columns: usize,
        inputs: usize,
        row: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Self {
        match element {
            Element::F32 => {
                let mut panels = Buffer::zeroed(columns.div_ceil(PANEL) * PANEL * inputs);
                pack_panels(cpu, &mut panels, columns, inputs, row, |panel, index, row| {
                    f32::pack_row(panel, index % PANEL, row);
                });
                Self::F32(panels)
            }
            Element::Bf16 => {
                let mut panels = Buffer::zeroed(columns.div_ceil(PANEL) * PANEL * bf16::padded(inputs));
                pack_panels(cpu, &mut panels, columns, inputs, row, |panel, index, row| {
                    bf16::pack_row(panel, index % PANEL, row);
                });
                Self::Bf16(panels)
            }
            Element::Int8 => Self::Int8(int8::Panels::pack(cpu, columns, inputs, row)),
        }
    }
}

/// One call of [`Linear::forward`], as its kernels see it.
struct Call<'a> {
    linear: &'a Linear,
    rows: usize,
    y: SharedMut<'a, f32>,
    bias: Option<&'a [f32]>,
    /// Where a gated layer's results go instead of y: rounded, as the tiles of the next layer take them.
    tiles: Option<SharedMut<'a, u16>>,
}

// === impl Layer ===

impl Layer<'_> {
    /// Rows of an input and an output.
    ///
    /// # Panics
    /// As [`Linear::forward`].
    fn rows(&self, x: &[f32], y: &[f32]) -> usize {
        let Self { linear, bias } = self;
        let rows = x.len() / linear.inputs;
        assert!(
            x.len() == rows * linear.inputs && y.len() == rows * linear.outputs,
            "x is [m, k], y is [m, n]"
        );
        assert!(
            bias.is_none_or(|bias| bias.len() == linear.outputs * (1 + usize::from(linear.gated))),
            "the bias is [n], or [2 n] of a gated layer"
        );
        rows
    }
}

// === impl Call ===

impl<'a> Call<'a> {
    fn new(layer: Layer<'a>, rows: usize, y: &'a mut [f32]) -> Self {
        Self {
            linear: layer.linear,
            rows,
            y: SharedMut::new(y),
            bias: layer.bias,
            tiles: None,
        }
    }

    /// Runs `run` for ranges of panels, in parallel where it is worth it.
    fn for_panels(&self, cpu: Cpu, run: &(dyn Fn(Range<usize>) + Sync)) {
        let work = self.rows * self.linear.inputs * PANEL;
        let panels = self.linear.outputs.div_ceil(self.outputs_of_panel());
        cpu.pool.run_ranges(panels, TASK_WORK.div_ceil(work), run);
    }

    fn outputs_of_panel(&self) -> usize {
        if self.linear.gated { LANES } else { PANEL }
    }

    /// Writes one row of one panel, less its padding, with the bias added, and gated where the layer is.
    ///
    /// # Safety
    /// As [`Lanes`]; no other thread writes this row of this panel.
    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, row: usize, panel: usize, values: [L; 2]) {
        let outputs = self.linear.outputs;
        let first = panel * self.outputs_of_panel();
        // SAFETY: parts are at most 16 long and lie inside of the row; the rest is the caller's promise.
        unsafe {
            if self.linear.gated {
                let len = LANES.min(outputs - first);
                return store_part(self.gate(panel, values), self.y.part(row * outputs + first, len));
            }
            for (half, value) in values.into_iter().enumerate() {
                let first = first + half * LANES;
                let len = LANES.min(outputs.saturating_sub(first));
                if len == 0 {
                    return;
                }
                let value = match self.bias {
                    Some(bias) => value.add(load_part(&bias[first..][..len])),
                    None => value,
                };
                store_part(value, self.y.part(row * outputs + first, len));
            }
        }
    }

    /// Gates a row of a panel of a gated layer: 16 outputs, and zeros beyond the last one.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    unsafe fn gate<L: Lanes>(&self, panel: usize, [mut gate, mut up]: [L; 2]) -> L {
        let outputs = self.linear.outputs;
        let first = panel * LANES;
        let len = LANES.min(outputs - first);
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(bias) = self.bias {
                gate = gate.add(load_part(&bias[first..][..len]));
                up = up.add(load_part(&bias[outputs + first..][..len]));
            }
            swiglu(gate, up)
        }
    }
}

/// Up to 16 floats, and zeros.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn load_part<L: Lanes>(from: &[f32]) -> L {
    // SAFETY: 16 floats are there, in the slice or in the array.
    unsafe {
        if from.len() == LANES {
            return L::load(from.as_ptr());
        }
        let mut padded = [0.0; LANES];
        padded[..from.len()].copy_from_slice(from);
        L::load(padded.as_ptr())
    }
}

/// The first of 16 floats.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn store_part<L: Lanes>(value: L, to: &mut [f32]) {
    // SAFETY: there is room for 16 floats, in the slice or in the array.
    unsafe {
        if to.len() == LANES {
            return value.store(to.as_mut_ptr());
        }
        let mut padded = [0.0; LANES];
        value.store(padded.as_mut_ptr());
        to.copy_from_slice(&padded[..to.len()]);
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
