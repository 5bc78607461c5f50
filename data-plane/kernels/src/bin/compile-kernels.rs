//! Compiles every CUDA source for the architectures that it is given, e.g. `compile-kernels sm_80 sm_90a`. It needs
//! NVRTC, but neither a device nor a driver. With `--out DIR`, the cubins are kept there.

use std::{fs, path::PathBuf, process::ExitCode};

use penstock_kernels::cuda::Source;

/// Widths that checkpoints of the supported families have, and some that need padding.
const HEAD_DIMS: [usize; 5] = [16, 64, 80, 128, 256];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut architectures, mut out) = (Vec::new(), None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--out" => out = arguments.next().map(PathBuf::from),
            _ => architectures.push(argument),
        }
    }
    if architectures.is_empty() {
        eprintln!("usage: compile-kernels [--out DIR] ARCHITECTURE...");
        return ExitCode::FAILURE;
    }
    let mut sources = vec![Source::rows(), Source::rope(), Source::sample()];
    sources.extend(HEAD_DIMS.map(|head_dim| Source::attention(head_dim, 2)));
    sources.push(Source::attention(256, 1));
    let mut failures = 0;
    for architecture in &architectures {
        for (number, source) in sources.iter().enumerate() {
            match source.compile(architecture) {
                Ok(cubin) => {
                    eprintln!("{architecture} {}: {} bytes", source.name, cubin.len());
                    if let Some(out) = &out {
                        let file = out.join(format!("{architecture}-{number}-{}.cubin", source.name));
                        if let Err(error) = fs::write(&file, cubin) {
                            eprintln!("{}: {error}", file.display());
                            failures += 1;
                        }
                    }
                }
                Err(error) => {
                    eprintln!("{error}");
                    failures += 1;
                }
            }
        }
    }
    match failures {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
