#!/usr/bin/env bash
# cmake --install, then a project that knows nothing but find_package(infemeral CONFIG) is configured,
# built and run. usage: consumer_test.sh BUILD_DIR SOURCE_DIR MAKE_PREPARED_PROGRAM
set -euo pipefail
build=$1 source=$2 make_prepared=$3

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/prefix" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$make_prepared" "$work/model"
"$work/prefix/bin/engine_prep" --quiet --model "$work/model" --output "$work/prepared"

# Installed headers and configuration must not name the build machine's folders.
if grep -rlF -e "$build" -e "$source" "$work/prefix/include" "$work/prefix"/lib*/cmake; then
  echo "installed files name the source or build folder"
  exit 1
fi

cp -r "$source/tests/consumer" "$work/consumer"
# Every public header stands on its own, with nothing but what is installed.
(cd "$work/prefix/include/infemeral" && find . -name '*.h' -printf '#include "%P"\n') \
  >"$work/consumer/headers.inc"
sed -i '1a #include "headers.inc"' "$work/consumer/main.cpp"
cmake -S "$work/consumer" -B "$work/consumer/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$work/prefix" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
cmake --build "$work/consumer/build" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$work/consumer/build/consumer" "$work/prepared" | grep '^8 tokens'
