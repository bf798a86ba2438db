#!/usr/bin/env bash
# cmake --install, then a project that knows nothing but find_package(infemeral CONFIG) is configured,
# built and run; and one that has this one as a folder of its own is configured. usage: consumer_test.sh BUILD_DIR SOURCE_DIR MAKE_PREPARED_PROGRAM
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

# With files of the same names as this project's, and without its programs.
mkdir -p "$work/parent/cmake"
for name in Infemeral Cuda Dependencies Install; do
  echo 'message(FATAL_ERROR "the wrong file")' >"$work/parent/cmake/$name.cmake"
done
cat >"$work/parent/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.21)
project(parent LANGUAGES CXX)
list(APPEND CMAKE_MODULE_PATH "\${CMAKE_CURRENT_SOURCE_DIR}/cmake")
add_subdirectory($source infemeral)
add_executable(consumer $source/tests/consumer/main.cpp)
target_link_libraries(consumer PRIVATE infemeral::engine infemeral::cpu infemeral::net)
CMAKE
cmake -S "$work/parent" -B "$work/parent/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DINFEMERAL_CUDA=OFF \
  >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
cmake --build "$work/parent/build" --target help >"$work/targets"
if grep -E '^(engine_run|engine_bench|pipeline_test):' "$work/targets"; then
  echo "a project that embeds the libraries has to build the programs"
  exit 1
fi
