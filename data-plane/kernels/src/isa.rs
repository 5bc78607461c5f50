//! Which instructions this machine has.

use std::{fmt, sync::OnceLock};

/// An instruction set that this machine has. Values come from [`Isa::best`] and [`Isa::available`] only, which is
/// what makes it sound to run the kernels compiled for it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Isa(Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Level {
    /// What every processor of this architecture has.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with BF16, and AMX with bf16 and int8 tiles that the kernel lets this process use.
    Amx,
}

impl Isa {
    /// The best that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        Self(*BEST.get_or_init(detect))
    }

    /// All that this machine has, the plainest first.
    pub fn available() -> Vec<Self> {
        let levels = [Level::Portable, Level::Avx2, Level::Avx512, Level::Amx];
        levels
            .into_iter()
            .filter(|&level| level <= Self::best().0)
            .map(Self)
            .collect()
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }

    /// Whether there are dot products of bytes in AVX-512.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_vnni(self) -> bool {
        self.0 >= Level::Avx512 && is_x86_feature_detected!("avx512vnni")
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return Level::Portable;
    }
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match avx512 {
        false => Level::Avx2,
        true if is_x86_feature_detected!("avx512bf16") && tiles_usable() => Level::Amx,
        true => Level::Avx512,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// Whether the processor has bf16 and int8 tiles and the kernel grants this process their state (Linux,
/// Documentation/arch/x86/xstate.rst). The grant holds for all threads, later ones included.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles_usable() -> bool {
    use std::arch::x86_64::__cpuid_count;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    /// CPUID leaf 7: EDX bit 22 is AMX-BF16, bit 24 AMX-TILE, bit 25 AMX-INT8.
    const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    if __cpuid_count(7, 0).edx & AMX != AMX {
        return false;
    }
    // SAFETY: this system call only asks for a permission; kernels that do not know it answer with an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles_usable() -> bool {
    false
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Amx => "avx512, amx",
        })
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
