#!/usr/bin/env bash
# Private generation on one machine, once with each client backend: how long tokens take, where
# their time goes, and whether they are the same.
#
# usage: perf/cuda_e2e.sh --programs DIR --model HF_DIR --work DIR --output DIR
#                         [-n TOKENS] [--prompts FILE] [-- ENGINE_RUN_OPTIONS]
#
#   --programs DIR   has engine_prep, engine_keygen, engine_serve and engine_run
#   --model HF_DIR   Hugging Face folder
#   --work DIR       keeps the prepared model and the keys from run to run (as large as the model)
#   --output DIR     gets report-*.json, results-*.jsonl, the logs and summary.txt; older ones go
#   -n TOKENS        tokens to generate for each prompt (default: 32)
#   --prompts FILE   as engine_run -f reads them (default: three prompts of this script's own)
#   --               what follows goes to engine_run, for instance --temp 0.7 --top-p 0.9
#
# BACKENDS="cuda cpu" in the environment names the backends; that is the default. Exit codes: 0 all
# tokens are the same, 1 they are not, 2 bad usage, 3 a program failed.
set -euo pipefail

usage() {
  sed -n '/^# usage/,/^[^#]/s/^# \{0,1\}//p' "$0"
}
die() {
  local code=$1
  shift
  echo "cuda_e2e.sh: $*" >&2
  exit "$code"
}

programs='' model='' work='' output='' prompts='' n_tokens=32
while (($# > 0)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    --programs | --model | --work | --output | --prompts | -n)
      (($# > 1)) || die 2 "$1 needs a value"
      case $1 in
        --programs) programs=$2 ;;
        --model) model=$2 ;;
        --work) work=$2 ;;
        --output) output=$2 ;;
        --prompts) prompts=$2 ;;
        -n) n_tokens=$2 ;;
      esac
      shift 2
      ;;
    *) die 2 "unknown option $1; --help shows what there is" ;;
  esac
done
[[ -n $programs && -n $model && -n $work && -n $output ]] ||
  die 2 "--programs, --model, --work and --output are needed; --help says more"
[[ $n_tokens =~ ^[1-9][0-9]*$ ]] || die 2 "-n needs a number of tokens"
for name in engine_prep engine_keygen engine_serve engine_run; do
  [[ -x $programs/$name ]] || die 2 "$programs has no program $name"
done
[[ -e $model/config.json ]] || die 2 "$model is not a Hugging Face folder: it has no config.json"
[[ -z $prompts || -r $prompts ]] || die 2 "cannot read $prompts"
read -ra backends <<<"${BACKENDS:-cuda cpu}"

# Options of the user's own runs must not reach the programs here.
for name in "${!INFEMERAL_@}"; do unset "$name"; done

step() { printf '\n== %s\n' "$*" >&2; }

mkdir -p "$work" "$output"
rm -f "$output"/{report,results,log}-* "$output"/{server.log,summary.txt}

