//! One card, its stream and the kernels loaded on it.

use std::{path::Path, sync::Arc};

use cudarc::{
    cublaslt, driver,
    driver::{
        CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream,
        sys::CUstreamCaptureMode,
        sys::{CUdevice_attribute, CUevent_flags, CUfunction_attribute_enum, CUgraphInstantiate_flags},
    },
    nvrtc::Ptx,
};

use super::{CudaError, MAX_CUDA_HEAD_DIM, Source, error::Doing, gemm::Blas};

/// A card and its one stream, on which everything happens in order. It belongs to one thread at a time.
pub struct Gpu {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) functions: Functions,
    pub(super) blas: Blas,
    pub(super) head_dim: usize,
    pub(super) multiprocessors: usize,
    name: String,
}

/// The kernels.
pub(super) struct Functions {
    pub(super) embed: CudaFunction,
    pub(super) gather_rows: CudaFunction,
    pub(super) rms_norm: CudaFunction,
    pub(super) add_rms_norm: CudaFunction,
    pub(super) swiglu: CudaFunction,
    pub(super) copy_pages: CudaFunction,
    pub(super) rope_store: CudaFunction,
    pub(super) attend_prefill: CudaFunction,
    pub(super) attend_decode: CudaFunction,
    pub(super) combine: CudaFunction,
    pub(super) sample: CudaFunction,
    /// Shared memory of the attention kernels, in bytes.
    pub(super) attention_shared: u32,
}

/// Launches that were recorded, to be repeated as one.
pub struct Graph(driver::CudaGraph);

// SAFETY: a graph may be used by any thread, though not by two at once, and there is no shared access: what launches
// it takes it by `&mut`.
unsafe impl Send for Graph {}

/// A point in the stream's time.
pub struct Moment(CudaEvent);

/// How many devices there are.
///
/// # Errors
/// There is no driver.
pub fn device_count() -> Result<usize, CudaError> {
    // SAFETY: this opens and closes the library.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(CudaError::Library {
            library: "libcuda.so",
            remedy: "it belongs to NVIDIA's driver, of which 580 or later is needed; nvidia-smi shows it",
        });
    }
    driver::result::init().to("start the driver")?;
    let count = driver::result::device::get_count().to("count devices")?;
    Ok(usize::try_from(count).unwrap_or(0))
}

// === impl Gpu ===

impl Gpu {
    /// Opens device `ordinal`, with attention for heads of `head_dim` elements. Machine code is kept in `cache`.
    ///
    /// # Errors
    /// The driver, NVRTC, cuBLASLt or the device is not there; the card is too old, or the width not one of the
    /// kernels'.
    pub fn open(ordinal: usize, head_dim: usize, cache: Option<&Path>) -> Result<Self, CudaError> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        // SAFETY: this opens and closes the library.
        if !unsafe { cublaslt::sys::is_culib_present() } {
            return Err(CudaError::Library {
                library: "libcublasLt.so",
                remedy: "it comes with CUDA 13 or with the Python package nvidia-cublas; LD_LIBRARY_PATH must name its directory",
            });
        }
        if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > MAX_CUDA_HEAD_DIM {
            return Err(CudaError::Width {
                what: "head_dim",
                value: head_dim,
                range: "a multiple of 8, 256 at most",
            });
        }
        let context = CudaContext::new(ordinal).to("open a context")?;
        // SAFETY: there is one stream, which orders all work by itself.
        unsafe { context.disable_event_tracking() };
        let name = context.name().to("tell its name")?;
        let (major, minor) = context.compute_capability().to("tell its capability")?;
        if major < 8 {
            return Err(CudaError::TooOld { name, major, minor });
        }
        let stream = context.new_stream().to("open a stream")?;
        let attribute = |attribute| context.attribute(attribute).to("tell an attribute");
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let functions = Functions::load(&context, &architecture(major, minor), head_dim, shared, cache)?;
        let blas = Blas::open(&stream)?;
        Ok(Self {
            functions,
            blas,
            head_dim,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
            name: format!("{name}, {major}.{minor}"),
            context,
            stream,
        })
    }

    /// The card, e.g. `NVIDIA H100 80GB HBM3, 9.0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Free and total memory, in bytes.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.context.mem_get_info().to("tell its memory")
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// Some of it failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize().to("finish its work")?;
        self.context.check_err().to("finish its work")
    }

    /// Notes the time behind all work so far.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn moment(&self) -> Result<Moment, CudaError> {
        let event = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.map(Moment).to("note the time")
    }

    /// Records what `launch` launches instead of running it. It must neither wait nor allocate.
    ///
    /// # Errors
    /// A launch fails, or the driver cannot record one of them.
    pub fn record(&self, launch: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        self.stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .to("record a graph")?;
        let launched = launch();
        // Ended whatever happened, because a stream that records runs nothing.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        launched?;
        match graph.to("record a graph")? {
            Some(graph) => {
                graph.upload().to("load a graph")?;
                Ok(Graph(graph))
            }
            None => Err(CudaError::Step("nothing was recorded".into())),
        }
    }

    /// Runs what was recorded.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn launch(&self, graph: &mut Graph) -> Result<(), CudaError> {
        graph.0.launch().to("run a graph")
    }
}

