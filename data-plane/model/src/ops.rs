//! The decoder's steps as in-place candle operations. Each has a CPU implementation over `penstock-kernels`; another
//! device adds its own to the same operation, and until then candle says that there is none.
//!
//! Tensors are workspaces that are reused between steps, larger than a step's rows: every operation knows how many
//! rows it works on, and reads and writes the first ones.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, bail};
use half::bf16;
use penstock_kernels::{
    self as kernels, AttentionSequence, CacheShape, Collective, Cpu, Layer, Linear, QkvShape, Rotate,
};

fn read<'a>(storage: &'a CpuStorage, layout: &Layout, len: usize) -> Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    Ok(&values[layout.start_offset()..][..len])
}

fn write<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[layout.start_offset()..]),
        _ => bail!("activations are f32"),
    }
}

/// Writes the embeddings of `ids` into the first half of the stream.
pub(crate) struct Embed<'a> {
    pub(crate) ids: &'a [u32],
    pub(crate) width: usize,
    /// The ids whose rows this rank has; others get zeros, which the other ranks' rows are added to.
    pub(crate) vocabulary: Range<usize>,
    /// The matrix, where it is the output projection as well.
    pub(crate) tied: Option<&'a Linear>,
}

impl InplaceOp2 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(
        &self,
        stream: &mut CpuStorage,
        layout: &Layout,
        table: &CpuStorage,
        table_layout: &Layout,
    ) -> Result<()> {
        let rows = write(stream, layout)?.chunks_exact_mut(self.width);
        for (row, &id) in rows.zip(self.ids) {
            if !self.vocabulary.contains(&(id as usize)) {
                row.fill(0.0);
                continue;
            }
            let index = id as usize - self.vocabulary.start;
            let start = table_layout.start_offset() + index * self.width;
            match (self.tied, table) {
                (Some(matrix), _) => matrix.row(index, row),
                (None, CpuStorage::F32(table)) => row.copy_from_slice(&table[start..][..self.width]),
                (None, CpuStorage::BF16(table)) => {
                    for (to, from) in row.iter_mut().zip(&table[start..]) {
                        *to = from.to_f32();
                    }
                }
                _ => bail!("the embedding is f32 or bf16"),
            }
        }
        Ok(())
    }
}

/// Normalises the stream. The tensor has two halves of `capacity` rows: the residual stream, and what this writes,
/// the normalised stream.
pub(crate) struct Norm {
    pub(crate) cpu: Cpu,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) capacity: usize,
    pub(crate) eps: f32,
}

impl InplaceOp2 for Norm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        stream: &mut CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<()> {
        let len = self.rows * self.width;
        let (residual, normed) = write(stream, layout)?.split_at_mut(self.capacity * self.width);
        kernels::rms_norm(
            self.cpu,
            &mut normed[..len],
            &residual[..len],
            read(weight, weight_layout, self.width)?,
            self.eps,
        );
        Ok(())
    }
}

/// Adds a layer's output (the second tensor) to the residual stream and normalises the sum: [`Norm`], fused.
pub(crate) struct AddNorm(pub(crate) Norm);

impl InplaceOp3 for AddNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn cpu_fwd(
        &self,
        stream: &mut CpuStorage,
        layout: &Layout,
        delta: &CpuStorage,
        delta_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<()> {
        let Norm {
            cpu,
            rows,
            width,
            capacity,
            eps,
        } = self.0;
        let len = rows * width;
        let (residual, normed) = write(stream, layout)?.split_at_mut(capacity * width);
        let (residual, normed) = (&mut residual[..len], &mut normed[..len]);
        kernels::add_rms_norm(
            cpu,
            normed,
            residual,
            read(delta, delta_layout, len)?,
            read(weight, weight_layout, width)?,
            eps,
        );
        Ok(())
    }
}

/// Copies the rows `indices` of the source to the front of the target.
pub(crate) struct Select<'a> {
    pub(crate) indices: &'a [usize],
    pub(crate) width: usize,
}

impl InplaceOp2 for Select<'_> {
    fn name(&self) -> &'static str {
        "select_rows"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> Result<()> {
        let source = &source.as_slice::<f32>()?[source_layout.start_offset()..];
        for (to, &index) in write(target, layout)?
            .chunks_exact_mut(self.width)
            .zip(self.indices)
        {
            to.copy_from_slice(&source[index * self.width..][..self.width]);
        }
        Ok(())
    }
}

/// `target = source Wᵀ + b`.
pub(crate) struct Project<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) rows: usize,
    pub(crate) layer: Layer<'a>,
}

impl InplaceOp2 for Project<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> Result<()> {
        let Layer { linear, bias } = self.layer;
        let y = &mut write(target, layout)?[..self.rows * linear.outputs()];
        let x = read(source, source_layout, self.rows * linear.inputs())?;
        linear.forward(self.cpu, y, x, bias);
        Ok(())
    }
}

