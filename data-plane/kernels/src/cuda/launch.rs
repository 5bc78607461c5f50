//! The kernels as functions. Each checks that its buffers hold what it reads and writes; the indices were checked when
//! [`Inputs`] were filled. None waits, and none allocates.

use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use half::bf16;

use super::{Buffer, CudaError, Gpu, Inputs, error::Doing};
use crate::{CacheShape, QkvShape};

/// Threads of kernels that take a row a block.
const ROW_THREADS: u32 = 256;
/// Splits of a decode's positions, at most.
pub const MAX_SPLITS: usize = 32;

/// One layer's part of the pool.
#[derive(Debug, Clone, Copy)]
pub struct CudaCache {
    /// Its shape.
    pub shape: CacheShape,
    /// Which layer.
    pub layer: usize,
}

/// What [`Gpu::rope_store`] works on besides its buffers.
#[derive(Clone, Copy)]
pub struct RopeStore<'a> {
    /// Widths of a row.
    pub qkv: QkvShape,
    /// The cache that keys and values go to.
    pub cache: CudaCache,
    /// `[(heads + 2 · kv_heads) · head_dim]`.
    pub bias: Option<&'a Buffer<f32>>,
    /// `[positions][cos of head_dim / 2, then sin of head_dim / 2]`.
    pub angles: &'a Buffer<f32>,
    /// `[2, head_dim]`: norms of the heads of q and of k, and eps.
    pub norms: Option<(&'a Buffer<f32>, f32)>,
}

/// What [`Gpu::attend`] works on besides its buffers.
#[derive(Debug, Clone, Copy)]
pub struct CudaAttention {
    /// Widths of a row.
    pub qkv: QkvShape,
    /// The cache.
    pub cache: CudaCache,
    /// Factor of the scores.
    pub scale: f32,
    /// Positions that a token sees, its own included; `None`: all up to its own.
    pub window: Option<usize>,
}

/// What the splits of a decode leave to be put together.
pub struct Splits {
    parts: Buffer<f32>,
    stats: Buffer<f32>,
}

/// A kernel's argument as the driver reads it: from an address, as many bytes as the signature says. All hosts of CUDA
/// are little-endian, so that a small one is the front of a large one.
trait Argument {
    fn bits(self) -> u64;
}

impl Argument for u64 {
    fn bits(self) -> u64 {
        self
    }
}

impl Argument for i32 {
    fn bits(self) -> u64 {
        u64::from(self as u32)
    }
}

impl Argument for f32 {
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }
}

macro_rules! launch {
    ($gpu:expr, $function:expr, $what:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        let arguments = [$(Argument::bits($argument)),+];
        let mut launch = $gpu.stream.launch_builder($function);
        for argument in &arguments {
            launch.arg(argument);
        }
        // SAFETY: the arguments are those of the kernel's signature, in its order; the caller has checked that every
        // buffer holds what the kernel touches.
        unsafe { launch.launch($config) }.to($what).map(|_| ())
    }};
}

fn grid(x: usize, y: usize, z: usize, threads: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, z as u32),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// An optional buffer's address; the kernels take 0 for none.
fn address(gpu: &Gpu, buffer: Option<&Buffer<f32>>, len: usize) -> u64 {
    buffer.map_or(0, |buffer| {
        assert!(buffer.len() >= len, "an optional operand has its width");
        buffer.address(gpu, 0)
    })
}

// === impl Gpu ===

impl Gpu {
    /// Elements of a pool of so many layers.
    pub fn pool_elements(shape: CacheShape, layers: usize) -> usize {
        shape.elements() * layers
    }

    /// Writes the embeddings of the step's tokens: `table` is `[vocab, width]`, `stream` gets `[rows, width]`.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// A buffer is shorter, or the width no multiple of 8.
    pub fn embed(
        &self,
        stream: &mut Buffer<f32>,
        table: &Buffer<bf16>,
        inputs: &Inputs,
        width: usize,
    ) -> Result<(), CudaError> {
        let rows = inputs.layout.rows;
        assert!(
            width.is_multiple_of(8)
                && stream.len() >= rows * width
                && table.len() >= inputs.limits.vocab_size * width,
            "the table has every token, the stream every row"
        );
        launch!(
            self,
            &self.functions.embed,
            "embed",
            grid(rows, 1, 1, ROW_THREADS),
            stream.address(self, 0),
            table.address(self, 0),
            inputs.device.address(self, inputs.layout.ids),
            width as i32
        )
    }

