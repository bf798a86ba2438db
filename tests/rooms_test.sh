#!/usr/bin/env bash
# Data flows one way: engine/ includes none of the other rooms; cpu/, kernels/ and net/ include only
# engine/ (and themselves); nobody includes tools/, perf/ or tests/ but those folders themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

failed=0
check() {  # ROOM ALLOWED...
  local room=$1 found
  shift
  local allowed
  allowed=$(IFS='|'; echo "$*")
  # Only the project's own folders count; "absl/..." and the like are packages.
  found=$(grep -rnE '^ *# *include +"(engine|cpu|kernels|net|proto|tools|perf|tests)/' \
            --include='*.h' --include='*.cpp' --include='*.cu' --include='*.cuh' "$room" |
          grep -vE "# *include +\"($allowed)/" || true)
  if [ -n "$found" ]; then
    echo "$room/ may include only: $*"
    echo "$found"
    failed=1
  fi
}
check engine engine
check cpu engine cpu
check kernels engine kernels
check net engine net proto
check tools engine cpu kernels net tools

# The check must be able to fail.
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
mkdir "$probe/engine"
echo '#include "net/codec.h"' > "$probe/engine/bad.h"
if (cd "$probe" && failed=0 && check engine engine >/dev/null && [ "$failed" = 0 ]); then
  echo "the check did not find a planted include"
  failed=1
fi
exit "$failed"
