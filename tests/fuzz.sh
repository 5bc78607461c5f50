#!/usr/bin/env bash
# Hunts for input that the gateway's fuzz targets do not bear: `bash tests/fuzz.sh [SECONDS] [TARGET...]`, each target for
# so long on one core, 60 s by default. The targets are tests in gateway/src/fuzz.rs; their corpora lie beside it in
# __fuzz__ and are replayed by every `cargo test`, as is whatever this finds, in crashes/. The fuzzer is libFuzzer, which
# the bolero crate brings along; the compiler is the stable one, told that it may instrument.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
directory=${CARGO_TARGET_DIR:-$HOME/.cache/penstock-target}/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
coverage=(inline-8bit-counters level=4 pc-table trace-compares stack-depth)
flags="--cfg fuzzing -Cpasses=sancov-module --cfg fuzzing_libfuzzer${coverage[*]/#/ -Cllvm-args=-sanitizer-coverage-}"

export RUSTC_BOOTSTRAP=1 BOLERO_FUZZER=libfuzzer
# The library's tests only: all else would have to be linked with the fuzzer too.
RUSTFLAGS=$flags cargo test --locked -p gateway --lib --profile fuzz --target "$host" --target-dir "$directory" --no-run
binary=$(ls -t "$directory/$host"/fuzz/deps/gateway-* | grep -v '\.d$' | head -1)
if [ "$#" -eq 0 ]; then
    mapfile -t targets < <("$binary" --list | sed -nE 's/^fuzz::(\w+): test$/\1/p')
else
    targets=("$@")
fi

failed=()
for target in "${targets[@]}"; do
    known=gateway/src/__fuzz__/fuzz__$target
    found=$directory/corpus/$target
    mkdir -p "$found" "$known/corpus" "$known/crashes"
    echo "== $target for $seconds s"
    export BOLERO_TEST_NAME=fuzz::$target BOLERO_LIBTEST_HARNESS=1
    export BOLERO_LIBFUZZER_ARGS="$found $known/corpus $known/crashes -artifact_prefix=$known/crashes/ -timeout=10 -max_len=4096 -print_final_stats=1 -max_total_time=$seconds"
    if ! "$binary" "fuzz::$target" --exact --nocapture --quiet --test-threads 1 >"$found.log" 2>&1; then
        failed+=("$target")
        tail -n 40 "$found.log"
    fi
    grep -E 'INITED|DONE|stat::(number|new)' "$found.log" || true
    rmdir --ignore-fail-on-non-empty "$known/crashes"
done
[ "${#failed[@]}" -eq 0 ] || { echo "found something: ${failed[*]}"; exit 1; }
