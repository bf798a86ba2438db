#!/usr/bin/env bash
# Builds and runs every test: release build with the demo model and the Python peers, then
# AddressSanitizer and UndefinedBehaviorSanitizer with the fuzzers, then ThreadSanitizer over the
# network. Installs what it needs on a fresh Debian 12.
#   --quick   the release build's tests only
set -euo pipefail
cd "$(dirname "$0")/.."
for name in "${!INFEMERAL_@}"; do unset "$name"; done

quick=
case "${1:-}" in
  "") ;;
  --quick) quick=1 ;;
  -h | --help)
    sed -n '2,5s/^# //p' "$0"
    exit 0
    ;;
  *)
    echo "usage: $0 [--quick]" >&2
    exit 2
    ;;
esac

started=$SECONDS
step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }
fuzz_seconds=60
jobs=$(nproc)

step "packages"
./tools/install_deps.sh --tests

step "format"
git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format-14 --dry-run --Werror

step "release: build"
python=$PWD/.venv/bin/python
peers=(-DINFEMERAL_TEST_PYTHON="$python"
       -DINFEMERAL_TEST_TOKENIZER_JSON="$PWD/demo/SmolLM2-135M-Instruct/tokenizer.json")
cmake --preset release "${peers[@]}"
cmake --build build/release

step "demo model"
"$python" tools/demo_model.py --output demo/SmolLM2-135M-Instruct
for dtype in f32 f16; do
  ./tools/prepare_demo.sh build/release/tools/engine_prep "demo/prepared-$dtype" "$dtype"
done
export INFEMERAL_DEMO_F32=$PWD/demo/prepared-f32

step "release: tests"
ctest --test-dir build/release --output-on-failure -j "$jobs"
step "instruction counts"
"$python" -B perf/instruction_gate.py build/release/perf/hot_functions
step "teacher-forced agreement"
for dtype in f32 f16; do
  build/release/tests/agreement "demo/prepared-$dtype" tests/golden/smollm2_teacher.json
done
[ -z "$quick" ] || exit 0

step "address and undefined-behaviour sanitizer: build"
cmake --preset asan "${peers[@]}"
cmake --build build/asan
step "address and undefined-behaviour sanitizer: tests"
ctest --test-dir build/asan --output-on-failure -j "$jobs"

step "fuzzers, $fuzz_seconds s each"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fuzzers=(safetensors tokenizer_json frames handshake encode session chunks lz4)
fuzz() {
  local name=$1
  mkdir -p "$scratch/$name"
  # New inputs go to the scratch folder; the committed corpus is only read.
  if "build/asan/tests/fuzz/fuzz_$name" -max_total_time="$fuzz_seconds" -timeout=20 \
       -rss_limit_mb=4096 -artifact_prefix="$scratch/" "$scratch/$name" \
       "tests/fuzz/corpus/$name" >"$scratch/$name.log" 2>&1; then
    echo "fuzz_$name: $(grep '^Done' "$scratch/$name.log")"
  else
    cat "$scratch/$name.log"
    return 1
  fi
}
for ((i = 0; i < ${#fuzzers[@]}; i += 2)); do  # two at a time
  fuzz "${fuzzers[i]}" & first=$!
  fuzz "${fuzzers[i + 1]}" & second=$!
  wait "$first"
  wait "$second"
done

step "thread sanitizer: build"
# Not the tests that compute: oneTBB, which Debian builds without the sanitizer's hooks, hands work
# over in ways that it does not see.
threaded_tests=(corruption link link_hostile link_limits noise codec frames identity drain in_flight
                padding parallel rekey resume scheduler disk_queue)
cmake --preset tsan
cmake --build build/tsan --target "${threaded_tests[@]/%/_test}"
step "thread sanitizer: tests"
ctest --test-dir build/tsan --output-on-failure -j "$jobs" \
  -R "^($(IFS='|'; echo "${threaded_tests[*]}"))\$"

step "all checks passed"
