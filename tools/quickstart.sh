#!/usr/bin/env bash
# One command from a fresh Debian 12 machine to private generation: installs the packages, builds,
# makes the demo model, prepares it, starts the body server and runs engine_run against it. Leaves
# results.jsonl and report.json here and the rest under demo/; what is done already is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
# Options of the user's own runs must not reach the programs here.
for name in "${!INFEMERAL_@}"; do unset "$name"; done

case "${1:-}" in
  "") ;;
  -h | --help)
    sed -n '2,5s/^# //p' "$0"
    exit 0
    ;;
  *)
    echo "usage: $0" >&2
    exit 2
    ;;
esac

step() { printf '\n== %s\n' "$*" >&2; }

step "packages"
./tools/install_deps.sh

step "build"
cmake --preset release -DINFEMERAL_TESTS=OFF -B build/quickstart >/dev/null
cmake --build build/quickstart --target engine_prep engine_keygen engine_serve engine_run
bin=build/quickstart/tools

step "demo model: SmolLM2-135M-Instruct"
.venv/bin/python tools/demo_model.py --output demo/SmolLM2-135M-Instruct

step "prepare: split into client and body, rotate the body"
./tools/prepare_demo.sh "$bin/engine_prep" demo/prepared f16

step "keys"
for name in client server; do
  [ -e "demo/$name.key.pub" ] && [ -e "demo/$name.key" ] && continue
  rm -f "demo/$name.key" "demo/$name.key.pub"  # one half alone is an interrupted run's
  "$bin/engine_keygen" --output "demo/$name.key"
done

step "body server"
log=demo/server.log
"$bin/engine_serve" --model demo/prepared/body --listen 127.0.0.1:0 \
  --identity demo/server.key --allow demo/client.key.pub > "$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
for _ in $(seq 300); do
  grep -q '^listening' "$log" && break
  kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 3; }
  sleep 0.1
done
address=$(sed -n 's/^listening on \([^,]*\),.*/\1/p' "$log")
[ -n "$address" ] || { echo "the body server did not start; see $log" >&2; exit 3; }

step "private generation (server $address)"
"$bin/engine_run" --model demo/prepared --server "$address" --server-key demo/server.key.pub \
  --identity demo/client.key -f tools/prompts.jsonl -n 96 \
  --stream -o results.jsonl --overwrite --report report.json --profile

step "results.jsonl and report.json are written"
