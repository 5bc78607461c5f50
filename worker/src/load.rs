//! Loading revisions and starting their engines.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
    time::Duration,
};

use penstock_engine::{CandleRunner, Engine, EngineConfig, EngineError, FakeConfig, FakeRunner, Runner};
use penstock_model::{CacheLayout, GgufText, LoadOptions, Model, ModelConfig, TensorParallel, TokenKind};
use penstock_telemetry::instruments::{EngineObservation, Served as Labels, WorkerMetrics};
use penstock_text::{BpeVocabulary, ChatTemplate, TextError, Tokenizer};

use crate::{
    Config, Dtype, LoadProgress, MemoryError, ModelSpec, RunnerKind,
    catalogue::Served,
    grammars::Grammars,
    memory::{Need, Reservation},
    progress::ObserveLoad,
    source::{FetchError, FetchProgress, Source, SourceError, fetch},
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
    /// There is no such directory or file.
    #[error("there is no such directory or GGUF file")]
    NoDirectory,
    /// A GGUF file whose tokenizer is none that is read from there.
    #[error(
        "{}: tokenizer.ggml.model is {model:?}; only gpt2 (byte-level BPE) is read from a GGUF file: put the model's \
         tokenizer.json beside it", path.display()
    )]
    GgufTokenizer {
        /// The file.
        path: PathBuf,
        /// What it says.
        model: String,
    },
    /// Its source cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// There is no place for what would be fetched.
    #[error("a checkpoint that is fetched needs a place: give --data-dir DIR")]
    NoDataDir,
    /// Its source cannot be fetched.
    #[error("it cannot be fetched")]
    Fetch(#[source] Box<FetchError>),
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
    /// Another checkpoint than the one asked for.
    #[error("the checkpoint has digest {found}, the placement asks for {expected}")]
    Digest {
        /// Digest that was asked for.
        expected: String,
        /// Digest of the checkpoint.
        found: String,
    },
    /// There is no room for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The loading thread panicked or could not start.
    #[error("the loading thread failed: {0}")]
    Thread(String),
}

impl LoadErrorKind {
    /// Whether memory is what lacks.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        matches!(
            self,
            Self::Memory(_) | Self::Model(penstock_model::LoadError::Cache { .. })
        )
    }
}

/// Gives the directory of a checkpoint; one that lies elsewhere is fetched first. The fake runner has none.
/// `digest` is empty where it is not known.
pub(crate) async fn locate(
    config: &Config,
    spec: &ModelSpec,
    digest: &str,
    progress: impl Fn(FetchProgress) + Send + Sync,
) -> Result<PathBuf, LoadError> {
    let path = match config.runner {
        RunnerKind::Fake { .. } => Ok(spec.path.clone()),
        RunnerKind::Candle => find(config, &spec.path, digest, &progress).await,
    };
    path.map_err(|source| LoadError {
        spec: spec.clone(),
        source,
    })
}

async fn find(
    config: &Config,
    path: &Path,
    digest: &str,
    progress: &(dyn Fn(FetchProgress) + Send + Sync),
) -> Result<PathBuf, LoadErrorKind> {
    // What is no Unicode can only be a path.
    let Some(text) = path.to_str() else {
        return Ok(path.to_owned());
    };
    let source: Source = text.parse()?;
    // Loading checks the digest of what is here; there is no need to read it twice.
    if let Some(directory) = source.directory() {
        return Ok(directory.to_owned());
    }
    let data_dir = config.data_dir.as_ref().ok_or(LoadErrorKind::NoDataDir)?;
    let expected = Some(digest).filter(|digest| !digest.is_empty());
    let cache = data_dir.join("checkpoints");
    fetch(&source, &config.source, &cache, expected, progress)
        .await
        .map_err(|error| LoadErrorKind::Fetch(Box::new(error)))
}

/// What to load.
pub(crate) struct Request {
    pub(crate) spec: ModelSpec,
    /// Digest that the checkpoint must have, or empty.
    pub(crate) digest: String,
    /// Is told how far loading is, beside the configuration's own observer.
    pub(crate) observer: Arc<dyn ObserveLoad>,
    pub(crate) metrics: WorkerMetrics,
}

