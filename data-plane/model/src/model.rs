//! A loaded revision.

use std::{path::Path, sync::Arc, time::Duration};

use candle_core::{DType, Device};
use penstock_kernels::{CacheShape, Collective, LocalCollective};

use crate::{
    Batch, LoadError, ModelConfig, ModelError,
    checkpoint::Checkpoint,
    decoder::{self, Workspace},
    parallel::Shard,
    ranks::{Job, Rank, Ranks},
};

/// What weights and KV are kept in. Activations are f32 in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16: half the memory and its traffic. Inputs of products are rounded to it, sums are taken in f32.
    Bf16,
    /// 8-bit integers for the matrices, with a scale per output, times inputs of 8 bits with a scale per token; KV is
    /// bf16. Outputs are off by about 1 % of their size; see [`penstock_kernels::Element::Int8`].
    Int8,
}

/// Size of the KV pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLayout {
    /// Tokens a page.
    pub page_size: usize,
    /// Pages.
    pub num_pages: usize,
}

/// How far loading got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights read so far.
    pub loaded_bytes: u64,
    /// Bytes of weights in all.
    pub total_bytes: u64,
}

/// How a model is split over ranks, each of which holds a part of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorParallel {
    /// Ranks; it divides the heads of the model.
    pub size: usize,
    /// How long ranks wait for each other before the step fails.
    pub timeout: Duration,
}

/// How to load a checkpoint.
pub struct LoadOptions<'a> {
    /// What to keep weights and KV in. `None`: as the checkpoint says (`torch_dtype`); f16 checkpoints, and those
    /// that do not say, are widened to f32, which loses nothing.
    pub dtype: Option<Dtype>,
    /// Size of the KV pool.
    pub cache: CacheLayout,
    /// Where to run.
    pub device: Device,
    /// How to split it.
    pub tensor_parallel: TensorParallel,
    /// Called as weights are read.
    pub progress: &'a dyn Fn(LoadProgress),
}

/// The weights of one revision and its paged KV.
pub struct Model {
    config: ModelConfig,
    dtype: Dtype,
    ranks: Ranks,
    cache: CacheLayout,
}

// === impl TensorParallel ===

impl Default for TensorParallel {
    /// One rank.
    fn default() -> Self {
        Self {
            size: 1,
            timeout: Duration::from_secs(60),
        }
    }
}

// === impl Dtype ===

impl Dtype {
    /// Bytes of a weight.
    pub fn weight_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// What KV is kept in.
    fn cache(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 | Self::Int8 => DType::BF16,
        }
    }
}

// === impl Model ===

impl Model {
    /// Loads the checkpoint in `dir`. Its ranks, if there are several, are threads that sum through memory.
    ///
    /// # Errors
    /// See [`LoadError`]; each names what is wrong and where.
    pub fn load(dir: &Path, options: LoadOptions<'_>) -> Result<Self, LoadError> {
        let TensorParallel { size, timeout } = options.tensor_parallel;
        let ranks = LocalCollective::group(size.max(1), timeout);
        let ranks = ranks
            .into_iter()
            .map(|rank| Arc::new(rank) as Arc<dyn Collective>);
        Self::load_with(dir, options, ranks.collect())
    }

    /// As [`load`](Self::load), with ranks that sum in another way: `collectives` has one for each, in their order.
    ///
    /// # Errors
    /// As there.
    pub fn load_with(
        dir: &Path,
        options: LoadOptions<'_>,
        collectives: Vec<Arc<dyn Collective>>,
    ) -> Result<Self, LoadError> {
        if !options.device.is_cpu() {
            return Err(LoadError::Device {
                device: format!("{:?}", options.device.location()),
            });
        }
        let config = ModelConfig::load(dir)?;
        Shard::check(&config, collectives.len())?;
        let dtype = options.dtype.unwrap_or_else(|| config.default_dtype());
        let checkpoint = Checkpoint::open(dir)?;
        check_cache(&config, dtype, options.cache, collectives.len())?;
        let positions = config
            .max_position_embeddings
            .min(options.cache.num_pages * options.cache.page_size);
        let rank = |collective: Arc<dyn Collective>| -> Result<Rank, LoadError> {
            let shard = Shard {
                rank: collective.rank(),
                size: collective.size(),
            };
            let cache_shape = CacheShape {
                num_pages: options.cache.num_pages,
                page_size: options.cache.page_size,
                kv_heads: shard.kv_heads(&config).len(),
                head_dim: config.head_dim,
            };
            let decoder = decoder::load(
                &config,
                &checkpoint,
                dtype,
                positions,
                collective,
                options.progress,
            )?;
            let layer = |_| decoder::zeros(cache_shape.elements(), dtype.cache());
            Ok(Rank {
                cache: (0..config.num_layers).map(layer).collect::<Result<_, _>>()?,
                workspace: Workspace::new(&decoder)?,
                decoder,
                cache_shape,
            })
        };
        let mut ranks = collectives.into_iter().map(rank);
        // There is at least one: the check above says so.
        let first = ranks.next().ok_or(LoadError::TensorParallel {
            size: 0,
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
        })??;
        let others = ranks.collect::<Result<_, _>>()?;
        Ok(Self {
            ranks: Ranks::start(first, others, options.tensor_parallel.timeout)?,
            cache: options.cache,
            config,
            dtype,
        })
    }

    /// The checkpoint's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What weights and KV are kept in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// What the model runs on, for people, e.g. `cpu (avx512, amx; bf16)`.
    pub fn device(&self) -> String {
        let dtype = match self.dtype {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::Int8 => "int8",
        };
        let isa = self.ranks.first().decoder.cpu().isa;
        match self.ranks.size() {
            1 => format!("cpu ({isa}; {dtype})"),
            ranks => format!("cpu ({isa}; {dtype}; {ranks} ranks)"),
        }
    }

