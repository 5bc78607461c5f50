//! Loading revisions and starting their engines.

use std::{path::Path, sync::Arc, time::Duration};

use penstock_engine::{CandleRunner, Engine, EngineConfig, EngineError, FakeConfig, FakeRunner, Runner};
use penstock_model::{CacheLayout, LoadOptions, Model, ModelConfig};
use penstock_telemetry::instruments::{EngineObservation, Served as Labels, WorkerMetrics};
use penstock_text::{ChatTemplate, TextError, Tokenizer};

use crate::{
    Config, LoadProgress, ModelSpec, RunnerKind,
    catalogue::{Catalogue, Served},
};

/// KV memory of a revision where none is given, at most.
const DEFAULT_KV_BYTES: u64 = 1 << 30;
/// Context of the fake runner, in tokens.
const FAKE_CONTEXT: usize = 8192;
/// Chat template of the fake runner.
const FAKE_TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}\
                             {% if add_generation_prompt %}assistant: {% endif %}";

/// Why a revision cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot load {spec} from {}", spec.path.display())]
pub struct LoadError {
    /// The revision.
    pub spec: ModelSpec,
    /// Why.
    #[source]
    pub source: LoadErrorKind,
}

/// What is wrong with a checkpoint, or with the machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadErrorKind {
    /// There is no such directory.
    #[error("there is no such directory")]
    NoDirectory,
    /// Tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Configuration or weights.
    #[error(transparent)]
    Model(#[from] penstock_model::LoadError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The KV memory does not hold a page.
    #[error("{given} bytes of KV memory hold no page of {page} bytes: give more --kv-memory")]
    KvMemory {
        /// Memory given.
        given: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The loading thread panicked or could not start.
    #[error("the loading thread failed: {0}")]
    Thread(String),
}

/// Loads every revision, one after the other, and puts it into the catalogue. Gives the device that they run
/// on. Loading goes on behind a future that is dropped, but its result is then lost.
pub(crate) async fn all(
    config: &Config,
    catalogue: Catalogue,
    metrics: WorkerMetrics,
) -> Result<String, LoadError> {
    let mut device = String::new();
    for spec in &config.models {
        let (config, spec, metrics) = (config.clone(), spec.clone(), metrics.clone());
        let progress = config.progress.clone();
        let name = spec.clone();
        let loaded = on_thread(&name, move || revision(&config, spec, metrics)).await?;
        device = loaded.device;
        catalogue.add(Arc::new(loaded.served));
        tracing::info!(revision = %name, device, "revision loaded");
        if let Some(progress) = progress {
            progress.ready(&name.model, &name.revision);
        }
    }
    Ok(device)
}

/// Runs `work` on a thread of its own, which, unlike the runtime's, does not hold up the end of the process.
async fn on_thread<T: Send + 'static>(
    spec: &ModelSpec,
    work: impl FnOnce() -> Result<T, LoadErrorKind> + Send + 'static,
) -> Result<T, LoadError> {
    let (done, result) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new()
        .name(format!("load {spec}"))
        .spawn(move || {
            // Nobody listens any more where the worker was told to end.
            let _ = done.send(work());
        });
    let result = match thread {
        Ok(_) => result
            .await
            .unwrap_or_else(|_| Err(LoadErrorKind::Thread("it panicked".into()))),
        Err(error) => Err(LoadErrorKind::Thread(error.to_string())),
    };
    result.map_err(|source| LoadError {
        spec: spec.clone(),
        source,
    })
}

struct Loaded {
    served: Served,
    device: String,
}

fn revision(config: &Config, spec: ModelSpec, metrics: WorkerMetrics) -> Result<Loaded, LoadErrorKind> {
    let parts = match config.runner {
        RunnerKind::Candle => candle(config, &spec)?,
        RunnerKind::Fake { pace } => fake(config, &spec, pace)?,
    };
    let device = parts.runner.describe().device;
    let engine = Engine::start(
        EngineConfig {
            name: spec.to_string(),
            page_size: config.page_size,
            num_pages: parts.num_pages,
            max_running: config.max_running,
            max_waiting: config.max_waiting,
            max_batch_tokens: config.max_batch_tokens,
            ..EngineConfig::default()
        },
        parts.runner,
    )?;
    let observed = {
        let engine = engine.clone();
        metrics.register_engine(&spec.model, &spec.revision, move || observe(&engine))
    };
    let served = Served {
        labels: Labels::new(&spec.model, &spec.revision),
        model: spec.model,
        revision: spec.revision,
        digest: parts.digest,
        engine,
        tokenizer: Arc::new(parts.tokenizer),
        template: parts.template,
        eos_token_ids: parts.eos_token_ids,
        _observed: observed,
    };
    Ok(Loaded { served, device })
}

