//! Matrix products by cuBLASLt: bf16 operands, f32 sums and outputs.

use std::{collections::HashMap, ffi::c_void, mem::MaybeUninit, sync::Arc, sync::Mutex, sync::PoisonError};

use cudarc::{
    cublaslt::{
        result::{self as lt, CublasError},
        sys,
    },
    driver::CudaStream,
};
use half::bf16;

use super::{Buffer, CudaError, Gpu, error::Doing};

/// Memory that algorithms may use, in bytes: what NVIDIA advises for Hopper (cuBLAS, cublasSetWorkspace).
const WORKSPACE: usize = 32 << 20;
/// Algorithms tried for a shape that is tuned.
const CANDIDATES: usize = 8;
/// Timed runs of each; the median counts.
const RUNS: usize = 7;

/// cuBLASLt, and the algorithm chosen for each shape.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: cudarc::driver::CudaSlice<u8>,
    chosen: Mutex<HashMap<Shape, sys::cublasLtMatmulAlgo_t>>,
}

// SAFETY: the handle may be used by any thread, several at once included (cuBLAS, "Thread Safety").
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// `[rows, inputs] · [outputs, inputs]ᵀ`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

/// cuBLASLt's description of a product; destroyed when dropped.
struct Description {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
}

/// Addresses of a product's operands.
#[derive(Clone, Copy)]
struct Operands {
    y: u64,
    x: u64,
    weight: u64,
}

// === impl Gpu ===

impl Gpu {
    /// `y = x Wᵀ`: `x` is `[rows, inputs]`, `weight` `[outputs, inputs]`, `y` `[rows, outputs]`.
    ///
    /// # Errors
    /// cuBLASLt fails.
    ///
    /// # Panics
    /// A buffer is shorter.
    pub fn product(
        &self,
        y: &mut Buffer<f32>,
        x: &Buffer<bf16>,
        weight: &Buffer<bf16>,
        rows: usize,
        inputs: usize,
    ) -> Result<(), CudaError> {
        let (shape, operands) = self.checked(y, x, weight, rows, inputs);
        let algorithm = self.blas.algorithm(shape)?;
        let description = Description::new(shape).map_err(|error| shape.failed(error))?;
        self.multiply(&description, &algorithm, operands)
            .map_err(|error| shape.failed(error))
    }

    /// Times the algorithms that cuBLASLt proposes for this product, and keeps to the fastest from now on.
    ///
    /// # Errors
    /// None of them runs.
    ///
    /// # Panics
    /// As [`Gpu::product`].
    pub fn tune(
        &self,
        y: &mut Buffer<f32>,
        x: &Buffer<bf16>,
        weight: &Buffer<bf16>,
        rows: usize,
        inputs: usize,
    ) -> Result<(), CudaError> {
        let (shape, operands) = self.checked(y, x, weight, rows, inputs);
        let description = Description::new(shape).map_err(|error| shape.failed(error))?;
        let candidates = self.blas.candidates(&description, CANDIDATES);
        let mut best: Option<(f32, sys::cublasLtMatmulAlgo_t)> = None;
        for algorithm in candidates.map_err(|error| shape.failed(error))? {
            // The first run loads the kernel; an algorithm that does not run is no candidate.
            if self.multiply(&description, &algorithm, operands).is_err() {
                continue;
            }
            let mut times = Vec::with_capacity(RUNS);
            for _ in 0..RUNS {
                let start = self.moment()?;
                self.multiply(&description, &algorithm, operands)
                    .map_err(|error| shape.failed(error))?;
                times.push(start.milliseconds_to(&self.moment()?)?);
            }
            times.sort_by(f32::total_cmp);
            if best.is_none_or(|(time, _)| times[RUNS / 2] < time) {
                best = Some((times[RUNS / 2], algorithm));
            }
        }
        let nothing = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let (_, algorithm) = best.ok_or_else(|| shape.failed(nothing))?;
        self.blas.keep(shape, algorithm);
        Ok(())
    }

    fn checked(
        &self,
        y: &mut Buffer<f32>,
        x: &Buffer<bf16>,
        weight: &Buffer<bf16>,
        rows: usize,
        inputs: usize,
    ) -> (Shape, Operands) {
        let outputs = weight.len() / inputs;
        assert!(
            weight.len() == outputs * inputs && x.len() >= rows * inputs && y.len() >= rows * outputs,
            "the operands hold a product's rows"
        );
        let shape = Shape {
            rows,
            inputs,
            outputs,
        };
        let operands = Operands {
            y: y.address(self, 0),
            x: x.address(self, 0),
            weight: weight.address(self, 0),
        };
        (shape, operands)
    }

