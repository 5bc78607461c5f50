//! The decoder, or one rank's part of it: Llama, Mistral, Qwen2 and Qwen3 are one definition with switches (biases, norms of q and k, windows).

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use penstock_kernels::{AttentionSequence, CacheShape, Collective, Cpu, QkvShape, prefer_huge_pages};

use crate::{
    Batch, ModelConfig,
    ops::{AddNorm, Attend, Embed, Norm, RotateHeads, Select, StoreKv},
    parallel::{ColumnParallel, RowParallel, Shard, all_reduce, mlp},
};

mod load;
pub(crate) use load::load;

/// All weights of a rank, packed.
pub(crate) struct Decoder {
    cpu: Cpu,
    ranks: Arc<dyn Collective>,
    /// The ids whose embeddings and logits this rank has.
    vocabulary: Range<usize>,
    /// `[vocabulary, hidden]`; a single 0 where the embedding is tied to the output.
    embedding: Tensor,
    tied: bool,
    layers: Vec<Layer>,
    norm: Tensor,
    output: ColumnParallel,
    /// `[positions, head_dim]`.
    angles: Tensor,
    hidden_size: usize,
    intermediate_size: usize,
    shape: QkvShape,
    eps: f32,
}

struct Layer {
    attention_norm: Tensor,
    qkv: ColumnParallel,
    /// Positions that a token sees; `None`: all up to its own.
    window: Option<usize>,
    /// `[2, head_dim]`: norms of the heads of q and of k.
    head_norms: Option<Tensor>,
    attention_output: RowParallel,
    mlp_norm: Tensor,
    /// Gate and up, and the gating.
    gate_up: ColumnParallel,
    down: RowParallel,
}

/// One step's rows as the decoder sees them.
pub(crate) struct Step<'a> {
    pub(crate) batch: &'a Batch,
    /// Slot in the cache of each token.
    pub(crate) slots: &'a [usize],
    pub(crate) sequences: &'a [AttentionSequence<'a>],
    /// Tokens whose logits are wanted.
    pub(crate) logit_rows: &'a [usize],
}

/// Activations of a step, reused between steps.
pub(crate) struct Workspace {
    capacity: usize,
    /// `[2, capacity, hidden]`: the residual stream, and the same normalised.
    stream: Tensor,
    /// The second half of `stream`.
    normed: Tensor,
    /// `[capacity, qkv width]`.
    qkv: Tensor,
    /// `[capacity, heads · head_dim]`.
    attended: Tensor,
    /// What a block adds to the stream, `[capacity, hidden]`, and then what an MLP has in between, `[capacity,
    /// intermediate]`.
    block: Tensor,
    /// The first part of `block`.
    delta: Tensor,
    logit_capacity: usize,
    /// `[logit capacity, hidden]`.
    selected: Tensor,
    /// `[logit capacity, vocabulary]`.
    logits: Tensor,
}

// === impl Decoder ===

impl Decoder {
    /// Bytes of all packed matrices.
    pub(crate) fn matrix_bytes(&self) -> usize {
        let layer = |layer: &Layer| {
            layer.qkv.matrix().bytes()
                + layer.attention_output.matrix().bytes()
                + layer.gate_up.matrix().bytes()
                + layer.down.matrix().bytes()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.output.matrix().bytes()
    }

    /// Runs a step; the logits of its rows are in the workspace afterwards.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        cache: &[Tensor],
        cache_shape: CacheShape,
        workspace: &mut Workspace,
    ) -> candle_core::Result<()> {
        let rows = step.batch.tokens.len();
        workspace.reserve(self, rows, step.logit_rows.len())?;
        let (work, cpu, capacity) = (&*workspace, self.cpu, workspace.capacity);
        let norm = || Norm {
            cpu,
            rows,
            width: self.hidden_size,
            capacity,
            eps: self.eps,
        };
        let tied = self.tied.then(|| self.output.matrix());
        work.stream.inplace_op2(
            &self.embedding,
            &Embed {
                ids: &step.batch.tokens,
                width: self.hidden_size,
                vocabulary: self.vocabulary.clone(),
                tied,
            },
        )?;
        all_reduce(&*self.ranks, rows * self.hidden_size, &work.stream)?;
        for (index, layer) in self.layers.iter().enumerate() {
            match index {
                0 => work.stream.inplace_op2(&layer.attention_norm, &norm())?,
                _ => work
                    .stream
                    .inplace_op3(&work.delta, &layer.attention_norm, &AddNorm(norm()))?,
            }
            self.attention(layer, step, &cache[index], cache_shape, work)?;
            work.stream
                .inplace_op3(&work.delta, &layer.mlp_norm, &AddNorm(norm()))?;
            mlp(
                cpu,
                rows,
                &work.normed,
                &work.block,
                (&layer.gate_up, &layer.down),
                &*self.ranks,
            )?;
        }
        if step.logit_rows.is_empty() {
            return Ok(());
        }
        work.stream
            .inplace_op3(&work.delta, &self.norm, &AddNorm(norm()))?;
        let select = Select {
            indices: step.logit_rows,
            width: self.hidden_size,
        };
        work.selected.inplace_op2(&work.normed, &select)?;
        self.output
            .forward(cpu, step.logit_rows.len(), &work.selected, &work.logits)
    }

