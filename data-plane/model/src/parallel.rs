//! Linear layers named by how tensor parallelism splits them: column-parallel layers by their outputs, row-parallel
//! ones by their inputs, so that a pair of the two needs one sum over the ranks, after the second (Megatron-LM,
//! arXiv 1909.08053). Embedding and output are split by the vocabulary.

use std::ops::Range;

use candle_core::Tensor;
use penstock_kernels::{Collective, Cpu, Element, Layer, Linear};

use crate::{
    LoadError, ModelConfig,
    checkpoint::Weights,
    ops::{AllReduce, Mlp, Project},
};

/// Which part of a model a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) rank: usize,
    pub(crate) size: usize,
}

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

/// What a rank holds of one matrix of a checkpoint.
pub(crate) struct Part<'a> {
    /// Rows of the matrix.
    pub(crate) outputs: Range<usize>,
    /// Columns of the matrix.
    pub(crate) inputs: Range<usize>,
    /// Columns that the whole matrix has.
    pub(crate) stride: usize,
    pub(crate) weight: Weights<'a>,
    pub(crate) bias: Option<Weights<'a>>,
}

// === impl Shard ===

impl Shard {
    /// Checks that the model can be split so.
    pub(crate) fn check(config: &ModelConfig, size: usize) -> Loaded<()> {
        let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
        let fits = size > 0 && heads.is_multiple_of(size);
        if fits && (kv_heads.is_multiple_of(size) || size.is_multiple_of(kv_heads)) {
            return Ok(());
        }
        Err(LoadError::TensorParallel {
            size,
            heads,
            kv_heads,
        })
    }

    /// Its part of `count` things; the last ranks may have fewer.
    pub(crate) fn of(self, count: usize) -> Range<usize> {
        let part = count.div_ceil(self.size);
        let at = |rank: usize| (rank * part).min(count);
        at(self.rank)..at(self.rank + 1)
    }

    /// Its query heads.
    pub(crate) fn heads(self, config: &ModelConfig) -> Range<usize> {
        self.of(config.num_heads)
    }

    /// The KV heads that its query heads look at; with more ranks than KV heads, several ranks have the same.
    pub(crate) fn kv_heads(self, config: &ModelConfig) -> Range<usize> {
        let group = config.num_heads / config.num_kv_heads;
        let heads = self.heads(config);
        heads.start / group..heads.end.div_ceil(group)
    }
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

    /// Writes the sums over all ranks.
    pub(crate) fn forward(
        &self,
        cpu: Cpu,
        rows: usize,
        x: &Tensor,
        y: &Tensor,
        ranks: &dyn Collective,
    ) -> candle_core::Result<()> {
        self.0.forward(cpu, rows, x, y)?;
        all_reduce(ranks, rows * self.0.linear.outputs(), y)
    }
}

/// Runs a gated layer and the one after it, and sums over all ranks. `block` is a workspace of at least that many rows of
/// outputs and then of what lies between the two.
pub(crate) fn mlp(
    cpu: Cpu,
    rows: usize,
    x: &Tensor,
    block: &Tensor,
    (gate_up, down): (&ColumnParallel, &RowParallel),
    ranks: &dyn Collective,
) -> candle_core::Result<()> {
    let op = Mlp {
        cpu,
        rows,
        capacity: block.dim(0)?,
        gate_up: gate_up.0.layer(),
        down: down.0.layer(),
    };
    block.inplace_op2(x, &op)?;
    all_reduce(ranks, rows * down.0.linear.outputs(), block)
}

/// Sums the first `values` values of a tensor over all ranks.
pub(crate) fn all_reduce(ranks: &dyn Collective, values: usize, tensor: &Tensor) -> candle_core::Result<()> {
    match ranks.size() {
        1 => Ok(()),
        _ => tensor.inplace_op1(&AllReduce { ranks, values }),
    }
}

// === impl Matrix ===

impl Matrix {
    fn pack(cpu: Cpu, element: Element, inputs: usize, parts: &[Part<'_>], gated: bool) -> Self {
        let row = |index: usize, row: &mut [f32]| {
            let mut index = index;
            for part in parts {
                if index < part.outputs.len() {
                    let start = (part.outputs.start + index) * part.stride + part.inputs.start;
                    return part.weight.read(start, row);
                }
                index -= part.outputs.len();
            }
        };
        let linear = if gated {
            Linear::pack_gated(cpu, element, parts[0].outputs.len(), inputs, &row)
        } else {
            let outputs = parts.iter().map(|part| part.outputs.len()).sum();
            Linear::pack(cpu, element, outputs, inputs, &row)
        };
        let has_bias = parts.iter().any(|part| part.bias.is_some());
        let bias = |part: &Part<'_>| match &part.bias {
            Some(bias) => bias.range(part.outputs.clone()),
            None => vec![0.0; part.outputs.len()],
        };
        Self {
            linear,
            bias: has_bias.then(|| parts.iter().flat_map(bias).collect()),
        }
    }

    fn forward(&self, cpu: Cpu, rows: usize, x: &Tensor, y: &Tensor) -> candle_core::Result<()> {
        let layer = self.layer();
        y.inplace_op2(x, &Project { cpu, rows, layer })
    }

    fn layer(&self) -> Layer<'_> {
        Layer {
            linear: &self.linear,
            bias: self.bias.as_deref(),
        }
    }
}

// === impl Part ===

impl Part<'_> {
    /// Bytes in the file, of which a rank reads its share.
    pub(crate) fn bytes(&self) -> u64 {
        let whole = self.weight.bytes() + self.bias.as_ref().map_or(0, Weights::bytes);
        let share = self.inputs.len() as f64 / self.stride.max(1) as f64;
        let rows = self.weight.elements() / self.stride.max(1);
        (whole as f64 * share * self.outputs.len() as f64 / rows.max(1) as f64) as u64
    }
}

/// What a loader yields.
pub(crate) type Loaded<T> = Result<T, LoadError>;
