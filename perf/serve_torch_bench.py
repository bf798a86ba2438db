#!/usr/bin/env python3
"""What the body server on PyTorch is worth: its decode step against the bandwidth of the memory.

    serve_torch_bench.py --bench HF_DIR             the layers alone; needs no gRPC, no network
    serve_torch_bench.py --end-to-end OUT --programs DIR [--compare REPORT]
                                                    engine_run against serve_torch, both here

HF_DIR is a plain checkpoint, for instance perf/make_checkpoint.py's (random weights of Llama 3 8B's
shape); OUT is what engine_prep made of it. `--bench` reports, as JSON on stdout and a table on
stderr, for every way to decode (eager, CUDA graph, CUDA graph of compiled layers):

  - the step as the server's scheduler sees it, rows on the host in and out: p50, p99, and the
    p50 over the weights-only limit, the bytes of the layers over the measured reading speed;
  - plain generation by the same layers in the same mode: embedding, step, lm_head and argmax, all
    on the device. Private end to end is measured against it (--compare takes this report).

Before anything is timed, rows from the paged cache are compared with transformers' own attention.
The GPU's clocks are left as they are.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "perf")]

from gpu_peers import Bench, environment, measure_bandwidth  # noqa: E402
from serve_torch import parallel  # noqa: E402
from serve_torch.body import WANTED_ALL, WANTED_LAST, BodyInfo, BodyStep  # noqa: E402
from serve_torch.torch_body import TorchBody, choose_device, load_weights  # noqa: E402
from serve_torch.torch_model import (ATTENTION, PAGE, ModelOptions, StepGraph,  # noqa: E402
                                     TorchModel)

PROMPT_ROWS = 100
# A row at the wrong position, head or page differs by about its whole norm.
MAX_ERROR = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def percentiles(seconds: list[float]) -> dict:
    ordered = sorted(1e3 * s for s in seconds)
    return {"min_ms": round(ordered[0], 4), "p50_ms": round(statistics.median(ordered), 4),
            "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 4)}


class Engine:
    """One way to decode: the body as the server has it, over weights that are loaded once."""

    def __init__(self, model: torch.nn.Module, decode: str, args: argparse.Namespace):
        self.warnings: list[str] = []
        config = model.config
        pages = 0
        if args.device == "cuda":
            pages = (args.max_batch + 1) * -(-args.max_context // PAGE) + 1
        for layer in model.layers:  # of an earlier engine
            layer._compiled_call_impl = None
        start = time.perf_counter()
        self.model = TorchModel(model, ModelOptions(
            decode, args.max_batch, args.max_context, pages,
            lambda level, message: self.warnings.append(f"{level}: {message}")))
        self.prepare_s = time.perf_counter() - start
        info = BodyInfo("bench", config.hidden_size, args.max_context, 1)
        self.body = TorchBody(info, parallel.RankZero(self.model), pages, args.max_batch)
        self.random = np.random.default_rng(args.seed)

    def rows(self, n: int) -> np.ndarray:
        # Of an embedding table's size: norms take out the rest.
        return (0.02 * self.random.standard_normal((n, self.body.info.hidden_size))
                ).astype(np.float32)

    def step(self, sessions: list, starts: list[int], rows: np.ndarray, wanted=WANTED_LAST) -> list:
        steps = [BodyStep(session, start, rows[i], wanted)
                 for i, (session, start) in enumerate(zip(sessions, starts))]
        self.body.run(steps)
        for step in steps:
            if step.error is not None:
                raise step.error
        return [step.out for step in steps]

    def fill(self, length: int):
        session = self.body.new_session()
        for at in range(0, length, 512):
            self.step([session], [at], self.rows(min(512, length - at))[None])
        return session

    def time_steps(self, batch: int, length: int, steps: int) -> dict:
        """Each step of every session starts where its context ends."""
        sessions = [self.fill(length) for _ in range(batch)]
        rows = self.rows(steps * batch).reshape(steps, batch, 1, -1)
        seconds = []
        for i in range(steps):
            start = time.perf_counter()
            self.step(sessions, [length + i] * batch, rows[i])
            seconds.append(time.perf_counter() - start)
        for session in sessions:
            self.body.release(session)
        return percentiles(seconds[min(10, steps // 2):])


def check_rows(engine: Engine, model: torch.nn.Module) -> float:
    """The largest relative error of a row against transformers' own attention, without a cache."""
    rows = engine.rows(PROMPT_ROWS)
    first = PROMPT_ROWS - 20
    session = engine.body.new_session()
    ours = [engine.step([session], [0], rows[None, :first], WANTED_ALL)[0]]
    ours += [engine.step([session], [i], rows[None, i:i + 1], WANTED_ALL)[0]
             for i in range(first, PROMPT_ROWS)]
    engine.body.release(session)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        states = torch.from_numpy(rows)[None].to(engine.model.device, engine.model.dtype)
        theirs = model(inputs_embeds=states, use_cache=False).last_hidden_state[0].float().cpu()
    model.set_attn_implementation(ATTENTION)
    theirs = theirs.numpy()
    error = np.linalg.norm(np.concatenate(ours) - theirs, axis=1)
    return float((error / np.linalg.norm(theirs, axis=1)).max())


