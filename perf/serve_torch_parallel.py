#!/usr/bin/env python3
"""The body server on several GPUs: a model of 70B's shape, its step against the memory's speed.

    serve_torch_parallel.py --make --run --work /dev/shm/model --programs DIR --output RESULTS

`--make` writes a prepared model of random weights to WORK/prepared, by default of Llama 3 70B's
shape (137 GB in bfloat16): engine_prep splits and rotates a checkpoint of one layer; the other
layers are drawn on the GPUs and written as they are. A matrix of independent normal numbers has the
same distribution before and after a rotation, so these are what engine_prep would have made of
layers that make_checkpoint.py had drawn: sizes, times and memory are a real model's, and the text
means as little as that of any random weights.

`--run` measures how fast every GPU reads its memory, all at the same time, and what an all-reduce
of a row takes; then, for every --decode:

  - starts `torchrun ... tools/serve_torch/__main__.py`, one rank for each GPU, and waits until it
    listens: time to load, time until it is ready, peak memory;
  - runs engine_run twice with the same prompt, of which the second counts: time per token, and the
    step as the server's scheduler sees it (the report's phase `body`) over the weights-only limit,
    the bytes of the layers over the sum of the GPUs' reading speeds.

RESULTS gets result.json, and every program's log and reports. Both parts need PyTorch, --run also
what tools/serve_torch needs. NCCL's environment variables are handed on as they are.

A RAM disk for WORK needs room for all of it, and NCCL and PyTorch want some of /dev/shm too; its
size is half of what the machine saw as memory when it started. As root:

    mount -o remount,size=200G /dev/shm

Exit codes: 0 measured, 1 something failed, 2 bad usage.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PERF = ROOT / "perf"
SERVER = ROOT / "tools/serve_torch/__main__.py"
DTYPES = {"f16": ("float16", 2), "bf16": ("bfloat16", 2), "f32": ("float32", 4)}
# Writers give way below this. A virtual machine may start with little memory and be given more as
# it fills: whoever takes it faster than it comes is killed.
LOW_MEMORY = 10 << 30
WRITERS_PER_GPU = 8  # what one process copies is far less than a GPU draws

# The same measurement as the other benchmarks', in a process that gives the memory back.
BANDWIDTH = """
import json, sys
import torch
from gpu_peers import Bench, measure_bandwidth
device, index = sys.argv[1], int(sys.argv[2])
if device == "cuda":
    torch.cuda.set_device(index)
with torch.no_grad():
    result = measure_bandwidth(Bench(device, 50))
result["torch"] = torch.__version__
result["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else None
print(json.dumps(result))
"""

# What a layer does twice, in a graph as the server has it: rank 0 prints microseconds.
ALL_REDUCE = """
import os, sys, time
import torch
import torch.distributed as dist
device, size, count = sys.argv[1], int(sys.argv[2]), 160
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
row = torch.zeros(size, dtype=torch.bfloat16, device=device)

def all_reduces():
    for _ in range(count):
        dist.all_reduce(row)

def seconds(call):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

all_reduces()
call = all_reduces
if device == "cuda":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        all_reduces()
    call = graph.replay
times = sorted(seconds(call) for _ in range(20))
if dist.get_rank() == 0:
    print(f"all-reduce {1e6 * times[10] / count:.2f} us", flush=True)
time.sleep(0.5)  # none leaves while another reads its memory
os._exit(0)
"""


class Failure(Exception):
    """A sentence for the user."""


class Clock:
    """What is left of --max-seconds."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise Failure("--max-seconds are over")
        return left


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """Options of the user's own runs must not reach the programs here."""
    return {name: value for name, value in os.environ.items() if not name.startswith("INFEMERAL_")}


def children(pid: int) -> list[int]:
    """torchrun's ranks have sessions of their own: no signal to a group reaches them."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def kill(process: subprocess.Popen, ranks: list[int]) -> None:
    """Nothing happens to what has ended."""
    if process.poll() is None:
        for pid in ranks:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


class Program:
    """One that runs to its end; what it prints goes to a file of RESULTS."""

    def __init__(self, args: argparse.Namespace, log: str, *command):
        self._log = args.output / log
        self._clock = args.clock
        self._name = Path(log).stem
        with self._log.open("w") as file:
            self._process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL,
                                             stdout=file, stderr=file, env=environment())

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        kill(self._process, children(self._process.pid))

    def wait(self, seconds: float = math.inf) -> None:
        try:
            code = self._process.wait(min(seconds, self._clock.left()))
        except subprocess.TimeoutExpired:
            raise Failure(f"{self._name} did not end in time; see {self._log}") from None
        if code != 0:
            raise Failure(f"{self._name} failed ({code}): {last_lines(self._log, 3)}; "
                          f"see {self._log}")


def call(args: argparse.Namespace, log: str, *command, seconds: float = math.inf) -> None:
    with Program(args, log, *command) as program:
        program.wait(seconds)


def last_lines(path: Path, n: int) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-n:])


def read_header(path: Path) -> dict:
    """Of a safetensors file: its tensors."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return header


def tensor_bytes(tensor: dict) -> int:
    begin, end = tensor["data_offsets"]
    return end - begin


def memory() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":") for line in lines)}


