//! Command line and environment of the worker.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use crate::{Config, Dtype, MemoryBudget, RunnerKind, source::SourceConfig};

/// A revision of a model to serve, and where its checkpoint is: `NAME@REVISION=PATH_OR_URI`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSpec {
    /// Name of the model, e.g. `demo`.
    pub model: String,
    /// Name of the revision, e.g. `v1`.
    pub revision: String,
    /// Directory of the checkpoint in Hugging Face layout, or a [`source`](crate::source::Source) that is fetched,
    /// such as `hf://owner/name`. Empty with the fake runner, which needs none.
    pub path: PathBuf,
}

/// A `--model` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not NAME@REVISION=PATH: {reason}")]
pub struct ModelSpecError {
    value: String,
    reason: &'static str,
}

impl FromStr for ModelSpec {
    type Err = ModelSpecError;

    fn from_str(value: &str) -> Result<Self, ModelSpecError> {
        let error = |reason| ModelSpecError {
            value: value.into(),
            reason,
        };
        let (names, path) = value.split_once('=').unwrap_or((value, ""));
        let (model, revision) = names
            .split_once('@')
            .ok_or_else(|| error("there is no @ between the model and its revision"))?;
        if !is_name(model) || !is_name(revision) {
            return Err(error("names are letters, digits and . _ - : only, at least one"));
        }
        if value.ends_with('=') {
            return Err(error("the path is empty"));
        }
        Ok(Self {
            model: model.into(),
            revision: revision.into(),
            path: path.into(),
        })
    }
}

/// Names are written into keys of the store and into metadata.
pub(crate) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte))
}

impl fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.model, self.revision)
    }
}

/// What runs the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Runner {
    /// The model itself
    Candle,
    /// No model: made-up tokens at a given pace, for load tests
    Fake,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DtypeName {
    F32,
    Bf16,
    /// Matrices in 8 bits, KV in bf16: half of bf16's memory, outputs off by about 1 %
    Int8,
}

/// Runs models and serves them over gRPC. Registers itself in the store; gateways find it there.
#[derive(Debug, Clone, clap::Parser)]
#[command(version)]
pub struct Args {
    /// A revision to serve: a checkpoint directory in Hugging Face layout, a .gguf file, or hf://, s3:// or https:// with
    /// --data-dir (repeatable)
    ///
    /// Others come and go as the control plane places them here.
    #[arg(long = "model", value_name = "NAME@REVISION=PATH_OR_URI")]
    models: Vec<ModelSpec>,

    /// gRPC and HTTP
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8100",
        env = "PENSTOCK_WORKER_LISTEN"
    )]
    listen: SocketAddr,

    /// Operations: /metrics, /drain
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8101",
        env = "PENSTOCK_WORKER_OPS_LISTEN"
    )]
    ops_listen: SocketAddr,

    /// Where gateways reach this worker [default: the listen address]
    #[arg(long, value_name = "HOST:PORT", env = "PENSTOCK_WORKER_ADVERTISE")]
    advertise: Option<String>,

    /// Name of this worker, unique among all [default: the advertised address]
    #[arg(long, env = "PENSTOCK_WORKER_ID")]
    id: Option<String>,

    /// Region, told to gateways
    #[arg(long, default_value = "", env = "PENSTOCK_REGION")]
    region: String,

    /// etcd endpoints, separated by commas
    #[cfg(feature = "etcd")]
    #[arg(
        long,
        value_name = "ENDPOINTS",
        value_delimiter = ',',
        required = true,
        env = "PENSTOCK_ETCD"
    )]
    etcd: Vec<String>,

    /// Control planes that place revisions here, separated by commas [default: whichever leads, as etcd says]
    #[arg(
        long,
        value_name = "ADDRS",
        value_delimiter = ',',
        env = "PENSTOCK_CONTROL_PLANE"
    )]
    control_plane: Vec<String>,

    /// Keeps what is placed here, for a restart without a control plane, and checkpoints that were fetched
    #[arg(long, value_name = "DIR", env = "PENSTOCK_WORKER_DATA_DIR")]
    data_dir: Option<PathBuf>,

    /// What runs the models
    #[arg(long, value_enum, default_value = "candle")]
    runner: Runner,

    /// Time per step of the fake runner
    #[arg(long, value_name = "DURATION", default_value = "20ms", value_parser = parse_duration)]
    pace: Duration,

    /// Number format of weights and KV [default: chosen by the checkpoint and the device]
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,

    /// Tokens per KV page
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    page_size: u32,

    /// Memory for the KV of each revision, e.g. 512MiB [default: all that can be needed, up to 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    kv_memory: Option<u64>,

    /// Memory for the weights and KV of all revisions, e.g. 8GiB [default: what the machine or container has]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory_limit: Option<u64>,

    /// Sequences that run at once, per revision
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_running: u32,

    /// Sequences that wait at most, per revision; further ones are refused
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_waiting: u32,

    /// Tokens of one step at most; longer prompts are computed in chunks
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_batch_tokens: u32,

    /// Ranks that each model is split over: each has a part of every layer. Divides the model's heads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    tensor_parallel_size: u32,

    /// A step that takes longer is taken for stuck: the worker leaves rotation until steps complete again
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse_duration)]
    watchdog_timeout: Duration,

    /// Time that running requests get when the worker is told to end
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    drain_timeout: Duration,

    /// What to log, in the syntax of RUST_LOG
    #[arg(long, value_name = "FILTER", env = "RUST_LOG")]
    log: Option<String>,
}

