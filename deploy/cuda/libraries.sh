#!/usr/bin/env bash
# Fetches CUDA 13 libraries from PyPI, without root, and prints the one directory that has them all, for
# LD_LIBRARY_PATH:
#
#     libraries.sh nvrtc                  the kernels' compiler (enough to compile them without a card)
#     libraries.sh nvrtc cublas nccl      what a worker loads on a machine with a driver but no CUDA (about 1 GB)
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: libraries.sh nvrtc|cublas|nccl..." >&2; exit 2; }

packages=()
for library in "$@"; do
    case $library in
        nvrtc) packages+=(nvidia-cuda-nvrtc==13.0.88) ;;
        cublas) packages+=(nvidia-cublas==13.1.0.3) ;;
        nccl) packages+=(nvidia-nccl-cu13==2.28.9) ;;
        *) echo "libraries.sh: $library is none of nvrtc, cublas and nccl" >&2; exit 2 ;;
    esac
done

home=${PENSTOCK_CUDA_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/penstock-cuda}
directory=$home/lib
listing=$home/packages
for package in "${packages[@]}"; do
    grep -qxF "$package" "$listing" 2>/dev/null && continue
    [ -x "$home/venv/bin/pip" ] || python3 -m venv "$home/venv" >&2
    # The libraries name those that they need themselves; what the packages require beyond is not used.
    "$home/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile "$package" >&2
    mkdir -p "$directory"
    while IFS= read -r library; do
        name=$(basename "$library")
        ln -sfn "$library" "$directory/$name"
        # The loader is asked for libX.so, and the packages have libX.so.N alone.
        [[ $name == *.alt.* ]] || ln -sfn "$library" "$directory/${name%%.so.*}.so"
    done < <(find "$home"/venv/lib/python3*/site-packages/nvidia -path '*/lib/lib*.so.*' -type f)
    echo "$package" >>"$listing"
done
echo "$directory"
