#!/usr/bin/env python3
"""Counts the instructions of the CPU's hot functions under callgrind and compares with a baseline.

Counts are the same on a busy machine as on a calm one, so that CI can hold them to a few per cent
where it could never hold times. They belong to a compiler, a C library and an instruction set (AVX2,
which valgrind knows): a baseline names its compiler, and one of another compiler is not compared.

  instruction_gate.py HOT_FUNCTIONS                  compare; exit 1 when a function needs more
  instruction_gate.py HOT_FUNCTIONS --record         write the baseline anew
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

BASELINE = pathlib.Path(__file__).parent / "results" / "instructions.json"


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"instruction_gate.py: {command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def count(program):
    """Instructions below each hot_* function, callees included."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INFEMERAL_")}
    environment["INFEMERAL_ISA"] = "avx2"
    with tempfile.TemporaryDirectory() as folder:
        run(program, "prepare", folder)
        out = pathlib.Path(folder) / "callgrind.out"
        run("valgrind", "--tool=callgrind", "--toggle-collect=hot_*",
            f"--callgrind-out-file={out}", program, "run", folder, env=environment)
        table = run("callgrind_annotate", "--inclusive=yes", "--threshold=100", out)
    counts = {}
    for line in table.splitlines():
        found = re.match(r"\s*([\d,]+) \([^)]*\)\s+\S*:(hot_\w+) \[", line)
        if found:
            counts[found[2].removeprefix("hot_")] = int(found[1].replace(",", ""))
    if len(counts) < 6:
        sys.exit(f"instruction_gate.py: found only {sorted(counts)}; were functions renamed?")
    return counts


def compiler(program):
    """Debian's GCC leaves its name in the program."""
    text = run("readelf", "-p", ".comment", program)
    return sorted(set(re.findall(r"\] +(.+)", text)))[-1].strip()


def compare(counts, baseline, max_ratio):
    """The functions that need too many instructions, after a table."""
    slower = []
    print(f"{'function':<16} {'baseline':>14} {'now':>14} {'ratio':>8}")
    for name, now in counts.items():
        before = baseline.get(name)
        if before is None:
            print(f"{name:<16} {'-':>14} {now:>14,}   not in the baseline")
            continue
        verdict = ""
        if now > max_ratio * before:
            verdict = "  MORE"
            slower.append(name)
        print(f"{name:<16} {before:>14,} {now:>14,} {now / before:>8.3f}{verdict}")
    return slower


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hot_functions", type=pathlib.Path)
    parser.add_argument("--baseline", type=pathlib.Path, default=BASELINE)
    parser.add_argument("--max-ratio", type=float, default=1.05)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    for tool in ("valgrind", "callgrind_annotate", "readelf"):
        if shutil.which(tool) is None:
            sys.exit(f"instruction_gate.py: {tool} is not here (Debian: valgrind, binutils)")

    program = args.hot_functions.resolve()
    counts = dict(sorted(count(program).items()))
    if args.record:
        record = {"compiler": compiler(program), "instruction_set": "avx2", "instructions": counts}
        args.baseline.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{args.baseline}: {len(counts)} functions")
        return
    baseline = json.loads(args.baseline.read_text())
    if baseline["compiler"] != compiler(program):
        print(f"not compared: the baseline is of {baseline['compiler']}, this program of "
              f"{compiler(program)}")
        return
    slower = compare(counts, baseline["instructions"], args.max_ratio)
    if slower:
        sys.exit(f"instruction_gate.py: {', '.join(slower)} need more than {args.max_ratio} times the "
                 "baseline's instructions; where that is meant, record the baseline anew (--record)")


if __name__ == "__main__":
    main()
