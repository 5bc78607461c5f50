//! Why the device could not do something.

use cudarc::{
    cublaslt::result::CublasError,
    driver::{DriverError, sys::CUresult},
};

/// An operation on a CUDA device failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library is not where the loader looks.
    #[error("{library} was not found: {remedy}")]
    Library {
        /// Its name.
        library: &'static str,
        /// Where it comes from.
        remedy: &'static str,
    },
    /// There is no such device.
    #[error("there is no CUDA device {ordinal}: the driver shows {count}")]
    NoDevice {
        /// The one asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The card is too old.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 8.0 or later")]
    TooOld {
        /// The card.
        name: String,
        /// First number of its capability.
        major: i32,
        /// Second number of it.
        minor: i32,
    },
    /// Memory for a buffer cannot be had.
    #[error("the device is out of memory: {bytes} bytes were asked for")]
    OutOfMemory {
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// The driver refused.
    #[error("the device failed to {action}")]
    Driver {
        /// What was to be done.
        action: &'static str,
        /// The driver's word.
        source: DriverError,
    },
    /// A kernel does not compile.
    #[error("kernel source {name} does not compile for {arch}: {log}")]
    Compile {
        /// Its file.
        name: &'static str,
        /// The architecture.
        arch: String,
        /// The compiler's word.
        log: String,
    },
    /// cuBLASLt has nothing for a product, or failed at it.
    #[error("the product of [{rows}, {inputs}] and [{outputs}, {inputs}] transposed failed")]
    Product {
        /// Rows of the first.
        rows: usize,
        /// Columns of both.
        inputs: usize,
        /// Rows of the second.
        outputs: usize,
        /// The library's word.
        source: CublasError,
    },
    /// cuBLASLt does not start.
    #[error("cuBLASLt does not start")]
    Blas(#[source] CublasError),
    /// A width that the kernels are not written for.
    #[error("{what} is {value}; on CUDA it must be {range}")]
    Width {
        /// Of what.
        what: &'static str,
        /// The width.
        value: usize,
        /// What it may be.
        range: &'static str,
    },
    /// A step contradicts itself or its buffers.
    #[error("the step cannot run: {0}")]
    Step(String),
}

/// Names what was to be done when the driver refuses.
pub(super) trait Doing<T> {
    fn to(self, action: &'static str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn to(self, action: &'static str) -> Result<T, CudaError> {
        self.map_err(|source| match source.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { bytes: 0 },
            _ => CudaError::Driver { action, source },
        })
    }
}