impl Args {
    /// The log filter, if one was given.
    pub fn log(&self) -> Option<&str> {
        self.log.as_deref()
    }

    /// etcd's endpoints.
    #[cfg(feature = "etcd")]
    pub fn etcd(&self) -> &[String] {
        &self.etcd
    }

    /// Everything else, on a store.
    pub fn into_config(self, store: std::sync::Arc<dyn penstock_store::Store>) -> Config {
        Config {
            id: self.id,
            listen: self.listen,
            ops_listen: self.ops_listen,
            advertise: self.advertise,
            region: self.region,
            runner: match self.runner {
                Runner::Candle => RunnerKind::Candle,
                Runner::Fake => RunnerKind::Fake { pace: self.pace },
            },
            dtype: self.dtype.map(|dtype| match dtype {
                DtypeName::F32 => Dtype::F32,
                DtypeName::Bf16 => Dtype::Bf16,
                DtypeName::Int8 => Dtype::Int8,
            }),
            page_size: self.page_size as usize,
            kv_memory_bytes: self.kv_memory,
            memory: MemoryBudget::new(self.memory_limit),
            control_planes: self.control_plane,
            source: SourceConfig::from_env(),
            data_dir: self.data_dir,
            max_running: self.max_running as usize,
            max_waiting: self.max_waiting as usize,
            max_batch_tokens: self.max_batch_tokens as usize,
            tensor_parallel_size: self.tensor_parallel_size as usize,
            watchdog_timeout: self.watchdog_timeout,
            drain_timeout: self.drain_timeout,
            ..Config::new(store, self.models)
        }
    }
}

/// Reads `20ms`, `1.5s`, `2m`.
fn parse_duration(value: &str) -> Result<Duration, String> {
    let seconds = scaled(
        value,
        &[("ms", 1e-3), ("us", 1e-6), ("s", 1.0), ("m", 60.0), ("h", 3600.0)],
    );
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "is not a duration such as 20ms, 1.5s or 2m".into())
}

/// Reads `512MiB`, `1.5GiB`, `1000000`.
fn parse_size(value: &str) -> Result<u64, String> {
    const UNITS: &[(&str, f64)] = &[
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("", 1.0),
    ];
    match scaled(value, UNITS) {
        Some(bytes) if (1.0..1e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err("is not a size such as 512MiB or 2GiB".into()),
    }
}

/// A number times its unit; `None` for anything else. Units are tried in order.
fn scaled(value: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (number, factor) = units
        .iter()
        .find_map(|(unit, factor)| Some((value.strip_suffix(unit)?, factor)))?;
    if !number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_name_revision_and_path() {
        let spec: ModelSpec = "demo@v1=/ckpt/a=b".parse().unwrap();
        assert_eq!(
            spec,
            ModelSpec {
                model: "demo".into(),
                revision: "v1".into(),
                path: "/ckpt/a=b".into()
            }
        );
        let fake: ModelSpec = "demo@v1".parse().unwrap();
        assert_eq!(fake.path, PathBuf::new());
        assert_eq!(fake.to_string(), "demo@v1");
    }

    #[test]
    fn other_models_are_refused_with_the_reason() {
        for (value, reason) in [
            ("demo=/ckpt", "no @"),
            ("@v1=/ckpt", "names are"),
            ("demo@=/ckpt", "names are"),
            ("a/b@v1=/ckpt", "names are"),
            ("demo@v1=", "path is empty"),
        ] {
            let error = value.parse::<ModelSpec>().unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("4096"), Ok(4096));
        for value in ["", "MiB", "0", "-1MiB", "1MB", "1e3", "inf", "1 GiB"] {
            assert!(parse_size(value).is_err(), "{value}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for value in ["", "s", "20", "-1s", "nans", "1 s"] {
            assert!(parse_duration(value).is_err(), "{value}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }
}