// === impl Moment ===

impl Moment {
    /// Milliseconds from this to `later`, which is waited for.
    ///
    /// # Errors
    /// Work in between failed.
    pub fn milliseconds_to(&self, later: &Self) -> Result<f32, CudaError> {
        self.0.elapsed_ms(&later.0).to("tell the time")
    }
}

// === impl Functions ===

impl Functions {
    fn load(
        context: &Arc<CudaContext>,
        architecture: &str,
        head_dim: usize,
        shared: i32,
        cache: Option<&Path>,
    ) -> Result<Self, CudaError> {
        let load = |source: Source| -> Result<Arc<CudaModule>, CudaError> {
            let cubin = source.load(architecture, cache)?;
            context.load_module(Ptx::from_binary(cubin)).to("load kernels")
        };
        // Two stages of keys and values, as long as they fit into the memory that a block may have. The rows are padded to 16 elements, and 8 lie between two.
        let stage = 2 * 64 * (head_dim.next_multiple_of(16) + 8) * 2;
        let stages = if 2 * stage + 1024 <= usize::try_from(shared).unwrap_or(0) {
            2
        } else {
            1
        };
        let attention_shared = u32::try_from(stages * stage).unwrap_or(u32::MAX);
        let (rows, rope, sample) = (
            load(Source::rows())?,
            load(Source::rope())?,
            load(Source::sample())?,
        );
        let attention = load(Source::attention(head_dim, stages))?;
        let find = |module: &Arc<CudaModule>, name| module.load_function(name).to("find a kernel");
        let attend = |name| {
            let function = find(&attention, name)?;
            let bytes = i32::try_from(attention_shared).unwrap_or(i32::MAX);
            function
                .set_attribute(
                    CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    bytes,
                )
                .to("reserve shared memory")?;
            Ok::<_, CudaError>(function)
        };
        Ok(Self {
            embed: find(&rows, "embed")?,
            gather_rows: find(&rows, "gather_rows")?,
            rms_norm: find(&rows, "rms_norm")?,
            add_rms_norm: find(&rows, "add_rms_norm")?,
            swiglu: find(&rows, "swiglu")?,
            copy_pages: find(&rows, "copy_pages")?,
            rope_store: find(&rope, "rope_store")?,
            attend_prefill: attend("attend_prefill")?,
            attend_decode: attend("attend_decode")?,
            combine: find(&attention, "combine")?,
            sample: find(&sample, "sample")?,
            attention_shared,
        })
    }
}

/// NVRTC's name of a card's architecture. Hopper's own instructions are in `sm_90a` alone.
fn architecture(major: i32, minor: i32) -> String {
    match (major, minor) {
        (9, 0) => "sm_90a".into(),
        _ => format!("sm_{major}{minor}"),
    }
}
