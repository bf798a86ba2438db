# What the tests of the programs share, to be sourced: an empty folder as the working directory, a
# clean environment, and judging what a command says. Ends the process in `server` on exit; failures
# are counted in `failures`.
# shellcheck shell=bash
set -uo pipefail

for name in "${!INFEMERAL_@}"; do [ "$name" = INFEMERAL_ISA ] || unset "$name"; done
# The programs are the same on every backend; on `auto` one without a GPU says so in a line of its own.
export INFEMERAL_BACKEND=cpu
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -9 "$server" 2>/dev/null; rm -rf "$work"' EXIT
cd "$work" || exit 1
failures=0
fail() { echo "FAILED: $*"; failures=$((failures + 1)); }

# run CODE COMMAND...: runs it, keeps stdout and stderr in files, checks the exit code.
run() {
  local expected=$1 code
  shift
  "$@" >out 2>err </dev/null
  code=$?
  [ "$code" = "$expected" ] || fail "exit $code instead of $expected: $*: $(cat err)"
}
# refused CODE PATTERN COMMAND...: also exactly one line on stderr that matches, nothing on stdout.
refused() {
  local code=$1 pattern=$2
  shift 2
  run "$code" "$@"
  [ "$(wc -l <err)" = 1 ] || fail "not one line on stderr: $*: $(cat err)"
  grep -qE -- "$pattern" err || fail "no '$pattern' in the message of $*: $(cat err)"
  [ ! -s out ] || fail "output on stdout: $*"
}

# start_serving COMMAND...: starts a body server, whose process id is then `server` and whose
# HOST:PORT `address`; its stdout and stderr go to server.out and server.log.
start_serving() {
  : >server.out  # here, and not in the child: an earlier server's line is not this one's
  "$@" >server.out 2>server.log </dev/null &
  server=$!
  for _ in $(seq 2400); do
    grep -q '^listening' server.out && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.05
  done
  address=$(sed -n 's/^listening on \([^,]*\),.*/\1/p' server.out)
  [ -n "$address" ] || fail "the server does not start: $(cat server.log)"
}