    /// Copies the rows whose logits are wanted.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// A buffer is shorter, or the width no multiple of 8.
    pub fn select(
        &self,
        target: &mut Buffer<bf16>,
        source: &Buffer<bf16>,
        inputs: &Inputs,
        width: usize,
    ) -> Result<(), CudaError> {
        let rows = inputs.layout.logit_rows;
        assert!(
            width.is_multiple_of(8)
                && target.len() >= rows * width
                && source.len() >= inputs.layout.rows * width,
            "both have their rows"
        );
        launch!(
            self,
            &self.functions.gather_rows,
            "gather rows",
            grid(rows, 1, 1, ROW_THREADS),
            target.address(self, 0),
            source.address(self, 0),
            inputs.device.address(self, inputs.layout.selected),
            width as i32
        )
    }

    /// Normalises rows of `x` into `y`.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// A buffer is shorter, or the width no multiple of 8.
    pub fn rms_norm(
        &self,
        y: &mut Buffer<bf16>,
        x: &Buffer<f32>,
        weight: &Buffer<f32>,
        eps: f32,
        rows: usize,
    ) -> Result<(), CudaError> {
        let width = weight.len();
        assert!(
            width.is_multiple_of(8) && y.len() >= rows * width && x.len() >= rows * width,
            "rows have the weight's width"
        );
        launch!(
            self,
            &self.functions.rms_norm,
            "normalise",
            grid(rows, 1, 1, ROW_THREADS),
            y.address(self, 0),
            x.address(self, 0),
            weight.address(self, 0),
            eps,
            width as i32
        )
    }

    /// Adds `delta`, and `bias` to every row, to the stream `x`, and normalises the sum into `y`.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// A buffer is shorter, or the width no multiple of 8.
    pub fn add_rms_norm(
        &self,
        y: &mut Buffer<bf16>,
        x: &mut Buffer<f32>,
        delta: (&Buffer<f32>, Option<&Buffer<f32>>),
        weight: &Buffer<f32>,
        eps: f32,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (width, (delta, bias)) = (weight.len(), delta);
        let len = rows * width;
        assert!(
            width.is_multiple_of(8) && y.len() >= len && x.len() >= len && delta.len() >= len,
            "rows have the weight's width"
        );
        launch!(
            self,
            &self.functions.add_rms_norm,
            "add and normalise",
            grid(rows, 1, 1, ROW_THREADS),
            y.address(self, 0),
            x.address(self, 0),
            delta.address(self, 0),
            address(self, bias, width),
            weight.address(self, 0),
            eps,
            width as i32
        )
    }

    /// `y = silu(gate) · up` over rows of `[gate, up]`, each `width` wide.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// A buffer is shorter, or the width no multiple of 8.
    pub fn swiglu(
        &self,
        y: &mut Buffer<bf16>,
        gate_up: &Buffer<f32>,
        bias: Option<&Buffer<f32>>,
        rows: usize,
        width: usize,
    ) -> Result<(), CudaError> {
        assert!(
            width.is_multiple_of(8) && y.len() >= rows * width && gate_up.len() >= 2 * rows * width,
            "both have their rows"
        );
        launch!(
            self,
            &self.functions.swiglu,
            "gate",
            grid(width.div_ceil(4 * ROW_THREADS as usize), rows, 1, ROW_THREADS),
            y.address(self, 0),
            gate_up.address(self, 0),
            address(self, bias, 2 * width),
            width as i32
        )
    }

