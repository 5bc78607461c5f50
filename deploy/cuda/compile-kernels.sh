#!/usr/bin/env bash
# Compiles every CUDA source for the architectures given (sm_80 and sm_90a by default). Needs neither a card nor CUDA:
# the compiler comes from PyPI.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- sm_80 sm_90a
libraries=$(bash deploy/cuda/libraries.sh nvrtc)
cargo build --quiet --locked -p penstock-kernels --features cuda --bin compile-kernels
LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
    "${CARGO_TARGET_DIR:-target}/debug/compile-kernels" "$@"
