#!/usr/bin/env python3
"""Measures on this GPU what the CUDA client is compared with: cuBLAS, and PyTorch in two ways.

For each shape V x H of lm_head, with random float16 weights:
  cublas_f16_lm_head      one state through lm_head: torch.mv and F.linear, the faster one counts
  cublas_f16_32_columns   32 states at once
  eager_original          one decode token through the whole client path of the Python original, in
                          eager mode, with its top-p sampling and with argmax
  compiled_graph_greedy   uncloak, gain, lm_head and argmax, compiled and replayed as one CUDA graph
and once for the GPU: the read and the copy bandwidth that it really reaches.

Times are medians in milliseconds. gpu_ms lies between two CUDA events around the call, wall_ms
between two readings of the clock around the call and a synchronise; each has its own repetitions.
The L2 is filled with other data before every repetition, outside the measured time. Where a call waits for the
device in the middle (a copy to the host, .item()), gpu_ms includes that wait.

JSON goes to stdout or --output, a table to stderr. --device cpu is for trying the script only.
"""

import argparse
import contextlib
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DEFAULT_SHAPES = ("128256x4096", "49152x576", "32000x4096", "151936x5120")
TEMPERATURE, TOP_P = 0.7, 0.9  # the original's defaults
WARM_UPS = 5
# At least this much is read to flush the L2. More than twice any L2, so that the GPU is still
# busy with it while the host queues the measured call: launch latency is then not part of gpu_ms.
FLUSH_BYTES = 512 << 20
READ_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
AUTOTUNE_SECONDS = 20  # a first guess of what one max-autotune compilation takes


