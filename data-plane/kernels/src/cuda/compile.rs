//! Kernel sources to machine code: NVRTC, and a cache of what it made on disk.

use std::{
    ffi::CString,
    fs,
    path::{Path, PathBuf},
    process,
};

use cudarc::nvrtc::{result as nvrtc, sys};

use super::CudaError;

/// A source file of kernels, and what it is compiled with.
#[derive(Debug, Clone)]
pub struct Source {
    /// File name.
    pub name: &'static str,
    text: &'static str,
    defines: Vec<(&'static str, usize)>,
}

/// Widest head of the attention kernels.
pub const MAX_CUDA_HEAD_DIM: usize = 256;

const SHARED: &str = concat!(include_str!("machine.cuh"), include_str!("common.cuh"));

// === impl Source ===

impl Source {
    /// Gathers, norms, the gate and the copy of pages.
    pub fn rows() -> Self {
        Self::plain("rows.cu", include_str!("rows.cu"))
    }

    /// The rotary embedding and the write of the cache.
    pub fn rope() -> Self {
        Self::plain("rope.cu", include_str!("rope.cu"))
    }

    /// Sampling.
    pub fn sample() -> Self {
        Self::plain("sample.cu", include_str!("sample.cu"))
    }

    /// Attention over heads of `head_dim` elements, with this many buffers in shared memory (1 or 2).
    pub fn attention(head_dim: usize, stages: usize) -> Self {
        Self {
            defines: vec![("HEAD_DIM", head_dim), ("STAGES", stages)],
            ..Self::plain("attention.cu", include_str!("attention.cu"))
        }
    }

    fn plain(name: &'static str, text: &'static str) -> Self {
        let defines = Vec::new();
        Self { name, text, defines }
    }

    /// Compiles to a cubin for `arch`, e.g. `sm_90a`. Needs NVRTC, but neither a device nor a driver.
    ///
    /// # Errors
    /// There is no NVRTC, or it refuses the source.
    pub fn compile(&self, arch: &str) -> Result<Vec<u8>, CudaError> {
        require_nvrtc()?;
        let failed = |log: String| CudaError::Compile {
            name: self.name,
            arch: arch.to_owned(),
            log,
        };
        let text =
            CString::new(format!("{SHARED}{}", self.text)).map_err(|error| failed(error.to_string()))?;
        let name = CString::new(self.name).map_err(|error| failed(error.to_string()))?;
        let program = nvrtc::create_program(&text, Some(&name)).map_err(|error| failed(error.to_string()))?;
        let compiled = self.compile_program(program, arch);
        // SAFETY: the program was made above, and is not used any more.
        let destroyed = unsafe { nvrtc::destroy_program(program) };
        let cubin = compiled.map_err(failed)?;
        destroyed.map_err(|error| failed(error.to_string()))?;
        Ok(cubin)
    }

    fn compile_program(&self, program: sys::nvrtcProgram, arch: &str) -> Result<Vec<u8>, String> {
        let mut options = vec![
            format!("--gpu-architecture={arch}"),
            "--std=c++17".into(),
            "-lineinfo".into(),
        ];
        options.extend(
            self.defines
                .iter()
                .map(|(name, value)| format!("-D{name}={value}")),
        );
        // SAFETY: the program exists until the caller destroys it; sizes are asked for before buffers are filled.
        unsafe {
            if let Err(error) = nvrtc::compile_program(program, &options) {
                let log = nvrtc::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.into_iter().map(|byte| byte as u8).collect();
                let log = String::from_utf8_lossy(&log)
                    .trim_end_matches('\0')
                    .trim()
                    .to_owned();
                return Err(if log.is_empty() { error.to_string() } else { log });
            }
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &mut size)
                .result()
                .map_err(|error| error.to_string())?;
            let mut cubin = vec![0_u8; size];
            sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast())
                .result()
                .map_err(|error| error.to_string())?;
            Ok(cubin)
        }
    }

    /// As [`Source::compile`], by way of the files in `cache`. A cache that cannot be read or written is done without.
    pub(super) fn load(&self, arch: &str, cache: Option<&Path>) -> Result<Vec<u8>, CudaError> {
        let Some(path) = cache.map(|cache| cache.join(self.file(arch))) else {
            return self.compile(arch);
        };
        if let Ok(cubin) = fs::read(&path) {
            return Ok(cubin);
        }
        let cubin = self.compile(arch)?;
        // Written aside and moved, so that a reader never sees a part.
        let aside = path.with_extension(format!("{}", process::id()));
        let kept = fs::create_dir_all(path.parent().unwrap_or(&path))
            .and_then(|()| fs::write(&aside, &cubin))
            .and_then(|()| fs::rename(&aside, &path));
        drop(kept);
        Ok(cubin)
    }

    /// A name that differs wherever the machine code may.
    fn file(&self, arch: &str) -> PathBuf {
        let mut hash = blake3::Hasher::new();
        hash.update(SHARED.as_bytes()).update(self.text.as_bytes());
        for (name, value) in &self.defines {
            hash.update(format!("{name}={value};").as_bytes());
        }
        let (major, minor) = nvrtc_version().unwrap_or_default();
        let hash = hash.finalize().to_hex();
        format!("{}-{arch}-{major}.{minor}-{}.cubin", self.name, &hash[..16]).into()
    }
}

/// NVRTC's version, if it is there.
pub fn nvrtc_version() -> Option<(i32, i32)> {
    require_nvrtc().ok()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there; both pointers are to live integers.
    let found = unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result();
    found.ok().map(|()| (major, minor))
}

fn require_nvrtc() -> Result<(), CudaError> {
    // SAFETY: this opens the library, whose initialisers are NVIDIA's, and closes it.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(CudaError::Library {
            library: "libnvrtc.so",
            remedy: "it comes with CUDA 13 or with the Python package nvidia-cuda-nvrtc; LD_LIBRARY_PATH must name its directory",
        }),
    }
}
