#!/usr/bin/env bash
# Installs what this project needs on Debian 12; --help says more.
set -euo pipefail

readonly PACKAGES=(
  # compilers and build
  g++ cmake ninja-build ccache pkg-config
  # libraries, all found by cmake/Dependencies.cmake
  catch2 libabsl-dev libbenchmark-dev libcli11-dev libeigen3-dev libgrpc++-dev liblz4-dev
  libpcre2-dev libprotobuf-dev libsodium-dev libspdlog-dev libssl-dev libtbb-dev libutf8proc-dev
  nlohmann-json3-dev prometheus-cpp-dev protobuf-compiler protobuf-compiler-grpc
  # charts of the benchmark page
  libjs-chart.js
  # the demo model
  ca-certificates python3-venv
)
readonly TEST_PACKAGES=(
  # formatting, sanitizers and fuzzing, with readable stacks
  clang-14 clang-format-14 git libclang-rt-14-dev llvm-14
  # opens the benchmark page
  chromium chromium-driver
  # Google Benchmark's compare.py, which must read our export
  libbenchmark-tools
  # certificates for the tests of TLS
  openssl
  # counts instructions for perf/instruction_gate.py
  valgrind
)
readonly REFERENCE_PACKAGES=(
  # the implementation that makes tests/golden; OpenBLAS makes it ten times as fast
  python3-torch libopenblas0-pthread
)

usage() {
  cat <<'TEXT'
Usage: tools/install_deps.sh [--tests] [--reference] [--help]

Sets up a Debian 12 machine for this project: Debian packages with apt-get (through sudo when not
run as root) and a Python virtual environment in .venv at the top of the repository. Asks nothing;
what is already there is skipped.

  --tests       also what the tests need: clang with its sanitizers, and the Python packages of
                tests/requirements.txt
  --reference   also what makes the reference answers in tests/golden anew: PyTorch and
                transformers, in an environment of their own, .venv-reference
  --help        this text
TEXT
}

say() { echo "install_deps.sh: $*" >&2; }
die() {
  say "$*"
  exit 1
}

# Runs a command quietly; when it fails, shows the end of what it printed.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" >"$log" 2>&1 </dev/null || status=$?
  if ((status != 0)); then tail -n 20 "$log" >&2; fi
  rm -f "$log"
  return "$status"
}

is_installed() {
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

install_packages() {
  local missing=() package
  for package in "$@"; do
    is_installed "$package" || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then return; fi

  command -v apt-get >/dev/null || die "apt-get is not here: this script is for Debian 12"
  local as_root=(env DEBIAN_FRONTEND=noninteractive)
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "not root and no sudo: install as root: ${missing[*]}"
    sudo -n true 2>/dev/null || [[ -t 0 ]] ||
      die "sudo wants a password and there is no terminal: install as root: ${missing[*]}"
    sudo -v || die "sudo was refused: install as root: ${missing[*]}"
    as_root=(sudo "${as_root[@]}")
  fi
  say "installing ${#missing[@]} Debian packages: ${missing[*]}"
  local apt=("${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300)
  # A stale list of some other source is no reason to stop; the install that follows tells.
  quietly "${apt[@]}" update || say "apt-get update had errors; going on"
  quietly "${apt[@]}" install --yes --no-install-recommends "${missing[@]}" ||
    die "apt-get could not install the packages above: see its last lines, then run this again"
}

# install_python VENV REQUIREMENTS [VENV OPTION...]: a stamp remembers what was installed.
install_python() {
  local venv=$1 requirements=$2 stamp wanted
  shift 2
  # An interrupted venv has a python but no pip.
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    rm -rf "$venv"
    quietly /usr/bin/python3 -m venv "$@" "$venv" ||
      die "could not make the Python environment $venv"
  fi
  stamp="$venv/installed-${requirements//\//-}"
  wanted=$(cat tools/requirements.txt "$requirements")
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  say "installing the Python packages of $requirements"
  quietly "$venv/bin/python" -m pip install --disable-pip-version-check -r "$requirements" ||
    die "pip could not install $requirements: check the network and run this again"
  echo "$wanted" >"$stamp"
}

main() {
  local packages=("${PACKAGES[@]}") tests='' reference=''
  while (($# > 0)); do
    case $1 in
      --tests)
        packages+=("${TEST_PACKAGES[@]}")
        tests=1
        ;;
      --reference)
        packages+=("${REFERENCE_PACKAGES[@]}")
        reference=1
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      *)
        usage >&2
        exit 2
        ;;
    esac
    shift
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  install_packages "${packages[@]}"
  install_python .venv tools/requirements.txt
  [[ -z $tests ]] || install_python .venv tests/requirements.txt
  # Debian's PyTorch is seen through the system's packages.
  [[ -z $reference ]] ||
    install_python .venv-reference tests/golden/requirements.txt --system-site-packages
}

main "$@"
