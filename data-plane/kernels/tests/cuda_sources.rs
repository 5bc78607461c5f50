//! The CUDA sources, run by an emulation of a card on the CPU and compared with the reference twins. It shows that
//! their indices, masks, barriers and sums are right, not that a card runs them, let alone fast.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ffi::c_void,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard},
};

use half::bf16;
use libloading::Library;
use penstock_kernels::{SampleRow, reference};

#[path = "emulator/attention.rs"]
mod attention;
#[path = "emulator/rope.rs"]
mod rope;
#[path = "emulator/rows.rs"]
mod rows;
#[path = "emulator/sample.rs"]
mod sample;

/// Rounding to bf16, and a last bit.
const BF16: f32 = 1.0 / 128.0;

/// One source, compiled for the CPU. Only one block runs at a time.
struct Emulated {
    library: Library,
    _alone: MutexGuard<'static, ()>,
}

impl Emulated {
    fn compile(source: &str, defines: &[(&str, usize)]) -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poison| poison.into_inner());
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let names: Vec<String> = defines
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let stem = format!("{source}-{}-{}", names.join("-"), std::process::id());
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let (text, object) = (
            directory.join(format!("{stem}.cpp")),
            directory.join(format!("{stem}.so")),
        );
        let parts = [
            root.join("tests/emulator/machine.h"),
            root.join("src/cuda/common.cuh"),
            root.join(format!("src/cuda/{source}.cu")),
        ];
        let parts = parts.map(|part| fs::read_to_string(part).unwrap());
        fs::write(&text, parts.concat()).unwrap();
        let status = Command::new("c++")
            .args(["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o"])
            .arg(&object)
            .arg(&text)
            .args(names.iter().map(|name| format!("-D{name}")))
            .status();
        assert!(status.unwrap().success(), "{source} compiles");
        // SAFETY: the library has no initialisers but its own globals'.
        let library = unsafe { Library::new(&object) }.unwrap();
        fs::remove_file(text).unwrap();
        fs::remove_file(object).unwrap();
        Self {
            library,
            _alone: alone,
        }
    }

    /// Runs `thread` for every thread of every block.
    fn launch(&self, grid: [usize; 3], threads: usize, thread: impl Fn()) {
        extern "C" fn call<F: Fn()>(thread: *mut c_void) {
            // SAFETY: `launch` passes on the pointer that it got below.
            unsafe { (*thread.cast::<F>())() }
        }
        fn trampoline<F: Fn()>(_: &F) -> extern "C" fn(*mut c_void) {
            call::<F>
        }
        type Launch = unsafe extern "C" fn(extern "C" fn(*mut c_void), *const c_void, *const i32, i32);
        let grid = grid.map(|size| size as i32);
        // SAFETY: that is the function's type in machine.h; the closure lives until it returns.
        unsafe {
            let launch = self.library.get::<Launch>(b"launch").unwrap();
            launch(
                trampoline(&thread),
                (&raw const thread).cast(),
                grid.as_ptr(),
                threads as i32,
            );
        }
    }
}

/// Calls a kernel: its name, its arguments with their types.
macro_rules! kernel {
    ($emulated:expr, $name:literal, $grid:expr, $threads:expr, $($argument:expr => $kind:ty),+ $(,)?) => {{
        type Kernel = unsafe extern "C" fn($($kind),+);
        // SAFETY: the test passes what the kernel's signature says, and buffers as long as it touches.
        let kernel = *unsafe { $emulated.library.get::<Kernel>($name) }.unwrap();
        // SAFETY: as above.
        $emulated.launch($grid, $threads, || unsafe { kernel($($argument),+) });
    }};
}
use kernel;

fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

fn to_f32(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// What an output holds before a kernel writes it.
fn poison(len: usize) -> Vec<bf16> {
    vec![bf16::NAN; len]
}

/// A different seed each time; a failure prints it.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = now.unwrap().as_nanos() as u64;
    eprintln!("seed {seed}");
    seed
}
