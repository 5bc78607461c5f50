//! The same kernels on a CUDA card, of compute capability 8.0 or later.
//!
//! The sources beside this file are compiled by NVRTC for the card that is found, and the machine code is kept on
//! disk. Nothing of CUDA is linked: a program with this feature starts anywhere, and says what is missing when it is
//! to open a device. Each kernel's oracle is its plain twin in [`mod@crate::reference`].
//!
//! What a product reads is bf16, what it writes and what is summed is f32, as on the CPU. Unlike there, a row's result
//! may depend on how many rows there are, because cuBLASLt takes another algorithm for another shape.

mod compile;
mod device;
mod error;
mod gemm;
mod inputs;
mod launch;
mod memory;
mod sampling;

pub use compile::{MAX_CUDA_HEAD_DIM, Source, nvrtc_version};
pub use device::{Gpu, Graph, Moment, device_count};
pub use error::CudaError;
pub use inputs::{CudaBatch, CudaLimits, Inputs};
pub use launch::{CudaAttention, CudaCache, MAX_SPLITS, RopeStore, Splits};
pub use memory::{Buffer, Plain, Staging};
pub use sampling::{CudaToken, DeviceSampler, MAX_STOPS};