@torch.no_grad()
def plain_generation(engine: Engine, causal: torch.nn.Module, length: int, steps: int) -> dict:
    """Greedy generation on the device: nothing but the chosen token comes back each step."""
    model = engine.model
    device, size = model.device, length + steps + 1
    pages = torch.arange(1, -(-size // PAGE) + 1)
    embed, head = causal.get_input_embeddings().weight, causal.get_output_embeddings().weight
    token = torch.zeros(1, dtype=torch.int64, device=device)
    if model._graphs:
        width = next(size for size in model._tables if size >= len(pages))
        # One of its own, whose rows stay on the device.
        graph = StepGraph(model, 1, 1, width)
        graph.capture(None, transfers=False)
        states, positions, slots, table = graph.inputs
        table.zero_()
        table[0, :len(pages)] = pages
    else:
        table = pages[None].to(device)
        states = torch.zeros((1, 1, model.hidden_size), device=device)
        positions, slots = (torch.zeros((1, 1), dtype=torch.int64, device=device)
                            for _ in range(2))
    all_slots = pages.to(device).repeat_interleave(PAGE) * PAGE + torch.arange(
        len(pages) * PAGE, device=device) % PAGE

    def ends(hidden: torch.Tensor) -> None:
        token.copy_((hidden[0, 0].to(head.dtype) @ head.T).argmax())
        states.copy_(embed[token].float()[None])

    ends_graph = None
    if model._graphs:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ends(graph.out)
        torch.cuda.current_stream().wait_stream(stream)
        ends_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(ends_graph, capture_error_mode="thread_local"):
            ends(graph.out)
    seconds = []
    for i in range(steps):
        start = time.perf_counter()
        at = length + i
        positions.fill_(at)
        slots.copy_(all_slots[at:at + 1, None])
        if ends_graph is not None:
            graph.start()
            ends_graph.replay()
        else:
            ends(model.forward(states, positions, slots, table))
        token.item()
        seconds.append(time.perf_counter() - start)
    result = percentiles(seconds[min(10, steps // 2):])
    return result | {"tokens_per_s": round(1e3 / result["p50_ms"], 2)}


def bench(args: argparse.Namespace) -> dict:
    device = choose_device(args.device)
    args.device = device.type
    peers = Bench(device.type, 20)
    report = {"schema": "infemeral-serve-torch-bench", "schema_version": 1,
              "environment": environment(peers) | {"transformers": transformers.__version__},
              "model": str(args.bench), "dtype": args.dtype}
    bandwidth = measure_bandwidth(peers)["read_gb_per_s"]
    del peers
    start = time.perf_counter()
    causal = load_weights(args.bench, args.dtype, device, transformers.AutoModelForCausalLM)
    model = causal.base_model
    layers = list(model.layers.parameters()) + list(model.norm.parameters())
    n_bytes = sum(p.numel() * p.element_size() for p in layers)
    limit = n_bytes / bandwidth / 1e6
    report |= {"load_s": round(time.perf_counter() - start, 1), "read_gb_per_s": bandwidth,
               "layer_bytes": n_bytes, "limit_ms": round(limit, 4), "modes": {}}
    say(f"layers {n_bytes / 1e9:.2f} GB in {model.dtype}, {bandwidth:.0f} GB/s: "
        f"{limit:.3f} ms is the weights-only limit of a step")
    modes = args.modes or (["eager", "graph", "compile"] if args.device == "cuda" else ["eager"])
    for mode in modes:
        engine = Engine(model, mode, args)
        result = {"prepare_s": round(engine.prepare_s, 1), "warnings": engine.warnings,
                  "error": round(check_rows(engine, model), 6), "steps": []}
        for warning in engine.warnings:
            say(f"{mode}: {warning}")
        say(f"{mode}: ready after {engine.prepare_s:.1f} s, rows off by at most "
            f"{result['error']:.2g} of their norm")
        if not result["error"] <= MAX_ERROR[model.dtype]:
            raise SystemExit(f"serve_torch_bench.py: {mode}: the rows are wrong")
        for batch, length in args.shapes:
            if batch > args.max_batch or length + args.steps > args.max_context:
                continue
            step = engine.time_steps(batch, length, args.steps)
            step |= {"batch": batch, "context": length,
                     "over_limit": round(step["p50_ms"] / limit, 3)}
            result["steps"].append(step)
            say(f"{mode}: {batch} x 1 row at {length}: p50 {step['p50_ms']:.3f} ms "
                f"(min {step['min_ms']:.3f}, p99 {step['p99_ms']:.3f}), "
                f"{step['over_limit']:.2f} x the limit")
        plain = plain_generation(engine, causal, PROMPT_ROWS, args.steps)
        result["plain"] = plain
        say(f"{mode}: plain generation: p50 {plain['p50_ms']:.3f} ms, "
            f"{plain['tokens_per_s']:.1f} tokens/s")
        report["modes"][mode] = result
        del engine
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return report


def end_to_end(args: argparse.Namespace) -> dict:
    """engine_run against serve_torch; the ratio to plain generation where --compare gives it."""
    out, programs = args.end_to_end.resolve(), args.programs.resolve()
    with tempfile.TemporaryDirectory() as work:
        def call(*command):
            done = subprocess.run(list(map(str, command)), cwd=work, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"serve_torch_bench.py: {command[0]}: {done.stderr.strip()}")

        for name in ("client", "server"):
            call(programs / "engine_keygen", "--output", f"{name}.key")
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tools/serve_torch"), "--model", str(out / "body"),
             "--listen", "127.0.0.1:0", "--identity", "server.key", "--allow", "client.key.pub",
             "--device", args.device, "--dtype", args.dtype, "--max-context",
             str(args.max_context), "--max-batch", str(args.max_batch),
             *(["--front", str(programs / "engine_serve")] if args.front else [])],
            cwd=work, stdout=subprocess.PIPE, text=True)
        try:
            line = server.stdout.readline()
            if not line.startswith("listening on "):
                raise SystemExit("serve_torch_bench.py: serve_torch did not start")
            address = line.split()[2].rstrip(",")
            call(programs / "engine_run", "-m", out, "--server", address, "--server-key",
                 "server.key.pub", "--identity", "client.key", "-p", "x" * PROMPT_ROWS, "--temp",
                 "0", "--ignore-eos", "-n", args.steps, "--report", "report.json", "--quiet")
            run = json.loads((Path(work) / "report.json").read_text())
        finally:
            server.terminate()
            server.wait()
    report = {"schema": "infemeral-serve-torch-e2e", "schema_version": 1, "front": args.front,
              "mean_tpot_ms": run["mean_tpot_ms"], "tokens_per_s": 1e3 / run["mean_tpot_ms"],
              "phases": run["phases"]["decode"]}
    say(f"private, end to end: {report['tokens_per_s']:.1f} tokens/s")
    if args.compare is not None:
        modes = json.loads(args.compare.read_text())["modes"]
        best = max(mode["plain"]["tokens_per_s"] for mode in modes.values())
        report["of_plain"] = round(report["tokens_per_s"] / best, 3)
        say(f"{report['of_plain']:.2f} of plain generation ({best:.1f} tokens/s)")
    return report


def shape_of(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) > 0 and int(length) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not SESSIONSxCONTEXT, as in 1x128")
    return int(batch), int(length)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bench", type=Path, metavar="HF_DIR")
    what.add_argument("--end-to-end", type=Path, metavar="OUT")
    parser.add_argument("--programs", type=Path, metavar="DIR", help="has engine_run and its kin")
    parser.add_argument("--front", action="store_true",
                        help="with --end-to-end: engine_serve of --programs speaks with the client")
    parser.add_argument("--compare", type=Path, metavar="REPORT", help="what --bench wrote")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "f32", "f16", "bf16"), default="auto")
    parser.add_argument("--modes", nargs="+", choices=("eager", "graph", "compile"))
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="SESSIONSxCONTEXT",
                        default=[(1, 128), (1, 2000), (8, 128)])
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="timed, of each shape")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N")
    parser.add_argument("--max-context", type=int, default=2304, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="JSON goes there, not to stdout")
    args = parser.parse_args()
    if args.end_to_end is not None and args.programs is None:
        parser.error("--end-to-end needs --programs")
    if args.steps < 2 or PROMPT_ROWS + args.steps >= args.max_context:
        parser.error("--steps must be at least 2, and with the prompt fit --max-context")
    report = bench(args) if args.bench is not None else end_to_end(args)
    text = json.dumps(report, indent=2) + "\n"
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