/// Loads a revision on a thread of its own and starts its engine. Loading goes on behind a future that is
/// dropped, but its result is then lost.
pub(crate) async fn load(config: &Config, request: Request) -> Result<Arc<Served>, LoadError> {
    let (config, spec) = (config.clone(), request.spec.clone());
    let (budget, progress) = (config.memory.clone(), config.progress.clone());
    let served = on_thread(&spec, move || revision(&config, request)).await?;
    let device = &served.engine.runner().device;
    tracing::info!(revision = %spec, device, digest = served.digest, "revision loaded");
    tracing::info!("memory:\n{}", budget.table());
    if let Some(progress) = progress {
        progress.ready(&spec.model, &spec.revision);
    }
    Ok(Arc::new(served))
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

fn revision(config: &Config, request: Request) -> Result<Served, LoadErrorKind> {
    let spec = &request.spec;
    let parts = match config.runner {
        RunnerKind::Candle => candle(config, &request)?,
        RunnerKind::Fake { pace } => fake(config, &request, pace)?,
    };
    let engine = Engine::start(
        EngineConfig {
            name: spec.to_string(),
            page_size: config.page_size,
            num_pages: parts.num_pages,
            max_running: config.max_running,
            max_waiting: config.max_waiting,
            max_batch_tokens: config.max_batch_tokens,
            stall_after: config.watchdog_timeout,
        },
        parts.runner,
    )?;
    let observed = {
        let engine = engine.clone();
        let register = request.metrics;
        register.register_engine(&spec.model, &spec.revision, move || observe(&engine))
    };
    let tokenizer = Arc::new(parts.tokenizer);
    Ok(Served {
        labels: Labels::new(&spec.model, &spec.revision),
        model: spec.model.clone(),
        revision: spec.revision.clone(),
        digest: parts.digest,
        engine,
        grammars: Grammars::new(
            &spec.to_string(),
            &tokenizer,
            parts.vocab_size,
            &parts.eos_token_ids,
        ),
        tokenizer,
        template: parts.template,
        eos_token_ids: parts.eos_token_ids,
        watch_words: RwLock::default(),
        _memory: parts.memory,
        _observed: observed,
    })
}

/// What a runner's kind decides.
struct Parts {
    runner: Box<dyn Runner>,
    num_pages: usize,
    digest: String,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    eos_token_ids: Vec<u32>,
    /// The model's, which may be larger than the tokenizer's.
    vocab_size: usize,
    memory: Reservation,
}

fn candle(config: &Config, request: &Request) -> Result<Parts, LoadErrorKind> {
    let spec = &request.spec;
    let dir: &Path = &spec.path;
    if !dir.exists() {
        return Err(LoadErrorKind::NoDirectory);
    }
    // What is cheap to read comes first, so that a mistake shows before gigabytes are read.
    let (tokenizer, template) = text(dir)?;
    let model_config = ModelConfig::load(dir)?;
    if tokenizer.vocab_size() > model_config.vocab_size {
        tracing::warn!(
            revision = %spec,
            tokenizer = tokenizer.vocab_size(),
            model = model_config.vocab_size,
            "the tokenizer has tokens that the model does not know; prompts with them are refused"
        );
    }
    let per_token =
        Model::kv_bytes_per_token(&model_config, config.dtype, config.tensor_parallel_size) as u64;
    let num_pages = num_pages(config, per_token, model_config.max_position_embeddings)?;
    let digest = penstock_model::manifest_digest(dir)?;
    check_digest(request, &digest)?;
    let need = Need {
        weights: weight_bytes(dir, config.dtype, &model_config),
        kv: (num_pages * config.page_size) as u64 * per_token,
    };
    let memory = config.memory.reserve(spec.to_string(), need)?;
    let report = |progress: penstock_model::LoadProgress| {
        for observer in config.progress.iter().chain([&request.observer]) {
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
            tensor_parallel: TensorParallel {
                size: config.tensor_parallel_size,
                timeout: config.watchdog_timeout,
            },
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
        vocab_size: model_config.vocab_size,
        memory,
    })
}

/// Tokenizer and chat template: the files beside the weights, else what a GGUF file says.
fn text(path: &Path) -> Result<(Tokenizer, Option<ChatTemplate>), LoadErrorKind> {
    let dir = match path.is_dir() {
        true => path,
        false => path.parent().unwrap_or(path),
    };
    let gguf = match dir.join("tokenizer.json").exists() {
        true => None,
        false => GgufText::load(path)?,
    };
    let Some(gguf) = gguf else {
        return Ok((Tokenizer::load(dir)?, ChatTemplate::load(dir)?));
    };
    if gguf.model != "gpt2" {
        return Err(LoadErrorKind::GgufTokenizer {
            path: path.to_owned(),
            model: gguf.model,
        });
    }
    let ids = |wanted: TokenKind| {
        let kinds = gguf.kinds.iter().zip(0..);
        kinds
            .filter(move |(kind, _)| **kind == wanted)
            .map(|(_, id)| id)
            .collect()
    };
    let token = |id: Option<u32>| id.and_then(|id| gguf.tokens.get(id as usize).cloned());
    let special = [("bos_token", token(gguf.bos)), ("eos_token", token(gguf.eos))];
    let special = special
        .into_iter()
        .filter_map(|(name, token)| Some((name, token?)))
        .collect();
    let vocabulary = BpeVocabulary {
        control: ids(TokenKind::Control),
        user_defined: ids(TokenKind::UserDefined),
        bos: gguf.bos.filter(|_| gguf.add_bos),
        pre: gguf.pre.clone(),
        merges: gguf.merges.clone(),
        tokens: gguf.tokens.clone(),
    };
    let template = gguf.chat_template.as_ref();
    let template = template
        .map(|source| ChatTemplate::from_parts(source, special, path))
        .transpose()?;
    Ok((vocabulary.tokenizer(path)?, template))
}

fn check_digest(request: &Request, found: &str) -> Result<(), LoadErrorKind> {
    if request.digest.is_empty() || request.digest == found {
        return Ok(());
    }
    Err(LoadErrorKind::Digest {
        expected: request.digest.clone(),
        found: found.to_owned(),
    })
}

/// Bytes that the weights will take. A checkpoint that does not say how wide its elements are may have the
/// narrowest.
fn weight_bytes(dir: &Path, dtype: Option<Dtype>, model: &ModelConfig) -> u64 {
    let kept = dtype.unwrap_or_else(|| model.default_dtype());
    if !dir.join("config.json").exists() {
        // A GGUF file, whose size says little about how many elements there are.
        return model.parameters() * kept.weight_bytes();
    }
    let stored = model.checkpoint_dtype.map_or(2, Dtype::weight_bytes);
    Need::weights(dir, kept.weight_bytes(), stored)
}

fn fake(config: &Config, request: &Request, pace: Duration) -> Result<Parts, LoadErrorKind> {
    let tokenizer = Tokenizer::bytes();
    let runner = FakeRunner::new(FakeConfig {
        vocab_size: tokenizer.vocab_size(),
        context_length: FAKE_CONTEXT,
        pace,
        ..FakeConfig::default()
    });
    let spec = &request.spec;
    // One digest per name, so that fakes of several workers agree.
    let digest = blake3::hash(format!("penstock fake runner {spec}").as_bytes())
        .to_hex()
        .to_string();
    check_digest(request, &digest)?;
    Ok(Parts {
        vocab_size: tokenizer.vocab_size(),
        runner: Box::new(runner),
        num_pages: (config.max_running * FAKE_CONTEXT).div_ceil(config.page_size),
        digest,
        tokenizer,
        template: Some(ChatTemplate::from_source(FAKE_TEMPLATE)?),
        eos_token_ids: Vec::new(),
        memory: config.memory.reserve(spec.to_string(), Need::default())?,
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
