#!/usr/bin/env bash
# For a machine with a card and no Rust: runs a `gpu-check` built elsewhere (build.sh), which compares the kernels with
# their plain twins on fresh random inputs, and exits non-zero on any mismatch. Prints a table, writes check.json.
#
#     check.sh [GPU_CHECK=./gpu-check] [DEVICE=0]
set -euo pipefail
program=${1:-./gpu-check} device=${2:-0}
[ -x "$program" ] || { echo "check.sh: $program is no program; build.sh makes it" >&2; exit 2; }
status=0
"$program" "$device" >check.json || status=$?
sed -E 's/^\{"check":"([^"]*)","agrees":([a-z]*),(.*)\}$/\1\t\2\t\3/' check.json | tr -d '"' | column -t -s "$(printf '\t')"
exit "$status"
