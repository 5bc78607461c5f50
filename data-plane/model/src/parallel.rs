//! Linear layers named by how tensor parallelism splits them: column-parallel layers by their outputs, row-parallel
//! ones by their inputs, so that a pair of the two needs one sum over the ranks, after the second. There is one rank
//! so far, which holds all of each matrix and has nothing to sum.

use candle_core::Tensor;
use penstock_kernels::{Cpu, Element, Linear};

use crate::{LoadError, checkpoint::Weights, ops::Project};

/// A matrix and its bias.
struct Matrix {
    linear: Linear,
    bias: Option<Vec<f32>>,
}

/// Outputs split over the ranks; inputs whole. May be several projections of one input, laid side by side.
pub(crate) struct ColumnParallel(Matrix);

/// Inputs split over the ranks; outputs are partial sums. The residual add follows in a step of its own, which is
/// where the ranks' sums belong.
pub(crate) struct RowParallel(Matrix);

/// One matrix of a checkpoint.
pub(crate) struct Part<'a> {
    pub(crate) outputs: usize,
    pub(crate) weight: Weights<'a>,
    pub(crate) bias: Option<Weights<'a>>,
}

// === impl ColumnParallel ===

impl ColumnParallel {
    pub(crate) fn pack(cpu: Cpu, element: Element, inputs: usize, parts: &[Part<'_>]) -> Self {
        Self(Matrix::pack(cpu, element, inputs, parts, false))
    }

    /// Two projections of one input, of which the first gates the second (SwiGLU).
    pub(crate) fn pack_gated(cpu: Cpu, element: Element, inputs: usize, parts: &[Part<'_>; 2]) -> Self {
        Self(Matrix::pack(cpu, element, inputs, parts, true))
    }

    pub(crate) fn forward(&self, cpu: Cpu, rows: usize, x: &Tensor, y: &Tensor) -> candle_core::Result<()> {
        self.0.forward(cpu, rows, x, y)
    }

    /// The packed matrix.
    pub(crate) fn matrix(&self) -> &Linear {
        &self.0.linear
    }
}

// === impl RowParallel ===

impl RowParallel {
    pub(crate) fn pack(cpu: Cpu, element: Element, inputs: usize, part: Part<'_>) -> Self {
        Self(Matrix::pack(cpu, element, inputs, &[part], false))
    }

    /// The packed matrix.
    pub(crate) fn matrix(&self) -> &Linear {
        &self.0.linear
    }

    pub(crate) fn forward(&self, cpu: Cpu, rows: usize, x: &Tensor, y: &Tensor) -> candle_core::Result<()> {
        self.0.forward(cpu, rows, x, y)
    }
}

// === impl Matrix ===

impl Matrix {
    fn pack(cpu: Cpu, element: Element, inputs: usize, parts: &[Part<'_>], gated: bool) -> Self {
        let row = |index: usize, row: &mut [f32]| {
            let mut index = index;
            for part in parts {
                if index < part.outputs {
                    return part.weight.read_row(index, row);
                }
                index -= part.outputs;
            }
        };
        let linear = if gated {
            Linear::pack_gated(cpu, element, parts[0].outputs, inputs, &row)
        } else {
            let outputs = parts.iter().map(|part| part.outputs).sum();
            Linear::pack(cpu, element, outputs, inputs, &row)
        };
        let has_bias = parts.iter().any(|part| part.bias.is_some());
        let bias = |part: &Part<'_>| match &part.bias {
            Some(bias) => bias.to_vec(part.outputs),
            None => vec![0.0; part.outputs],
        };
        Self {
            linear,
            bias: has_bias.then(|| parts.iter().flat_map(bias).collect()),
        }
    }

    fn forward(&self, cpu: Cpu, rows: usize, x: &Tensor, y: &Tensor) -> candle_core::Result<()> {
        y.inplace_op2(
            x,
            &Project {
                cpu,
                rows,
                linear: &self.linear,
                bias: self.bias.as_deref(),
            },
        )
    }
}

// === impl Part ===

impl Part<'_> {
    /// Bytes in the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.weight.bytes() + self.bias.as_ref().map_or(0, Weights::bytes)
    }
}

/// What a loader yields.
pub(crate) type Loaded<T> = Result<T, LoadError>;
