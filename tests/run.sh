#!/usr/bin/env bash
# Installs what the tests need, builds every binary, runs every test and closes with `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/penstock-target}
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
# shellcheck source=tests/prerequisites.sh
source tests/prerequisites.sh || exit 1

report=$(mktemp)
trap 'rm -f "$report"' EXIT
passed=0 failed=0

# Adds up the summary lines of one run of a test runner, read from $report.
count() {
    local p f
    p=$(sed -nE 's/^ *Summary .* ([0-9]+) passed.*/\1/p; s/^test result: .* ([0-9]+) passed;.*/\1/p' "$report" | awk '{ n += $1 } END { print n + 0 }')
    f=$(sed -nE 's/^ *Summary .* ([0-9]+) failed.*/\1/p; s/^ *Summary .* ([0-9]+) timed out.*/\1/p; s/^test result: .* ([0-9]+) failed;.*/\1/p' "$report" | awk '{ n += $1 } END { print n + 0 }')
    passed=$((passed + p)) failed=$((failed + f))
}

# Runs one test command; a command that fails without a failed test (a build error) counts as one failure.
run() {
    local before=$failed status
    "$@" 2>&1 | tee "$report"
    status=${PIPESTATUS[0]}
    count
    if [ "$status" -ne 0 ] && [ "$failed" -eq "$before" ]; then
        failed=$((failed + 1))
    fi
}

# The end-to-end tests start the real binaries, so these are built first.
if ! cargo build --workspace --bins --locked; then
    echo "0 passed, 1 failed"
    exit 1
fi
if cargo nextest --version >/dev/null 2>&1; then
    run cargo nextest run --workspace --locked --no-fail-fast --config-file tests/nextest.toml
else
    run cargo test --workspace --locked --no-fail-fast --bins --lib --tests
fi
run cargo test --workspace --locked --doc

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
