#!/usr/bin/env bash
# Serves at 70 % of what the fleet can, kills workers at random and changes the plan, for 30 minutes or for the seconds
# given: `bash tests/soak.sh [SECONDS]`. Says every 30 s how it goes and closes with a table; fails if a single request
# failed or if memory grew.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/penstock-target}
# shellcheck source=tests/prerequisites.sh
source tests/prerequisites.sh
cargo build --locked --bin gateway --bin worker --bin control-plane --bin ctl -p gateway -p worker -p control-plane -p ctl
PENSTOCK_SOAK_SECONDS=${1:-1800} cargo test --locked -p penstock-tests --test soak -- --nocapture
