#!/usr/bin/env python3
"""How near engine_prep comes to the machine's rate of matrix products, and what memory it takes.

Measures the float32 GEMM rate of all physical cores, NumPy's (OpenBLAS in the wheels of PyPI) and
our own (gemm_rate), before and after engine_prep prepares a checkpoint; the best of them counts. The
work is 2 * hidden_size operations for every element of a matrix that is folded. Share is the time
which that work takes at the measured rate over the time that engine_prep took from start to end:
reading, hashing, making the cloak, writing and the self-check included. Peak memory is the largest
resident set, in which mapped pages of the checkpoint count.

A checkpoint of Llama 3 8B's shape (16 GB, and as much again for what is prepared):

    perf/make_checkpoint.py --output CK
    perf/prep_rate.py --programs build/release --model CK --output OUT

OUT must not exist, and is removed at the end unless --keep is given. Needs NumPy.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# In a process of its own: NumPy's memory must not count as that of the child which comes next.
NUMPY_RATE = """
import json, sys, time
import numpy
m, n, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
draw = numpy.random.default_rng()
a = draw.random((m, n), dtype=numpy.float32)
b = draw.random((n, n), dtype=numpy.float32)
c = numpy.empty((m, n), dtype=numpy.float32)
numpy.matmul(a, b, out=c)
rates, end = [], time.perf_counter() + seconds
while not rates or time.perf_counter() < end:
    start = time.perf_counter()
    numpy.matmul(a, b, out=c)
    rates.append(2e-9 * m * n * n / (time.perf_counter() - start))
rates.sort()
print(json.dumps({"best": rates[-1], "median": rates[len(rates) // 2], "repetitions": len(rates)}))
"""


def fail(message: str) -> None:
    raise SystemExit(f"prep_rate.py: {message}")


def output_of(command: list, environment: dict) -> dict:
    result = subprocess.run([str(part) for part in command], env=environment, check=False,
                            capture_output=True, text=True)
    if result.returncode != 0:
        fail(f"{command[0]} failed ({result.returncode}):\n{result.stderr[-2000:]}")
    return json.loads(result.stdout)


def gemm_rates(args: argparse.Namespace, threads: int, hidden: int) -> dict:
    limits = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS",
                                              "MKL_NUM_THREADS")}
    return {"numpy": output_of([sys.executable, "-c", NUMPY_RATE, args.rows, hidden, args.seconds],
                               {**os.environ, **limits}),
            "ours": output_of([find(args.programs, "gemm_rate"), "-t", threads, "--size", hidden,
                               "--rows", args.rows, "--seconds", args.seconds], dict(os.environ))}


def find(programs: Path, name: str) -> Path:
    for folder in ("", "tools", "perf"):
        if (path := programs / folder / name).is_file():
            return path
    fail(f"{programs} has no {name}: build it, or name the folder of the programs")


def folded_elements(config: dict) -> int:
    """Of all layers: q, k, v, o, gate, up and down, whose one side is the residual stream."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    layer = hidden * (2 * heads * head_dim + 2 * kv_heads * head_dim
                      + 3 * config["intermediate_size"])
    return config["num_hidden_layers"] * layer


def prepare(args: argparse.Namespace, threads: int) -> dict:
    command = [find(args.programs, "engine_prep"), "--model", args.model, "--output", args.output,
               "--body-dtype", args.body_dtype, "-t", threads]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INFEMERAL_")}
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        fail(f"engine_prep failed ({process.returncode})")
    return {"seconds": round(seconds, 2), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_memory_gib": round(usage.ru_maxrss / 2**20, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True,
                        help="build folder, or a folder with engine_prep and gemm_rate")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--body-dtype", default="f16", choices=("f16", "bf16", "i8"))
    parser.add_argument("-t", "--threads", type=int, default=0,
                        help="of everything; 0 is one for each physical core")
    parser.add_argument("--rows", type=int, default=1024, help="of the measured products")
    parser.add_argument("--seconds", type=float, default=5, help="for each of them")
    parser.add_argument("--keep", action="store_true", help="leave what was prepared")
    args = parser.parse_args()
    if args.output.exists():
        fail(f"{args.output} exists")
    config = json.loads((args.model / "config.json").read_text())
    hidden = config["hidden_size"]

    threads = args.threads or output_of([find(args.programs, "gemm_rate"), "--seconds", 0,
                                         "--size", 64, "--rows", 64], dict(os.environ))["threads"]
    before = gemm_rates(args, threads, hidden)
    try:
        prepared = prepare(args, threads)
    finally:
        if not args.keep:
            shutil.rmtree(args.output, ignore_errors=True)
    after = gemm_rates(args, threads, hidden)

    rate = max(side["best"] for part in (before, after) for side in part.values())
    typical = max((before[name]["median"] + after[name]["median"]) / 2 for name in before)
    operations = 2 * hidden * folded_elements(config)
    result = {"threads": threads, "body_dtype": args.body_dtype,
              "hidden_size": hidden, "layers": config["num_hidden_layers"],
              "folded_elements": folded_elements(config), "tera_operations": operations * 1e-12,
              "gemm_gflops": {"before": before, "after": after, "best": rate},
              **prepared,
              "gflops": operations * 1e-9 / prepared["seconds"],
              "share_of_best_rate": round(operations * 1e-9 / rate / prepared["seconds"], 3),
              "share_of_median_rate": round(operations * 1e-9 / typical / prepared["seconds"], 3)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
