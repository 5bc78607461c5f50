#!/usr/bin/env bash
# Builds what checks the kernels on a card, into deploy/cuda/out. It needs neither a card nor CUDA. The target machine
# needs x86-64 Linux with a C library no older than this one's, NVIDIA's driver (580 or later), and libnvrtc and
# libcublasLt of CUDA 13, which `libraries.sh nvrtc cublas` fetches where there is no CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."
bash deploy/cuda/compile-kernels.sh sm_80 sm_90a
cargo build --release --locked -p penstock-kernels --features cuda --bin gpu-check
mkdir -p deploy/cuda/out
install "${CARGO_TARGET_DIR:-target}/release/gpu-check" deploy/cuda/check.sh deploy/cuda/libraries.sh deploy/cuda/out/
strip deploy/cuda/out/gpu-check
ls -l deploy/cuda/out