class Bench:
    """Times calls on one device."""

    def __init__(self, device: str, repetitions: int):
        self.device, self.repetitions = device, repetitions
        self.is_cuda = device == "cuda"
        n_bytes = 0
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(0)
            n_bytes = max(2 * getattr(properties, "L2_cache_size", 0), FLUSH_BYTES)
        self.flush_buffer = torch.zeros(n_bytes // 4, dtype=torch.int32, device=device)

    def flush(self) -> None:
        # By reading, as kernels_bench does: written lines would have to go back to memory first, in the
        # time that counts.
        self.flush_buffer.sum()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def measure(self, call, flush: bool = True) -> dict:
        for _ in range(WARM_UPS):
            call()
        self.synchronize()
        result = {}
        if self.is_cuda:
            times = [self._gpu_ms(call, flush) for _ in range(self.repetitions)]
            result |= {"gpu_ms": median(times), "gpu_min_ms": round(min(times), 5)}
        times = [self._wall_ms(call, flush) for _ in range(self.repetitions)]
        return result | {"wall_ms": median(times), "wall_min_ms": round(min(times), 5)}

    def _gpu_ms(self, call, flush: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            self.flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _wall_ms(self, call, flush: bool) -> float:
        if flush:
            self.flush()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)


def median(times: list[float]) -> float:
    return round(statistics.median(times), 5)


def duration(result: dict) -> float:
    """What variants are ranked by: the time on the GPU, where there is one."""
    return result.get("gpu_ms", result["wall_ms"])


def gb_per_s(n_bytes: int, milliseconds: float) -> float:
    return round(n_bytes / milliseconds / 1e6, 1)


# --- bandwidth ------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def read_kernel(source, sums, n_tiles, TILE: tl.constexpr):
        """sums[program] = sum of the tiles that this program reads; source is [n_tiles, TILE]."""
        program = tl.program_id(0)
        total = tl.zeros((TILE,), dtype=tl.int32)
        for tile in range(program, n_tiles, tl.num_programs(0)):
            total += tl.load(source + tile * TILE + tl.arange(0, TILE))
        tl.store(sums + program, tl.sum(total, axis=0))


def triton_reads(source: torch.Tensor, n_processors: int) -> dict:
    """Calls by name; each reads the int32 source once and returns its sum in parts."""
    calls = {}
    for tile, warps, programs_per_sm in (  # 0 programs: one for each tile
            (2048, 4, 8), (2048, 8, 8), (4096, 4, 16), (4096, 8, 4), (8192, 8, 4), (8192, 16, 2),
            (4096, 4, 0), (8192, 8, 0), (16384, 8, 0)):
        n_tiles = source.numel() // tile
        sums = torch.zeros(programs_per_sm * n_processors or n_tiles, dtype=torch.int32,
                           device=source.device)

        def call(tile=tile, warps=warps, n_tiles=n_tiles, sums=sums):
            read_kernel[(sums.numel(),)](source, sums, n_tiles, TILE=tile, num_warps=warps)
            return sums

        calls[f"triton, {tile} a tile, {warps} warps, {sums.numel()} programs"] = call
    return calls


def measure_bandwidth(bench: Bench) -> dict:
    """No flush here: the buffer is many times the L2."""
    n_bytes = READ_BYTES[bench.device]
    # Small numbers, so that partial sums are exact.
    source = torch.randint(0, 256, (n_bytes // 4,), dtype=torch.int32, device=bench.device)
    as_float = source.view(torch.float32)
    calls = {"torch.sum float32": lambda: torch.sum(as_float),
             "torch.sum float32 rows": lambda: torch.sum(as_float.view(-1, 8192), dim=1),
             "torch.sum int32": lambda: torch.sum(source)}
    if bench.is_cuda and triton is not None:
        n_processors = torch.cuda.get_device_properties(0).multi_processor_count
        calls |= triton_reads(source, n_processors)
    expected = torch.sum(source).item()
    methods, failures = {}, {}
    for name, call in calls.items():
        try:
            if name.startswith("triton") and call().sum().item() != expected:
                raise ValueError("the sum is wrong")
            methods[name] = gb_per_s(n_bytes, duration(bench.measure(call, flush=False)))
        except Exception as error:  # one broken method leaves the others
            failures[name] = describe(error)
    best = max(methods, key=methods.get)
    half = source.numel() // 2
    copy = bench.measure(lambda: source[:half].copy_(source[half:]), flush=False)
    return {"bytes": n_bytes,
            "read_gb_per_s": methods[best],
            "read_method": best,
            "read_methods_gb_per_s": methods,
            "failures": failures,
            "copy_gb_per_s": gb_per_s(n_bytes, duration(copy)),  # half is read, half is written
            }


# --- the client's path ----------------------------------------------------------------------------


class Model:
    """Random weights of the client for one shape."""

    def __init__(self, vocab_size: int, hidden_size: int, device: str):
        self.vocab_size, self.hidden_size, self.device = vocab_size, hidden_size, device

        def normal(*shape: int, std: float) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=torch.float16).mul_(std)

        # The embedding table too: one row of it is read, which the flush has made cold.
        self.lm_head = normal(vocab_size, hidden_size, std=0.02)  # [V, H]
        # Nearly orthogonal, which is enough for the sizes of what passes through it.
        self.cloak = normal(hidden_size, hidden_size, std=hidden_size**-0.5)  # [H, H]
        self.gain = normal(hidden_size, std=0.1).add_(1)  # [H]
        self.state = normal(1, hidden_size, std=1)  # [1, H], what the body returns
        self.lm_head_bytes = 2 * vocab_size * hidden_size


class EagerClient:
    """The Python original's path of one token."""

    def __init__(self, model: Model):
        self.m = model

    def embed(self, token: int) -> torch.Tensor:
        return F.embedding(torch.tensor([token], device=self.m.device), self.m.lm_head)  # [1, H]

    def cloak(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.matmul(hidden, self.m.cloak).cpu()

    def uncloak(self, row: torch.Tensor) -> torch.Tensor:
        return torch.matmul(row.to(self.m.device), self.m.cloak.T) * self.m.gain

    def de_embed(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.m.lm_head)  # [1, V]

    def sample(self, logits: torch.Tensor) -> int:
        p = torch.softmax(logits.float() / TEMPERATURE, dim=-1)
        p, ids = torch.sort(p, dim=-1, descending=True)
        before = torch.cumsum(p, dim=-1) - p
        p = p.masked_fill(before > TOP_P, 0)
        choice = torch.multinomial(p / p.sum(dim=-1, keepdim=True), 1)
        return ids.gather(-1, choice).item()

    def greedy(self, logits: torch.Tensor) -> int:
        return torch.argmax(logits, dim=-1).item()


def measure_lm_head(bench: Bench, model: Model) -> dict:
    state = model.state[0]
    methods = {"torch.mv": bench.measure(lambda: torch.mv(model.lm_head, state)),
               "F.linear": bench.measure(lambda: F.linear(model.state, model.lm_head))}
    best = min(methods, key=lambda name: duration(methods[name]))
    return {"method": best, **methods[best],
            "gb_per_s": gb_per_s(model.lm_head_bytes, duration(methods[best])), "methods": methods}


def measure_32_columns(bench: Bench, model: Model) -> dict:
    states = torch.randn(32, model.hidden_size, device=model.device, dtype=torch.float16)
    result = bench.measure(lambda: F.linear(states, model.lm_head))
    return {**result, "gb_per_s": gb_per_s(model.lm_head_bytes, duration(result))}


def measure_eager(bench: Bench, model: Model) -> dict:
    """The total is one call. The parts are from runs of their own: wall_ms with a synchronise after
    each part (so they add up to a little more), gpu_ms of the part alone behind a flush."""
    client = EagerClient(model)
    token = model.vocab_size // 3
    result, alone = {}, {}
    for name, choose in (("sampled", client.sample), ("greedy", client.greedy)):

        def path(choose=choose) -> int:
            row = client.cloak(client.embed(token))  # here the body would run
            return choose(client.de_embed(client.uncloak(row)))

        chain = (("embed", client.embed), ("cloak", client.cloak), ("uncloak", client.uncloak),
                 ("de_embed", client.de_embed), ("sample", choose))
        inputs = {}

        def run_chain() -> dict[str, float]:
            bench.flush()
            bench.synchronize()
            value, times, start = token, {}, time.perf_counter()
            for part, call in chain:
                inputs[part] = value
                value = call(value)
                bench.synchronize()
                now = time.perf_counter()
                times[part] = 1e3 * (now - start)
                start = now
            return times

        total = bench.measure(path)
        runs = [run_chain() for _ in range(WARM_UPS + bench.repetitions)][WARM_UPS:]
        parts = {}
        for part, call in chain:
            parts[part] = {"wall_ms": median([run[part] for run in runs])}
            if bench.is_cuda:
                if call not in alone:  # all but the choice are the same in both
                    alone[call] = bench.measure(lambda: call(inputs[part]))["gpu_ms"]
                parts[part]["gpu_ms"] = alone[call]
        result[name] = {**total, "parts": parts}
    return result


def head_linear(state, cloak, gain, lm_head):
    """state [1, H] -> token [1]; the products are the library's or, compiled, a template's."""
    return torch.argmax(F.linear(F.linear(state, cloak) * gain, lm_head), dim=-1)


def head_reduction(state, cloak, gain, lm_head):
    """The same with products written as sums over rows: the compiler makes one bandwidth-bound
    reduction of each. Not for eager mode, where it would store float32 copies of the weights."""
    hidden = (cloak.float() * state.float()).sum(dim=-1) * gain.float()
    logits = (lm_head.float() * hidden.half().float()).sum(dim=-1)
    return torch.argmax(logits, dim=-1).reshape(1)


# name -> function, torch.compile's mode (None: not compiled). The first one is the fallback.
HEADS = {
    "plain": (head_linear, None),
    "compiled reduction": (head_reduction, "default"),
    "compiled linear, max-autotune": (head_linear, "max-autotune-no-cudagraphs"),
}


def check_token(model: Model, token: int) -> None:
    """The token's logit must be the greatest, up to float16's rounding on the way: the state is
    rounded twice before lm_head and the logit once, by 2^-11 at most, in both computations."""
    hidden = F.linear(model.state, model.cloak) * model.gain
    logits = F.linear(hidden, model.lm_head).float()[0]
    row_norm = torch.linalg.vector_norm(model.lm_head[token].float()).item()
    best_norm = torch.linalg.vector_norm(model.lm_head[logits.argmax()].float()).item()
    hidden_norm = torch.linalg.vector_norm(hidden.float()).item()
    allowed = 4 * 2**-11 * hidden_norm * (row_norm + best_norm) + 4 * 2**-11 * logits.max().item()
    if logits[token].item() < logits.max().item() - allowed:
        raise ValueError(f"token {token} is wrong: its logit is {logits[token].item():.4f}, the "
                         f"greatest {logits.max().item():.4f}, and {allowed:.4f} is allowed")


def measure_graph(bench: Bench, model: Model, name: str) -> dict:
    """One way to make the greedy head, replayed as a CUDA graph (on a CPU: called)."""
    head, mode = HEADS[name]
    start = time.perf_counter()
    if mode is not None:
        torch.compiler.reset()  # or the second shape would be compiled for sizes that vary
        head = torch.compile(head, mode=mode, dynamic=False)
    arguments = (model.state.clone(), model.cloak, model.gain, model.lm_head)
    token = head(*arguments)  # compiles, and tunes
    check_token(model, token.item())
    compile_seconds = round(time.perf_counter() - start, 1)
    if not bench.is_cuda:
        return {**bench.measure(lambda: head(*arguments)), "compile_seconds": compile_seconds}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            head(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = head(*arguments)
    token.zero_()
    graph.replay()
    check_token(model, token.item())

    returned = model.state.cpu().pin_memory()

    def with_copies() -> int:
        arguments[0].copy_(returned, non_blocking=True)
        graph.replay()
        return token.item()

    return {**bench.measure(graph.replay),
            # What a client would wait for: the row to the GPU, the graph, the token back.
            "wall_with_copies_ms": bench.measure(with_copies)["wall_ms"],
            "compile_seconds": compile_seconds}


class GreedyGraphs:
    """compiled_graph_greedy of all shapes: the quick ways for each first, then as many of the slow
    compilations as there is time for."""

    def __init__(self, bench: Bench, deadline: float):
        self.bench, self.deadline = bench, deadline
        self.longest = AUTOTUNE_SECONDS

    def measure(self, models: list[Model]) -> list[dict]:
        variants = [{} for _ in models]
        for name, (_, mode) in HEADS.items():
            for model, results in zip(models, variants):
                is_slow = mode is not None and mode.startswith("max-autotune")
                if is_slow and time.monotonic() + self.longest > self.deadline:
                    results[name] = {"skipped": "no time left; raise --max-seconds"}
                    continue
                start = time.monotonic()
                try:
                    results[name] = measure_graph(self.bench, model, name)
                except Exception as error:  # whatever the compiler raises, the plain graph remains
                    results[name] = {"error": describe(error)}
                if is_slow:
                    self.longest = max(self.longest, time.monotonic() - start)
        return [self.summary(model, results) for model, results in zip(models, variants)]

    def summary(self, model: Model, variants: dict[str, dict]) -> dict:
        good = {name: r for name, r in variants.items() if "wall_ms" in r}
        result = {"cuda_graph": self.bench.is_cuda,
                  "compiled": any(HEADS[name][1] is not None for name in good)}
        if good:
            best = min(good, key=lambda name: duration(good[name]))
            n_bytes = model.lm_head_bytes + 2 * model.hidden_size**2
            result |= {"method": best, **good[best],
                       "gb_per_s": gb_per_s(n_bytes, duration(good[best]))}
        return result | {"methods": variants}


# --- the report -----------------------------------------------------------------------------------


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Empty where the program is missing."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}",
               "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return dict(zip(fields, (value.strip() for value in output.stdout.split(","))))
    return {}


def environment(bench: Bench) -> dict:
    result = {"created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
              "device": bench.device,
              "python": platform.python_version(),
              "torch": torch.__version__,
              "triton": triton.__version__ if triton is not None else None}
    if bench.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        smi = nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
        result |= {"gpu": properties.name,
                   "multiprocessors": properties.multi_processor_count,
                   "memory_bytes": properties.total_memory,
                   "l2_bytes": getattr(properties, "L2_cache_size", None),
                   "cuda": torch.version.cuda,
                   "driver": smi.get("driver_version"),
                   "max_sm_mhz": smi.get("clocks.max.sm"),
                   "max_memory_mhz": smi.get("clocks.max.mem"),
                   "power_limit_w": smi.get("power.limit")}
    return result


def clocks_now() -> dict:
    smi = nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu")
    return {"sm_mhz": smi.get("clocks.sm"), "memory_mhz": smi.get("clocks.mem"),
            "temperature_c": smi.get("temperature.gpu")}


def print_table(report: dict) -> None:
    def line(name: str, result: dict, note: str = "") -> None:
        gpu = f"{result['gpu_ms']:9.4f}" if "gpu_ms" in result else f"{'-':>9}"
        wall = f"{result['wall_ms']:9.4f}" if "wall_ms" in result else f"{'-':>9}"
        speed = f"{result['gb_per_s']:8.0f}" if "gb_per_s" in result else f"{'':8}"
        print(f"  {name:<34}{gpu} {wall} {speed}  {note}".rstrip(), file=sys.stderr)

    bandwidth = report["read_bandwidth"]
    print(f"read {bandwidth['read_gb_per_s']:.0f} GB/s ({bandwidth['read_method']}), "
          f"copy {bandwidth['copy_gb_per_s']:.0f} GB/s", file=sys.stderr)
    for shape in report["shapes"]:
        title = f"{shape['vocab_size']} x {shape['hidden_size']}"
        print(f"\n{title:<36}{'gpu ms':>9} {'wall ms':>9} {'GB/s':>8}", file=sys.stderr)
        for name in ("cublas_f16_lm_head", "cublas_f16_32_columns"):
            line(name, shape[name], shape[name].get("method", ""))
        for name, result in shape["eager_original"].items():
            line(f"eager_original {name}", result)
            for part, times in result["parts"].items():
                line(f"  {part}", times)
        graph = shape["compiled_graph_greedy"]
        line("compiled_graph_greedy", graph, graph.get("method", "failed"))
        for name, result in graph["methods"].items():
            line(f"  {name}", result, result.get("error", result.get("skipped", "")))


def measure_all(args: argparse.Namespace) -> dict:
    start = time.monotonic()
    torch.manual_seed(0)
    bench = Bench(args.device, args.repetitions)
    report = {"schema": "infemeral-gpu-peers", "schema_version": 1,
              "environment": environment(bench),
              "repetitions": args.repetitions,
              "l2_flush": f"{4 * bench.flush_buffer.numel()} bytes read before each repetition",
              # First, so that the clocks are up when the rest begins.
              "read_bandwidth": measure_bandwidth(bench)}
    models = [Model(*shape, args.device) for shape in args.shapes]
    report["shapes"] = [{"vocab_size": model.vocab_size,
                         "hidden_size": model.hidden_size,
                         "lm_head_bytes": model.lm_head_bytes,
                         "cublas_f16_lm_head": measure_lm_head(bench, model),
                         "cublas_f16_32_columns": measure_32_columns(bench, model),
                         "eager_original": measure_eager(bench, model)} for model in models]
    report["environment"]["clocks"] = clocks_now() if bench.is_cuda else {}
    graphs = GreedyGraphs(bench, start + args.max_seconds).measure(models)
    for shape, graph in zip(report["shapes"], graphs):
        shape["compiled_graph_greedy"] = graph
    report["seconds"] = round(time.monotonic() - start, 1)
    return report


def shape_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not VxH, as in {DEFAULT_SHAPES[0]}")
    return int(match[1]), int(match[2])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="VxH",
                        default=[shape_of(text) for text in DEFAULT_SHAPES],
                        help=f"default: {' '.join(DEFAULT_SHAPES)}")
    parser.add_argument("--repetitions", type=int, default=100, metavar="N",
                        help="of each measurement (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=80, metavar="S",
                        help="begin no slow compilation that would end after this time "
                             "(default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="JSON goes there, not to stdout")
    args = parser.parse_args()
    if args.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_peers.py: PyTorch finds no GPU", file=sys.stderr)
        return 1
    gc.disable()  # no collection in the middle of a measurement
    with torch.no_grad():
        report = measure_all(args)
    print_table(report)
    text = json.dumps(report, indent=2) + "\n"
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