    fn multiply(
        &self,
        description: &Description,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        operands: Operands,
    ) -> Result<(), CublasError> {
        use cudarc::driver::DevicePtr;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let (workspace, _guard) = self.blas.workspace.device_ptr(&self.stream);
        // SAFETY: the descriptions live, and the operands have the shapes that they tell; alpha and beta are read
        // before the call returns. The stream orders this with everything else that touches the operands.
        unsafe {
            lt::matmul(
                self.blas.handle,
                description.product,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                operands.weight as *const c_void,
                description.weight,
                operands.x as *const c_void,
                description.x,
                operands.y as *const c_void,
                description.y,
                operands.y as *mut c_void,
                description.y,
                algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
    }
}

// === impl Blas ===

impl Blas {
    pub(super) fn open(stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        let workspace = stream
            .alloc_zeros(WORKSPACE)
            .to("allocate the products' workspace")?;
        Ok(Self {
            handle: lt::create_handle().map_err(CudaError::Blas)?,
            workspace,
            chosen: Mutex::new(HashMap::new()),
        })
    }

    /// The algorithm for a shape: the one tuned for it, or cuBLASLt's first proposal.
    fn algorithm(&self, shape: Shape) -> Result<sys::cublasLtMatmulAlgo_t, CudaError> {
        let chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(algorithm) = chosen.get(&shape) {
            return Ok(*algorithm);
        }
        drop(chosen);
        let description = Description::new(shape).map_err(|error| shape.failed(error))?;
        let candidates = self.candidates(&description, 1);
        let first = candidates.map_err(|error| shape.failed(error))?.first().copied();
        let nothing = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let algorithm = first.ok_or_else(|| shape.failed(nothing))?;
        self.keep(shape, algorithm);
        Ok(algorithm)
    }

    fn keep(&self, shape: Shape, algorithm: sys::cublasLtMatmulAlgo_t) {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        chosen.insert(shape, algorithm);
    }

    fn candidates(
        &self,
        description: &Description,
        count: usize,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
        let preference = lt::create_matmul_pref()?;
        let workspace = WORKSPACE;
        let mut found = vec![MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit(); count];
        let mut returned = 0;
        // SAFETY: all descriptions live; `found` has room for `count` results.
        let status = unsafe {
            lt::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    description.product,
                    description.weight,
                    description.x,
                    description.y,
                    description.y,
                    preference,
                    count as i32,
                    found.as_mut_ptr().cast(),
                    &mut returned,
                )
                .result()
            })
        };
        // SAFETY: it was made above.
        unsafe { lt::destroy_matmul_pref(preference) }?;
        status?;
        let returned = usize::try_from(returned).unwrap_or(0).min(count);
        // SAFETY: the library filled the first `returned`.
        let found = found[..returned]
            .iter()
            .map(|found| unsafe { found.assume_init() });
        Ok(found
            .filter(|found| found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .map(|found| found.algo)
            .collect())
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle is not used any more.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

// === impl Shape ===

impl Shape {
    fn failed(self, source: CublasError) -> CudaError {
        CudaError::Product {
            rows: self.rows,
            inputs: self.inputs,
            outputs: self.outputs,
            source,
        }
    }
}

// === impl Description ===

impl Description {
    /// cuBLASLt counts by columns: a matrix of ours is its transpose there, and `y = x Wᵀ` becomes `yᵀ = W xᵀ`.
    fn new(shape: Shape) -> Result<Self, CublasError> {
        let Shape {
            rows,
            inputs,
            outputs,
        } = shape;
        let (half, single) = (sys::cudaDataType_t::CUDA_R_16BF, sys::cudaDataType_t::CUDA_R_32F);
        let layout = |kind, width: usize, count: usize| {
            lt::create_matrix_layout(kind, width as u64, count as u64, width as i64)
        };
        let description = Self {
            product: lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, single)?,
            weight: layout(half, inputs, outputs)?,
            x: layout(half, inputs, rows)?,
            y: layout(single, outputs, rows)?,
        };
        // CUBLAS_OP_T.
        let transposed = 1_i32;
        // SAFETY: the description lives; the value is read before the call returns.
        unsafe {
            lt::set_matmul_desc_attribute(
                description.product,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )?;
        }
        Ok(description)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: all four were made in `new` and are not used any more.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.product);
            let _ = lt::destroy_matrix_layout(self.weight);
            let _ = lt::destroy_matrix_layout(self.x);
            let _ = lt::destroy_matrix_layout(self.y);
        }
    }
}