    /// Normalises and rotates q and k, writes q (rounded) to `queries`, and k and v into the pool.
    ///
    /// # Errors
    /// The launch fails.
    ///
    /// # Panics
    /// A buffer is shorter than the shapes say.
    pub fn rope_store(
        &self,
        queries: &mut Buffer<bf16>,
        pool: &mut Buffer<bf16>,
        qkv: &Buffer<f32>,
        inputs: &Inputs,
        call: &RopeStore<'_>,
    ) -> Result<(), CudaError> {
        let (shape, rows) = (call.qkv, inputs.layout.rows);
        assert!(
            qkv.len() >= rows * shape.width() && queries.len() >= rows * shape.heads * shape.head_dim,
            "both have their rows"
        );
        assert!(
            call.angles.len() >= inputs.limits.positions * shape.head_dim,
            "there are angles for every position"
        );
        let (keys, values) = self.cache(pool, inputs, call.cache);
        let (norms, eps) = call.norms.map_or((None, 0.0), |(norms, eps)| (Some(norms), eps));
        launch!(
            self,
            &self.functions.rope_store,
            "rotate and store",
            grid(rows, 1, 1, ROW_THREADS),
            queries.address(self, 0),
            keys,
            values,
            qkv.address(self, 0),
            address(self, call.bias, shape.width()),
            call.angles.address(self, 0),
            inputs.device.address(self, inputs.layout.positions),
            inputs.device.address(self, inputs.layout.slots),
            address(self, norms, 2 * shape.head_dim),
            eps,
            shape.heads as i32,
            shape.kv_heads as i32,
            shape.head_dim as i32,
            call.cache.shape.page_size as i32
        )
    }

    /// Room for the splits of so many decodes at once.
    ///
    /// # Errors
    /// Memory cannot be had.
    pub fn splits(&self, sequences: usize, qkv: QkvShape) -> Result<Splits, CudaError> {
        let cells = (1..=sequences.max(1))
            .map(|count| count * self.split_count(count, qkv))
            .max()
            .unwrap_or(1)
            * qkv.heads;
        Ok(Splits {
            parts: self.zeros(cells * qkv.head_dim)?,
            stats: self.zeros(2 * cells)?,
        })
    }

    /// Splits that fill the card twice over. It depends on the count of sequences alone, so that a graph may keep it.
    fn split_count(&self, sequences: usize, qkv: QkvShape) -> usize {
        let tiles = sequences * qkv.kv_heads * (qkv.heads / qkv.kv_heads).div_ceil(16);
        (2 * self.multiprocessors).div_ceil(tiles).clamp(1, MAX_SPLITS)
    }

    /// Attends the step's queries to the pool: `y` becomes `[rows, heads · head_dim]`. Rows of padding stay as they
    /// are.
    ///
    /// # Errors
    /// A launch fails.
    ///
    /// # Panics
    /// A buffer is shorter than the shapes say.
    pub fn attend(
        &self,
        y: &mut Buffer<bf16>,
        splits: &mut Splits,
        queries: &Buffer<bf16>,
        pool: &mut Buffer<bf16>,
        inputs: &Inputs,
        call: &CudaAttention,
    ) -> Result<(), CudaError> {
        let (shape, layout) = (call.qkv, inputs.layout);
        let len = layout.rows * shape.heads * shape.head_dim;
        assert!(
            y.len() >= len && queries.len() >= len && shape.head_dim == self.head_dim,
            "both have their rows, of heads as wide as the kernel's"
        );
        assert!(
            shape.heads / shape.kv_heads == inputs.limits.group,
            "the tiles are this model's"
        );
        let (keys, values) = self.cache(pool, inputs, call.cache);
        let tables = inputs.device.address(self, layout.tables);
        let window = call
            .window
            .map_or(0, |window| window.min(i32::MAX as usize) as i32);
        let sizes = [shape.heads, shape.kv_heads, call.cache.shape.page_size].map(|size| size as i32);
        let shared = self.functions.attention_shared;
        if layout.tiles > 0 {
            let mut config = grid(layout.tiles, shape.kv_heads, 1, 128);
            config.shared_mem_bytes = shared;
            launch!(
                self,
                &self.functions.attend_prefill,
                "attend",
                config,
                y.address(self, 0),
                queries.address(self, 0),
                keys,
                values,
                inputs.device.address(self, layout.prefill_sequences),
                tables,
                inputs.device.address(self, layout.tile_list),
                sizes[0],
                sizes[1],
                sizes[2],
                window,
                call.scale
            )?;
        }
        if layout.decodes == 0 {
            return Ok(());
        }
        let count = self.split_count(layout.decodes, shape);
        let cells = layout.decodes * count * shape.heads;
        assert!(
            splits.parts.len() >= cells * shape.head_dim && splits.stats.len() >= 2 * cells,
            "there is room for the splits"
        );
        let sequences = inputs.device.address(self, layout.decode_sequences);
        let tiles = (shape.heads / shape.kv_heads).div_ceil(16);
        let mut config = grid(count, shape.kv_heads * tiles, layout.decodes, 128);
        config.shared_mem_bytes = shared;
        launch!(
            self,
            &self.functions.attend_decode,
            "attend",
            config,
            y.address(self, 0),
            splits.parts.address(self, 0),
            splits.stats.address(self, 0),
            queries.address(self, 0),
            keys,
            values,
            sequences,
            tables,
            sizes[0],
            sizes[1],
            sizes[2],
            window,
            call.scale
        )?;
        self.combine(y, splits, sequences, layout.decodes, count, shape.heads)
    }