    fn attention(
        &self,
        layer: &Layer,
        step: &Step<'_>,
        cache: &Tensor,
        cache_shape: CacheShape,
        work: &Workspace,
    ) -> candle_core::Result<()> {
        let (cpu, shape, rows) = (self.cpu, self.shape, step.batch.tokens.len());
        layer.qkv.forward(cpu, rows, &work.normed, &work.qkv)?;
        let norms = layer.head_norms.as_ref().map(|_| self.eps);
        let head_norms = layer.head_norms.as_ref().unwrap_or(&self.norm);
        let rotate = RotateHeads {
            cpu,
            shape,
            positions: &step.batch.positions,
            norms,
        };
        work.qkv.inplace_op3(&self.angles, head_norms, &rotate)?;
        cache.inplace_op2(
            &work.qkv,
            &StoreKv {
                cpu,
                shape,
                cache: cache_shape,
                slots: step.slots,
            },
        )?;
        let attend = Attend {
            cpu,
            rows,
            shape,
            cache: cache_shape,
            window: layer.window,
            sequences: step.sequences,
        };
        work.attended.inplace_op3(&work.qkv, cache, &attend)?;
        layer
            .attention_output
            .forward(cpu, rows, &work.attended, &work.delta, &*self.ranks)
    }

    /// Positions that there are angles for.
    pub(crate) fn positions(&self) -> usize {
        self.angles.elem_count() / self.shape.head_dim
    }

    pub(crate) fn cpu(&self) -> Cpu {
        self.cpu
    }

    pub(crate) fn ranks(&self) -> &dyn Collective {
        &*self.ranks
    }

    /// Ids whose logits it yields.
    pub(crate) fn vocabulary(&self) -> Range<usize> {
        self.vocabulary.clone()
    }
}

/// The widths of a rank's row of q, k and v.
pub(crate) fn qkv_shape(config: &ModelConfig, shard: Shard) -> QkvShape {
    QkvShape {
        heads: shard.heads(config).len(),
        kv_heads: shard.kv_heads(config).len(),
        head_dim: config.head_dim,
    }
}

// === impl Workspace ===

impl Workspace {
    /// One that grows with the first step.
    pub(crate) fn new(decoder: &Decoder) -> candle_core::Result<Self> {
        Self::sized(decoder, 1, 1)
    }

    /// Logits of the last step: `rows` rows of this rank's vocabulary.
    pub(crate) fn read_logits(
        &self,
        rows: usize,
        vocabulary: usize,
        out: &mut Vec<f32>,
    ) -> candle_core::Result<()> {
        out.clear();
        if rows > 0 {
            let (storage, _) = self.logits.storage_and_layout();
            match &*storage {
                Storage::Cpu(storage) => {
                    out.extend_from_slice(&storage.as_slice::<f32>()?[..rows * vocabulary]);
                }
                _ => candle_core::bail!("logits are on the CPU"),
            }
        }
        Ok(())
    }

    /// Makes room for this many rows. Sizes are powers of two, so that steps of many sizes settle soon.
    fn reserve(&mut self, decoder: &Decoder, rows: usize, logit_rows: usize) -> candle_core::Result<()> {
        if rows > self.capacity || logit_rows > self.logit_capacity {
            let capacity = self.capacity.max(rows.next_power_of_two());
            let logit_capacity = self.logit_capacity.max(logit_rows.next_power_of_two());
            *self = Self::sized(decoder, capacity, logit_capacity)?;
        }
        Ok(())
    }

    fn sized(decoder: &Decoder, capacity: usize, logit_capacity: usize) -> candle_core::Result<Self> {
        let zeros = |rows: usize, width: usize| zeros((rows, width), DType::F32);
        let stream = zeros(2 * capacity, decoder.hidden_size)?;
        let block = zeros(capacity, decoder.hidden_size + decoder.intermediate_size)?;
        Ok(Self {
            capacity,
            normed: stream.narrow(0, capacity, capacity)?,
            stream,
            qkv: zeros(capacity, decoder.shape.width())?,
            attended: zeros(capacity, decoder.shape.heads * decoder.shape.head_dim)?,
            delta: block
                .flatten_all()?
                .narrow(0, 0, capacity * decoder.hidden_size)?,
            block,
            logit_capacity,
            selected: zeros(logit_capacity, decoder.hidden_size)?,
            logits: zeros(logit_capacity, decoder.vocabulary.len())?,
        })
    }
}

/// Zeros on huge pages, where the machine gives them.
pub(crate) fn zeros(shape: impl Into<Shape>, dtype: DType) -> candle_core::Result<Tensor> {
    let tensor = Tensor::zeros(shape, dtype, &Device::Cpu)?;
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => prefer_huge_pages(values),
        Storage::Cpu(CpuStorage::BF16(values)) => prefer_huge_pages(values),
        _ => {}
    }
    drop(storage);
    Ok(tensor)
}
