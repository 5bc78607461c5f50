//! The CPU kernels of the decoder, and memory-mapped files: the only crate of the workspace that is unsafe.
//!
//! Each kernel is written once over [`lanes`](crate::Isa) of 16 floats and compiled for every instruction set; the
//! best one that the machine has is chosen at run time. Each has a plain twin in [`mod@reference`], which is what the
//! tests compare it with.
//!
//! Kernels are deterministic in a strong sense: what a row of the output is depends on that row's inputs alone, bit
//! by bit, and not on how many other rows there are or how work is split over threads. So a reply does not depend
//! on what it is batched with, nor on how its prompt was cut into chunks.
//!
//! ```
//! use penstock_kernels::{Cpu, Element, Linear};
//!
//! let cpu = Cpu::detect();
//! let weights = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
//! let linear = Linear::pack(cpu, Element::F32, 3, 2, &|row, to| to.copy_from_slice(&weights[row]));
//! let mut y = [0.0; 3];
//! linear.forward(cpu, &mut y, &[1.0, -1.0], None);
//! assert_eq!(y, [-1.0, -1.0, -1.0]);
//! ```
//!
//! With the feature `cuda` there are the same kernels for CUDA cards, in the module `cuda`.
//!
//! The crate refuses to know models, checkpoints and scheduling; it takes slices.

mod activation;
mod attention;
mod buffer;
mod collective;
#[cfg(feature = "cuda")]
pub mod cuda;
mod isa;
mod lanes;
mod linear;
mod mapped;
mod norm;
mod pool;
pub mod reference;
mod rope;
mod sampling;
mod shared;

pub use attention::{Attention, AttentionSequence, attention};
pub use buffer::prefer_huge_pages;
pub use collective::{Collective, CollectiveError, LocalCollective};
pub use isa::Isa;
pub use linear::{Element, Layer, Linear, mlp};
pub use mapped::MappedFile;
pub use norm::{add_rms_norm, rms_norm};
pub use pool::Pool;
pub use rope::{CacheShape, MAX_HEAD_DIM, QkvShape, Rotate, rotate, store};
pub use sampling::SampleRow;

/// Where kernels run: an instruction set and the process's threads.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    /// Instruction set.
    pub isa: Isa,
    /// Threads; one pool for the whole process, so that several engines do not fight over the cores.
    pub pool: &'static Pool,
}

impl Cpu {
    /// The best that this machine has.
    pub fn detect() -> Self {
        Self {
            isa: Isa::best(),
            pool: Pool::process(),
        }
    }
}