    fn combine(
        &self,
        y: &mut Buffer<bf16>,
        splits: &Splits,
        sequences: u64,
        decodes: usize,
        count: usize,
        heads: usize,
    ) -> Result<(), CudaError> {
        if count == 1 {
            return Ok(());
        }
        launch!(
            self,
            &self.functions.combine,
            "combine splits",
            grid(heads, decodes, 1, 128),
            y.address(self, 0),
            splits.parts.address(self, 0),
            splits.stats.address(self, 0),
            sequences,
            count as i32
        )
    }

    /// Copies pages in all layers of the pool, each pair from its first to its second.
    ///
    /// # Errors
    /// The launch fails, or a page lies outside of the pool.
    ///
    /// # Panics
    /// The pool has not so many layers.
    pub fn copy_pages(
        &self,
        pool: &mut Buffer<bf16>,
        shape: CacheShape,
        layers: usize,
        pairs: &[[u32; 2]],
    ) -> Result<(), CudaError> {
        assert!(
            pool.len() == Self::pool_elements(shape, layers),
            "the pool has its shape"
        );
        let flat = pairs.as_flattened();
        if let Some(page) = flat.iter().find(|&&page| page as usize >= shape.num_pages) {
            return Err(CudaError::Step(format!("page {page} of {}", shape.num_pages)));
        }
        if pairs.is_empty() {
            return Ok(());
        }
        let list = self.upload(flat)?;
        let page = shape.page_size * shape.kv_heads * shape.head_dim;
        launch!(
            self,
            &self.functions.copy_pages,
            "copy pages",
            grid(
                pairs.len(),
                page.div_ceil(8 * ROW_THREADS as usize).min(64),
                2 * layers,
                ROW_THREADS
            ),
            pool.address(self, 0),
            list.address(self, 0),
            (shape.elements() / 2) as u64,
            page as u64
        )
    }

    /// Addresses of a layer's keys and values.
    fn cache(&self, pool: &Buffer<bf16>, inputs: &Inputs, cache: CudaCache) -> (u64, u64) {
        let CudaCache { shape, layer } = cache;
        assert!(
            pool.len() >= Self::pool_elements(shape, layer + 1)
                && shape.num_pages >= inputs.limits.num_pages
                && shape.page_size == inputs.limits.page_size
                && shape.head_dim.is_multiple_of(8),
            "the pool has the layer, and pages for every slot"
        );
        let start = shape.elements() * layer;
        (
            pool.address(self, start),
            pool.address(self, start + shape.elements() / 2),
        )
    }

    pub(super) fn function_sample(&self) -> &CudaFunction {
        &self.functions.sample
    }
}