/// `target = down(gate_up(source))`. The target has two parts of `capacity` rows: what is asked for, and what lies
/// between the two layers.
pub(crate) struct Mlp<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) rows: usize,
    pub(crate) capacity: usize,
    pub(crate) gate_up: Layer<'a>,
    pub(crate) down: Layer<'a>,
}

impl InplaceOp2 for Mlp<'_> {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> Result<()> {
        let width = self.down.linear.outputs();
        let (y, between) = write(target, layout)?.split_at_mut(self.capacity * width);
        kernels::mlp(
            self.cpu,
            &mut y[..self.rows * width],
            &mut between[..self.rows * self.down.linear.inputs()],
            read(source, source_layout, self.rows * self.gate_up.linear.inputs())?,
            self.gate_up,
            self.down,
        );
        Ok(())
    }
}

/// Normalises the heads of q and k, where the family does, and rotates them. Sources: the table of angles, and the
/// norms' weights, `[2, head_dim]`, of q and then k (or anything, where there are none).
pub(crate) struct RotateHeads<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) shape: QkvShape,
    pub(crate) positions: &'a [u32],
    /// eps of the norms.
    pub(crate) norms: Option<f32>,
}

impl InplaceOp3 for RotateHeads<'_> {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(
        &self,
        qkv: &mut CpuStorage,
        layout: &Layout,
        angles: &CpuStorage,
        angles_layout: &Layout,
        norms: &CpuStorage,
        norms_layout: &Layout,
    ) -> Result<()> {
        let norms = match self.norms {
            Some(eps) => {
                let (q, k) =
                    read(norms, norms_layout, 2 * self.shape.head_dim)?.split_at(self.shape.head_dim);
                Some((q, k, eps))
            }
            None => None,
        };
        let angles = &angles.as_slice::<f32>()?[angles_layout.start_offset()..];
        let qkv = &mut write(qkv, layout)?[..self.positions.len() * self.shape.width()];
        kernels::rotate(
            self.cpu,
            qkv,
            &Rotate {
                qkv: self.shape,
                angles,
                positions: self.positions,
                norms,
            },
        );
        Ok(())
    }
}

/// Writes k and v (the source) into a layer's cache.
pub(crate) struct StoreKv<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) shape: QkvShape,
    pub(crate) cache: CacheShape,
    pub(crate) slots: &'a [usize],
}

impl InplaceOp2 for StoreKv<'_> {
    fn name(&self) -> &'static str {
        "store_kv"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        _: &Layout,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
    ) -> Result<()> {
        let qkv = read(qkv, qkv_layout, self.slots.len() * self.shape.width())?;
        match cache {
            CpuStorage::F32(cache) => {
                kernels::store(self.cpu, cache, self.cache, qkv, self.shape, self.slots)
            }
            CpuStorage::BF16(cache) => {
                kernels::store(self.cpu, cache, self.cache, qkv, self.shape, self.slots)
            }
            _ => bail!("the cache is f32 or bf16"),
        }
        Ok(())
    }
}

/// Attends q (in the first source) to a layer's cache (the second).
pub(crate) struct Attend<'a> {
    pub(crate) cpu: Cpu,
    pub(crate) rows: usize,
    pub(crate) shape: QkvShape,
    pub(crate) cache: CacheShape,
    /// See [`kernels::Attention::window`].
    pub(crate) window: Option<usize>,
    pub(crate) sequences: &'a [AttentionSequence<'a>],
}

impl InplaceOp3 for Attend<'_> {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        layout: &Layout,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        cache: &CpuStorage,
        _: &Layout,
    ) -> Result<()> {
        let y = &mut write(target, layout)?[..self.rows * self.shape.heads * self.shape.head_dim];
        let qkv = read(qkv, qkv_layout, self.rows * self.shape.width())?;
        let call = kernels::Attention {
            qkv: self.shape,
            cache: self.cache,
            scale: (self.shape.head_dim as f32).sqrt().recip(),
            window: self.window,
            sequences: self.sequences,
        };
        match cache {
            CpuStorage::F32(cache) => kernels::attention(self.cpu, y, qkv, cache, &call),
            CpuStorage::BF16(cache) => kernels::attention::<bf16>(self.cpu, y, qkv, cache, &call),
            _ => bail!("the cache is f32 or bf16"),
        }
        Ok(())
    }
}

/// Sums the first values of a tensor over all ranks.
pub(crate) struct AllReduce<'a> {
    pub(crate) ranks: &'a dyn Collective,
    pub(crate) values: usize,
}

impl InplaceOp1 for AllReduce<'_> {
    fn name(&self) -> &'static str {
        "all_reduce"
    }

    fn cpu_fwd(&self, target: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let values = &mut write(target, layout)?[..self.values];
        self.ranks
            .all_reduce(values)
            .map_err(|error| candle_core::Error::msg(error.to_string()))
    }
}
