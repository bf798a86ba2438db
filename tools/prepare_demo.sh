#!/usr/bin/env bash
# prepare_demo.sh ENGINE_PREP OUT BODY_DTYPE: prepares the demo model, unless this very program has done
# it already.
set -euo pipefail
engine_prep=$1 out=$2 dtype=$3

stamp="$out/prepared-by"
wanted="$(sha256sum <"$engine_prep") $dtype"
if [ -e "$out/client/engine.json" ] && [ -e "$out/body/infemeral.json" ] &&
   [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
"$engine_prep" --model demo/SmolLM2-135M-Instruct --output "$out" --body-dtype "$dtype" --force
echo "$wanted" >"$stamp"