    /// Bytes of KV that one token takes, all layers and ranks together; `dtype` as in [`LoadOptions`]. With more ranks
    /// than KV heads, each has one.
    pub fn kv_bytes_per_token(config: &ModelConfig, dtype: Option<Dtype>, ranks: usize) -> usize {
        let dtype = dtype.unwrap_or_else(|| config.default_dtype());
        let heads = config.num_kv_heads.max(ranks);
        2 * config.num_layers * heads * config.head_dim * dtype.cache().size_in_bytes()
    }

    /// Bytes of packed matrices that one step reads on the first rank.
    pub fn matrix_bytes(&self) -> usize {
        self.ranks.first().decoder.matrix_bytes()
    }

    /// Whether every rank is there for a step.
    ///
    /// # Errors
    /// One has not come back from an earlier step, and is named.
    pub fn ready(&mut self) -> Result<(), ModelError> {
        self.ranks.ready()
    }

    /// Runs one batch: writes the KV of its tokens into their pages, and fills `logits` with one row of
    /// `vocab_size` for each token whose logits are wanted, in the order of the batch.
    ///
    /// # Errors
    /// The batch contradicts itself or exceeds the model's limits; then nothing was written.
    pub fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        logits.clear();
        self.check(batch)?;
        if batch.is_empty() {
            return Ok(());
        }
        let job = Arc::new(self.job(batch));
        self.ranks.run(&job, logits)
    }

    /// Finds each token's slot in the cache, and the rows whose logits are wanted.
    fn job(&self, batch: &Batch) -> Job {
        let page_size = self.cache.page_size;
        let mut job = Job {
            batch: batch.clone(),
            ..Job::default()
        };
        for sequence in &batch.sequences {
            let pages = batch.pages(sequence);
            let slot =
                |position: usize| pages[position / page_size] as usize * page_size + position % page_size;
            job.slots
                .extend((sequence.context_len - sequence.query_len..sequence.context_len).map(slot));
            job.logit_rows.extend(sequence.logit_rows());
        }
        job
    }

    fn check(&self, batch: &Batch) -> Result<(), ModelError> {
        let wrong = |problem: String| Err(ModelError::Batch(problem));
        if let Some(id) = batch
            .tokens
            .iter()
            .find(|&&id| id as usize >= self.config.vocab_size)
        {
            return wrong(format!(
                "token id {id} is outside the vocabulary of {}",
                self.config.vocab_size
            ));
        }
        if batch.positions.len() != batch.tokens.len() {
            return wrong(format!(
                "{} tokens, but {} positions",
                batch.tokens.len(),
                batch.positions.len()
            ));
        }
        let mut next = 0;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            if let Err(problem) = self.check_sequence(batch, sequence, next) {
                return wrong(format!("sequence {index}: {problem}"));
            }
            next += sequence.query_len;
        }
        if next != batch.tokens.len() {
            return wrong(format!(
                "the sequences have {next} of {} tokens",
                batch.tokens.len()
            ));
        }
        Ok(())
    }

    fn check_sequence(
        &self,
        batch: &Batch,
        sequence: &crate::BatchSequence,
        next: usize,
    ) -> Result<(), String> {
        let crate::BatchSequence {
            query_start,
            query_len,
            context_len,
            page_start,
            page_count,
            ..
        } = *sequence;
        if query_start != next || query_len == 0 || query_len > batch.tokens.len() - next {
            return Err(format!(
                "{query_len} tokens from {query_start} on, of {}",
                batch.tokens.len()
            ));
        }
        if context_len < query_len || context_len > self.ranks.first().decoder.positions() {
            return Err(format!(
                "context of {context_len} tokens; {} fit",
                self.ranks.first().decoder.positions()
            ));
        }
        let mut expected = context_len - query_len..context_len;
        if batch.positions[query_start..query_start + query_len]
            .iter()
            .any(|&p| expected.next() != Some(p as usize))
        {
            return Err(format!("positions are not the last {query_len} of {context_len}"));
        }
        let pages = page_start
            .checked_add(page_count)
            .and_then(|end| batch.page_tables.get(page_start..end));
        let Some(pages) = pages.filter(|pages| pages.len() >= context_len.div_ceil(self.cache.page_size))
        else {
            return Err(format!(
                "{page_count} pages from {page_start} on do not hold {context_len} tokens"
            ));
        };
        match pages.iter().find(|&&page| page as usize >= self.cache.num_pages) {
            Some(page) => Err(format!("page {page} of {}", self.cache.num_pages)),
            None => Ok(()),
        }
    }
}

/// Whether memory for the KV of all layers and ranks can be had.
fn check_cache(
    config: &ModelConfig,
    dtype: Dtype,
    layout: CacheLayout,
    ranks: usize,
) -> Result<(), LoadError> {
    let CacheLayout { page_size, num_pages } = layout;
    let refused = |bytes| LoadError::Cache {
        bytes,
        num_pages,
        page_size,
    };
    let tokens = page_size
        .checked_mul(num_pages)
        .filter(|&tokens| tokens > 0 && u32::try_from(num_pages).is_ok());
    let per_token = Model::kv_bytes_per_token(config, Some(dtype), ranks);
    let bytes = tokens.and_then(|tokens| tokens.checked_mul(per_token));
    let bytes = bytes.ok_or_else(|| refused(0))?;
    // Memory that cannot be had would end the process later on, so it is asked for in a way that may be refused.
    let mut probe: Vec<u8> = Vec::new();
    probe.try_reserve_exact(bytes).map_err(|_| refused(bytes as u64))
}

#[cfg(test)]
mod tests;