# A model is prepared anew when the program or the folder has changed.
stamp="$work/prepared-by"
wanted="$(sha256sum <"$programs/engine_prep") $(realpath "$model")"
wanted+=" $(stat -c %Y "$model/config.json")"
if [[ ! -e $work/prepared/client/engine.json || ! -e $work/prepared/body/infemeral.json ||
  $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  step "prepare"
  rm -f "$stamp"
  "$programs/engine_prep" --model "$model" --output "$work/prepared" --force >&2 ||
    die 3 "engine_prep failed"
  echo "$wanted" >"$stamp"
fi

for name in client server; do
  [[ -e $work/$name.key && -e $work/$name.key.pub ]] && continue
  rm -f "$work/$name.key" "$work/$name.key.pub" # one half alone is an interrupted run's
  "$programs/engine_keygen" --output "$work/$name.key" >/dev/null || die 3 "engine_keygen failed"
done

if [[ -z $prompts ]]; then
  prompts="$output/prompts.txt"
  # A short one, a usual one, and one whose prefill is felt.
  cat >"$prompts" <<'TEXT'
Hello
Once upon a time, in a small village by the river, there lived an old clockmaker.
TEXT
  for i in $(seq 8); do
    printf 'On day %d they measured the river again and wrote it down. ' "$i" >>"$prompts"
  done
  echo >>"$prompts"
fi

step "body server"
log="$output/server.log"
server='' client=''
# stop PID: ends a program of this script's; one that does not end on SIGTERM is killed.
stop() {
  [[ -n $1 ]] || return 0
  kill "$1" 2>/dev/null || true
  for _ in $(seq 50); do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.1
  done
  kill -9 "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}
trap 'stop "$client"; stop "$server"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
"$programs/engine_serve" --model "$work/prepared/body" --listen 127.0.0.1:0 \
  --identity "$work/server.key" --allow "$work/client.key.pub" >"$log" 2>&1 </dev/null &
server=$!
for _ in $(seq 3000); do # a large body may come from a slow disk
  grep -q '^listening' "$log" && break
  kill -0 "$server" 2>/dev/null || die 3 "the body server ended: $(tail -n 1 "$log")"
  sleep 0.1
done
address=$(sed -n 's/^listening on \([^,]*\),.*/\1/p' "$log")
[[ -n $address ]] || die 3 "the body server does not listen after five minutes; see $log"

# engine_run on this server, its messages into $log. As a job that is waited for: bash hears of a
# signal only after a program in the foreground has ended.
run() {
  "$programs/engine_run" --model "$work/prepared" --server "$address" \
    --server-key "$work/server.key.pub" --identity "$work/client.key" --backend "$backend" "$@" \
    >>"$log" 2>&1 </dev/null &
  client=$!
  wait "$client" || die 3 "engine_run --backend $backend: $(tail -n 1 "$log")"
  client=''
}
for backend in "${backends[@]}"; do
  step "engine_run --backend $backend (server $address)"
  log="$output/log-$backend.txt"
  # One token first: it brings the body's weights into memory, which must not count for the first
  # backend alone.
  run --check
  run -f "$prompts" -n "$n_tokens" --ignore-eos -o "$output/results-$backend.jsonl" \
    --report "$output/report-$backend.json" --profile "$@"
done

step "summary"
python3 - "$output" "${backends[@]}" <<'PY' | tee "$output/summary.txt"
import json
import sys
from pathlib import Path

folder, backends = Path(sys.argv[1]), sys.argv[2:]
reports = [json.loads((folder / f"report-{b}.json").read_text()) for b in backends]
results = [[json.loads(line) for line in (folder / f"results-{b}.jsonl").read_text().splitlines()]
           for b in backends]


def row(name, values):
    print(f"{name:<26}" + "".join(f"{value:>20}" for value in values))


def ms(value):
    return f"{value:.3f}"


row("", backends)
row("backend in use", [r["options"]["backend"] for r in reports])
row("tokens", [r["tokens"]["output"] for r in reports])
for name in ("ttft", "tpot"):
    for kind in ("mean", "median"):
        row(f"{name} {kind} (ms)", [ms(r[f"{kind}_{name}_ms"]) for r in reports])
for title, key in (("first token", "first_token"), ("decode", "decode")):
    row(f"explained, {title}", [f"{r['phases'][key]['explained_share']:.1%}" for r in reports])
for phase, times in reports[0]["phases"]["decode"].items():
    if isinstance(times, dict):
        means = [r["phases"]["decode"][phase]["mean_ms"] for r in reports]
        row(f"  {phase} (decode, ms)", [ms(mean) for mean in means])
row("full passes a token", [f"{r['head']['full_passes_per_token']:.3f}" for r in reports])
row("rows rescored a token", [f"{r['head']['rows_rescored_per_token']:.1f}" for r in reports])

# A backend that stands in for another would make a comparison with itself.
for backend, report in zip(backends, reports):
    if backend not in report["options"]["backend"].lower():
        print(f"cuda_e2e.sh: --backend {backend} ran on {report['options']['backend']}",
              file=sys.stderr)
        sys.exit(3)
if len(backends) < 2:
    print("tokens compared: none, with one backend")
    sys.exit(0)


def outcome(line):
    # Result lines hold no token ids: the text and the number of tokens stand for them.
    return line["text"], line["output_tokens"], line["finish_reason"]


same = True
for backend, lines in zip(backends[1:], results[1:]):
    differing = [i for i, (a, b) in enumerate(zip(results[0], lines)) if outcome(a) != outcome(b)]
    print(f"tokens of {backend} equal those of {backends[0]}: "
          f"{len(lines) - len(differing)} of {len(lines)} prompts")
    for i in differing:
        a, b = results[0][i]["text"], lines[i]["text"]
        at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        print(f"  prompt {i}: the texts part at character {at} of {len(a)}")
    same = same and not differing
sys.exit(0 if same else 1)
PY