/// What a runner's kind decides.
struct Parts {
    runner: Box<dyn Runner>,
    num_pages: usize,
    digest: String,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    eos_token_ids: Vec<u32>,
}

fn candle(config: &Config, spec: &ModelSpec) -> Result<Parts, LoadErrorKind> {
    let dir: &Path = &spec.path;
    if !dir.is_dir() {
        return Err(LoadErrorKind::NoDirectory);
    }
    // What is cheap to read comes first, so that a mistake shows before gigabytes are read.
    let tokenizer = Tokenizer::load(dir)?;
    let template = ChatTemplate::load(dir)?;
    let model_config = ModelConfig::load(dir)?;
    if tokenizer.vocab_size() > model_config.vocab_size {
        tracing::warn!(
            revision = %spec,
            tokenizer = tokenizer.vocab_size(),
            model = model_config.vocab_size,
            "the tokenizer has tokens that the model does not know; prompts with them are refused"
        );
    }
    let per_token = Model::kv_bytes_per_token(&model_config, config.dtype) as u64;
    let num_pages = num_pages(config, per_token, model_config.max_position_embeddings)?;
    let digest = penstock_model::manifest_digest(dir)?;
    let report = |progress: penstock_model::LoadProgress| {
        if let Some(observer) = &config.progress {
            observer.loaded(LoadProgress {
                model: &spec.model,
                revision: &spec.revision,
                loaded_bytes: progress.loaded_bytes,
                total_bytes: progress.total_bytes,
            });
        }
    };
    let model = Model::load(
        dir,
        LoadOptions {
            dtype: config.dtype,
            cache: CacheLayout {
                page_size: config.page_size,
                num_pages,
            },
            device: penstock_model::Device::Cpu,
            progress: &report,
        },
    )?;
    let eos_token_ids = model_config.eos_token_ids.clone();
    Ok(Parts {
        runner: Box::new(CandleRunner::new(model)),
        num_pages,
        digest,
        tokenizer,
        template,
        eos_token_ids,
    })
}

fn fake(config: &Config, spec: &ModelSpec, pace: Duration) -> Result<Parts, LoadErrorKind> {
    let tokenizer = Tokenizer::bytes();
    let runner = FakeRunner::new(FakeConfig {
        vocab_size: tokenizer.vocab_size(),
        context_length: FAKE_CONTEXT,
        pace,
        ..FakeConfig::default()
    });
    // One digest per name, so that fakes of several workers agree.
    let digest = blake3::hash(format!("penstock fake runner {spec}").as_bytes())
        .to_hex()
        .to_string();
    Ok(Parts {
        runner: Box::new(runner),
        num_pages: (config.max_running * FAKE_CONTEXT).div_ceil(config.page_size),
        digest,
        tokenizer,
        template: Some(ChatTemplate::from_source(FAKE_TEMPLATE)?),
        eos_token_ids: Vec::new(),
    })
}

/// Pages that the KV memory holds; by default those of `max_running` whole contexts, up to a limit.
fn num_pages(config: &Config, bytes_per_token: u64, context: usize) -> Result<usize, LoadErrorKind> {
    let page = bytes_per_token * config.page_size as u64;
    let wanted = (config.max_running * context) as u64 * bytes_per_token;
    let given = config
        .kv_memory_bytes
        .unwrap_or_else(|| wanted.clamp(page, DEFAULT_KV_BYTES.max(page)));
    match usize::try_from(given / page) {
        Ok(pages) if pages > 0 => Ok(pages),
        _ => Err(LoadErrorKind::KvMemory { given, page }),
    }
}

fn observe(engine: &Engine) -> EngineObservation {
    let stats = engine.stats();
    EngineObservation {
        running: stats.running as u64,
        waiting: stats.waiting as u64,
        pages_total: stats.total_pages as u64,
        pages_free: stats.free_pages as u64,
        pages_cached: stats.cached_pages as u64,
        prefix_lookup_tokens: stats.prefix_lookup_tokens,
        prefix_hit_tokens: stats.prefix_hit_tokens,
        steps: stats.steps,
        tokens: stats.tokens_generated,
        retractions: stats.retractions,
    }
}