def nvidia_smi(field: str) -> list[str]:
    """Of every GPU; empty where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


# ---- --make ----


def wait_for_memory() -> None:
    """At most half a second: the machine may give more only to those who ask for it."""
    end = time.monotonic() + 0.5
    while memory()["MemAvailable"] < LOW_MEMORY and time.monotonic() < end:
        time.sleep(0.02)


def write_layer(path: Path, tensors: list, dtype: str, device: str, seed: int) -> str:
    """In a process of the pool."""
    sys.path.insert(0, str(PERF))
    import torch
    from make_checkpoint import write_shard

    torch.set_num_threads(1)
    generator = torch.Generator(device=device).manual_seed(seed)
    write_shard(path, tensors, dtype, generator, wait_for_memory)
    return path.name


def layer_tensors(args: argparse.Namespace) -> list[list]:
    """make_checkpoint's tensors of every layer, as engine_prep leaves them: each norm's gain is 1,
    as it has become part of the matrices that read from it."""
    sys.path.insert(0, str(PERF))
    from make_checkpoint import GAIN_STD, plan

    layers = [[] for _ in range(args.layers)]
    for name, shape, mean, std in plan(args):
        if not name.startswith("model.layers."):
            continue
        if len(shape) == 1:
            std = 0.0
        elif not name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= math.sqrt(1 + GAIN_STD ** 2)
        layers[int(name.split(".")[2])].append((name, shape, mean, std))
    return layers


def check_room(args: argparse.Namespace, layers: list[list]) -> None:
    size = DTYPES[args.body_dtype][1]
    layer = size * sum(math.prod(tensor[1]) for tensor in layers[0])
    ends = 2 * size * args.vocab_size * args.hidden_size
    # The checkpoint of one layer, what is prepared of it, and 2 GB that NCCL and PyTorch may want.
    needed = len(layers) * layer + 3 * (layer + ends) + (2 << 30)
    room = shutil.disk_usage(args.work).free
    say(f"{len(layers)} layers of {layer / 1e9:.2f} GB: {len(layers) * layer / 1e9:.1f} GB; "
        f"{args.work} has room for {room / 1e9:.0f} GB")
    if room < needed:
        raise Failure(f"{args.work} needs room for {needed / 1e9:.0f} GB (a RAM disk grows: mount "
                      "-o remount,size=200G /dev/shm)")


def draw_layers(args: argparse.Namespace, layers: list[list], body: Path) -> None:
    """All but the first, which engine_prep has."""
    devices = [f"cuda:{i}" for i in range(args.gpus)] if args.device == "cuda" else ["cpu"]
    workers = WRITERS_PER_GPU * args.gpus if args.device == "cuda" else args.gpus
    workers = min(workers, len(layers) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(write_layer, body / shard_name(i, len(layers)), layers[i],
                             DTYPES[args.body_dtype][0], devices[i % len(devices)], args.seed + i)
                 for i in range(1, len(layers))]
        try:
            for n, task in enumerate(as_completed(tasks, timeout=args.clock.left()), 1):
                task.result()
                if n % 10 == 0 or n == len(tasks):
                    say(f"  {n} of {len(tasks)} layers; memory left: "
                        f"{memory()['MemAvailable'] >> 30} GiB")
        except BaseException as error:
            # The pool would go on to its last task.
            for process in list((pool._processes or {}).values()):
                process.kill()
            if isinstance(error, (BrokenProcessPool, TimeoutError)):
                what = "did not end in time" if isinstance(error, TimeoutError) else "was killed"
                raise Failure(f"a process that writes layers {what}; memory left: "
                              f"{memory()['MemAvailable'] >> 30} GiB") from None
            raise


def shard_name(index: int, n: int) -> str:
    return f"model-{index + 1:05}-of-{n:05}.safetensors"


def make(args: argparse.Namespace) -> None:
    final = args.work / "prepared"
    if final.exists():
        raise Failure(f"{final} exists: remove it, or leave --make out")
    args.work.mkdir(parents=True, exist_ok=True)
    layers = layer_tensors(args)
    check_room(args, layers)
    start = time.monotonic()
    # A run that is broken off leaves nothing that looks whole, and gives its memory back.
    with tempfile.TemporaryDirectory(dir=args.work, prefix="unfinished.") as scratch:
        checkpoint, prepared, drawn = (Path(scratch) / name
                                       for name in ("checkpoint", "prepared", "drawn"))
        drawn.mkdir()
        shape = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SHAPE]
        call(args, "make_checkpoint.log", sys.executable, PERF / "make_checkpoint.py", "--output",
             checkpoint, "--layers=1", f"--dtype={DTYPES[args.body_dtype][0]}", "--shard-gb=100",
             f"--device={args.device}", f"--seed={args.seed}", *shape)
        say(f"a checkpoint of one layer after {time.monotonic() - start:.0f} s; engine_prep and "
            "the other layers")
        with Program(args, "engine_prep.log", args.programs / "engine_prep", "--model", checkpoint,
                     "--output", prepared, "--body-dtype", args.body_dtype) as engine_prep:
            draw_layers(args, layers, drawn)
            drawn_s = time.monotonic() - start
            say(f"layers after {drawn_s:.0f} s")
            engine_prep.wait()
        say(f"engine_prep after {time.monotonic() - start:.0f} s")
        join_layers(prepared / "body", drawn, len(layers))
        os.rename(prepared, final)
    seconds = {"layers_s": round(drawn_s, 1), "all_s": round(time.monotonic() - start, 1)}
    (args.work / "make.json").write_text(json.dumps(seconds) + "\n")
    say(f"{final} made in {seconds['all_s']:.0f} s")


def join_layers(body: Path, drawn: Path, n_layers: int) -> None:
    """engine_prep's one layer and the others become one checkpoint of shards."""
    files = list(body.glob("*.safetensors"))
    if len(files) != 1:
        raise Failure(f"engine_prep wrote {len(files)} files of weights for one layer")
    os.rename(files[0], body / shard_name(0, n_layers))
    for file in drawn.iterdir():
        os.rename(file, body / file.name)
    weight_map, total = {}, 0
    for i in range(n_layers):
        name = shard_name(i, n_layers)
        for tensor, entry in read_header(body / name).items():
            weight_map[tensor] = name
            total += tensor_bytes(entry)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (body / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((body / "config.json").read_text())
    config["num_hidden_layers"] = n_layers
    (body / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- --run ----


def measure_bandwidths(args: argparse.Namespace) -> list[dict]:
    """Of all GPUs at the same time."""
    env = environment() | {"PYTHONPATH": os.pathsep.join(
        filter(None, [str(PERF), os.environ.get("PYTHONPATH")]))}
    processes = []
    try:
        for i in range(args.gpus):
            log = (args.output / f"bandwidth-{i}.log").open("w")
            processes.append(subprocess.Popen(
                [sys.executable, "-c", BANDWIDTH, args.device, str(i)], env=env, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log))
            log.close()
        results = []
        for i, process in enumerate(processes):
            out, _ = process.communicate(timeout=min(120, args.clock.left()))
            if process.returncode != 0:
                log = args.output / f"bandwidth-{i}.log"
                raise Failure(f"the bandwidth of GPU {i} was not measured: {last_lines(log, 1)}")
            results.append(json.loads(out.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        raise Failure("the bandwidth was not measured in time") from None
    finally:
        for process in processes:
            process.kill()
    return results


def torchrun(args: argparse.Namespace) -> list[str]:
    # The machine's own name, which is the default, may be unknown to itself.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
            "localhost", "--nproc-per-node", str(args.gpus)]


def measure_all_reduce(args: argparse.Namespace, hidden_size: int) -> float | None:
    """Microseconds for a row of hidden states; nothing else depends on it."""
    try:
        call(args, "all-reduce.log", *torchrun(args), "--no-python", sys.executable, "-c",
             ALL_REDUCE, args.device, hidden_size, seconds=90)
    except Failure as error:
        say(str(error))
        return None
    found = re.search(r"all-reduce (\S+) us", (args.output / "all-reduce.log").read_text())
    return float(found[1]) if found else None


class Peaks:
    """Peak memory while it watches. It does not watch what is timed: nvidia-smi holds up a GPU."""

    def __init__(self):
        self.gpu_mib: list[int] = []
        self.host_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1):
            self.sample()

    def sample(self) -> None:
        now = [int(text) for text in nvidia_smi("memory.used") if text.strip().isdigit()]
        self.gpu_mib = [max(pair) for pair in zip(now, self.gpu_mib or now)]
        host = memory()
        self.host_bytes = max(self.host_bytes, host["MemTotal"] - host["MemAvailable"])


class Server:
    """torchrun and its ranks; its lines go to a log with the seconds since the start."""

    def __init__(self, args: argparse.Namespace, decode: str, keys: Path):
        self.log = args.output / f"server-{decode}.log"
        self.address = ""
        self.loaded_s = self.ready_s = self.stopped_s = 0.0
        self._start = time.monotonic()
        self._said = threading.Event()  # that it listens, or its end
        options = ["--model", args.work / "prepared/body", "--listen", "127.0.0.1:0", "--identity",
                   keys / "server.key", "--allow", keys / "client.key.pub", "--device", args.device,
                   "--decode", decode, "--max-context", args.max_context, "--max-sessions", 8]
        if args.front:
            options += ["--front", args.programs / "engine_serve"]
        self._process = subprocess.Popen(
            [*torchrun(args), str(SERVER), *map(str, options)], env=environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            errors="replace")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.log.open("w") as file:
            for line in self._process.stdout:
                seconds = time.monotonic() - self._start
                file.write(f"{seconds:8.2f} {line}")
                file.flush()
                if "preparing graphs" in line:
                    self.loaded_s = seconds  # of the last rank
                elif listens := re.search(r"listening on (\S+),", line):
                    self.address, self.ready_s = listens[1], seconds
                    self._said.set()
        self._said.set()

    def wait(self, seconds: float) -> None:
        if not self._said.wait(seconds):
            raise Failure(f"the server was not ready after {seconds:.0f} s; see {self.log}")
        if not self.address:
            self._process.wait()
            raise Failure(f"the server did not start: {self._reason()}; see {self.log}")
        self.loaded_s = self.loaded_s or self.ready_s

    def _reason(self) -> str:
        errors = [line for line in self.log.read_text().splitlines() if "error: " in line]
        return errors[0].split("error: ", 1)[1] if errors else last_lines(self.log, 3)

    def warnings(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [line.split(None, 1)[1] for line in lines if " warning: " in line]

    def stop(self) -> bool:
        """False where it had to be killed."""
        start, ranks = time.monotonic(), children(self._process.pid)
        self._process.terminate()  # torchrun passes it on, and kills after 30 s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(45)
        kill(self._process, ranks)
        self._reader.join(5)
        self.stopped_s = time.monotonic() - start
        return self.stopped_s < 25


def run_client(args: argparse.Namespace, name: str, address: str, keys: Path) -> tuple[dict, str]:
    """Returns the report and the text."""
    report, result = args.output / f"report-{name}.json", args.output / f"result-{name}.jsonl"
    prompt = ("Every matrix of this model is as large as a real one. " * args.prompt_tokens)
    call(args, f"engine_run-{name}.log", args.programs / "engine_run", "-m",
         args.work / "prepared", "--server", address, "--server-key", keys / "server.key.pub",
         "--identity", keys / "client.key", "-p", prompt[:args.prompt_tokens], "--temp", "0",
         "--ignore-eos", "-n", args.tokens, "--backend", args.backend, "--connect-timeout", "30",
         "--step-timeout", "120", "--retry", "0", "--report", report, "--output", result,
         "--overwrite", "--profile")
    return json.loads(report.read_text()), json.loads(result.read_text().splitlines()[0])["text"]


def measure_mode(args: argparse.Namespace, decode: str, keys: Path, limit_ms: float) -> dict:
    say(f"{decode}: the server starts")
    server = Server(args, decode, keys)
    stopped = False
    try:
        with Peaks() as peaks:
            server.wait(args.clock.left())
            say(f"{decode}: weights after {server.loaded_s:.1f} s, listening after "
                f"{server.ready_s:.1f} s")
            peaks.sample()
            alone = peaks.gpu_mib
            _, first = run_client(args, f"{decode}-1", server.address, keys)
        report, text = run_client(args, f"{decode}-2", server.address, keys)
        peaks.sample()
        stopped = True
        clean = server.stop()
    finally:
        if not stopped:
            server.stop()
    phases = report["phases"]["decode"]
    step = phases["body"]
    result = {
        "load_s": round(server.loaded_s, 1), "ready_s": round(server.ready_s, 1),
        "stop_s": round(server.stopped_s, 1), "stopped_cleanly": clean,
        "warnings": server.warnings(), "body": report["model"]["body"],
        "peak_gpu_mib": alone, "peak_gpu_mib_with_client": peaks.gpu_mib,
        "peak_host_gb": round(peaks.host_bytes / 1e9, 1),
        "prompt_tokens": report["tokens"]["prompt"], "output_tokens": report["tokens"]["output"],
        "backend": report["options"]["backend"], "ttft_ms": report["mean_ttft_ms"],
        "tpot_ms": report["mean_tpot_ms"], "tokens_per_s": round(1e3 / report["mean_tpot_ms"], 2),
        "step_ms": step, "over_limit": round(step["p50_ms"] / limit_ms, 3), "phases": phases,
        # A prompt's steps are joined as they happen to wait, and another shape may round otherwise.
        "text": text, "same_text_twice": text == first,
    }
    for warning in result["warnings"]:
        say(f"{decode}: {warning}")
    say(f"{decode}: {result['body']}: step p50 {step['p50_ms']:.3f} ms (mean "
        f"{step['mean_ms']:.3f}, p99 {step['p99_ms']:.3f}), {result['over_limit']:.2f} x the "
        f"limit; {result['tpot_ms']:.3f} ms a token, {result['tokens_per_s']:.1f} tokens/s; peak "
        f"{', '.join(map(str, alone)) or 'unknown'} MiB; stopped in "
        f"{server.stopped_s:.1f} s{'' if clean else ', killed'}")
    return result


def run(args: argparse.Namespace) -> bool:
    """False where a mode failed; the others are reported."""
    body = args.work / "prepared/body"
    if not (body / "model.safetensors.index.json").is_file():
        raise Failure(f"{body} is no body of this program's: --make makes it")
    config = json.loads((body / "config.json").read_text())
    layer_bytes = sum(tensor_bytes(tensor) for file in body.glob("*.safetensors")
                      for name, tensor in read_header(file).items() if "embed_tokens" not in name)
    with contextlib.suppress(Failure, OSError):
        call(args, "topology.log", "nvidia-smi", "topo", "-m", seconds=20)
    bandwidths = measure_bandwidths(args)
    speeds = [result["read_gb_per_s"] for result in bandwidths]
    limit_ms = layer_bytes / sum(speeds) / 1e6
    say(f"{config['num_hidden_layers']} layers, {layer_bytes / 1e9:.1f} GB; reading speeds "
        f"{', '.join(f'{speed:.0f}' for speed in speeds)} GB/s: {limit_ms:.3f} ms is the "
        "weights-only limit of a step")
    all_reduce_us = measure_all_reduce(args, config["hidden_size"]) if args.gpus > 1 else None
    if all_reduce_us is not None:
        say(f"an all-reduce of a row takes {all_reduce_us:.1f} us; a step has two a layer: "
            f"{2e-3 * config['num_hidden_layers'] * all_reduce_us:.3f} ms")
    made = args.work / "make.json"
    result = {
        "schema": "infemeral-serve-torch-parallel", "schema_version": 1,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": args.device, "n_gpus": args.gpus, "front": args.front,
        "gpus": nvidia_smi("name"), "gpu_driver": (nvidia_smi("driver_version") or [None])[0],
        "torch": bandwidths[0]["torch"], "nccl": bandwidths[0]["nccl"],
        "environment": {name: value for name, value in sorted(os.environ.items())
                        if name.startswith(("NCCL_", "TORCH_", "NVSHMEM_", "OMP_", "CUDA_"))},
        "cpus": len(os.sched_getaffinity(0)),
        "config": config, "layer_bytes": layer_bytes, "bandwidths": bandwidths,
        "read_gb_per_s": speeds, "limit_ms": round(limit_ms, 4),
        "all_reduce_us": all_reduce_us,
        "make": json.loads(made.read_text()) if made.is_file() else None,
        "modes": {}, "failures": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        keys = Path(scratch)
        for name in ("client", "server"):
            call(args, "engine_keygen.log", args.programs / "engine_keygen", "--output",
                 keys / f"{name}.key")
        for decode in args.decode:
            try:
                result["modes"][decode] = measure_mode(args, decode, keys, limit_ms)
            except Failure as error:
                result["failures"][decode] = str(error)
                say(f"serve_torch_parallel.py: {decode}: {error}")
            # What has been measured is kept, whatever happens to the next.
            file = args.output / "result.json"
            file.write_text(json.dumps(result, indent=2) + "\n")
    say(f"{args.output / 'result.json'} has it all")
    return not result["failures"]


# ---- command line ----

# Llama 3 70B's, under make_checkpoint.py's names.
SHAPE = {"hidden_size": 8192, "intermediate_size": 28672, "heads": 64, "kv_heads": 8,
         "head_dim": 128, "vocab_size": 128256}


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--make", action="store_true", help="write WORK/prepared")
    add("--run", action="store_true", help="serve it and measure")
    add("--work", type=Path, required=True, metavar="DIR", help="gets the model, as large as it is")
    add("--programs", type=Path, required=True, metavar="DIR",
        help="has engine_prep, engine_keygen and engine_run, and for --front engine_serve")
    add("--output", type=Path, required=True, metavar="DIR", help="gets result.json and the logs")
    add("--gpus", type=positive, default=2, metavar="N", help="and ranks (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: so many ranks without a GPU, to try this program")
    add("--max-seconds", type=positive, default=520, metavar="S",
        help="nothing goes on for longer (default: %(default)s)")
    make_options = parser.add_argument_group("--make")
    for name, value in (SHAPE | {"layers": 80}).items():
        make_options.add_argument(f"--{name.replace('_', '-')}", type=positive, default=value,
                                  metavar="N", help="default: %(default)s")
    make_options.add_argument("--body-dtype", choices=sorted(DTYPES), default="bf16",
                              help="default: %(default)s")
    make_options.add_argument("--seed", type=int, default=0)
    run_options = parser.add_argument_group("--run")
    run_options.add_argument("--decode", nargs="+", default=["auto"],
                             choices=("auto", "eager", "graph", "compile"),
                             help="each with a server of its own (default: auto)")
    run_options.add_argument("--tokens", type=positive, default=64, metavar="N",
                             help="to generate (default: %(default)s)")
    run_options.add_argument("--prompt-tokens", type=positive, default=100, metavar="N",
                             help="default: %(default)s")
    run_options.add_argument("--max-context", type=positive, default=512, metavar="N",
                             help="positions of a session (default: %(default)s)")
    run_options.add_argument("--backend", choices=("auto", "cpu", "cuda"), default="auto",
                             help="engine_run's (default: %(default)s)")
    run_options.add_argument("--front", action="store_true",
                             help="engine_serve of --programs speaks with the client")
    args = parser.parse_args()
    if not (args.make or args.run):
        parser.error("--make or --run, or both")
    if args.layers < 2:
        parser.error("--layers must be at least 2: the first is engine_prep's")
    if args.prompt_tokens + args.tokens > args.max_context:
        parser.error("--prompt-tokens and --tokens must fit --max-context")
    for name in ("engine_prep", "engine_keygen", "engine_run",
                 *(["engine_serve"] if args.front else [])):
        if not (args.programs / name).is_file():
            parser.error(f"{args.programs} has no program {name}")
    for name in ("work", "programs", "output"):
        setattr(args, name, getattr(args, name).resolve())
    args.tied = False
    args.clock = None
    return args


def main() -> int:
    args = parse()
    # So that servers end, and an unfinished model goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.clock = Clock(args.max_seconds)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        if args.device == "cuda" and len(nvidia_smi("name")) < args.gpus:
            raise Failure(f"nvidia-smi shows no {args.gpus} GPUs; --device cpu tries this program "
                          "without")
        if args.make:
            make(args)
        return 0 if not args.run or run(args) else 1
    except (Failure, OSError) as error:
        print(f"serve_torch_parallel.py: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"serve_torch_parallel.py: {error}; it needs PyTorch", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
