#!/usr/bin/env python3
"""Measures the CPU client beside PyTorch doing the same work: one decode token, without network.

The PyTorch client is that of the Python original: embedding row, cloak, uncloak, final gain, lm_head,
and top-p sampling that sorts the whole vocabulary. It runs with float16, bfloat16 and float32 weights;
dynamically quantised int8 is measured too, for information: it gives other logits.

cpu_client_bench measures this project. Both take turns, one round each, with the same number of
threads, so that a noisy machine disturbs both alike. JSON with minima, medians and ratios goes to
stdout or --output.

Needs PyTorch and numpy (`pip install torch numpy`, in an environment of its own), and about
10 GB of memory with all dtypes. Without --bench only PyTorch is measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

TEMPERATURE, TOP_P = 0.7, 0.9  # the original's defaults
PAUSE = 0.3  # seconds: OpenMP's threads spin for a while after work, and would disturb the other


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", help="the program cpu_client_bench")
    parser.add_argument("--folder", help="where cpu_client_bench keeps its weights")
    parser.add_argument("-t", "--threads", type=int, default=0, help="default: physical cores")
    parser.add_argument("--shape", default="128256x4096", help="V x H of lm_head")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", default="float16,bfloat16,float32,int8")
    parser.add_argument("--output", help="a file for the JSON")
    return parser.parse_args()


def physical_cores() -> int:
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text()
            cores.add((package, (topology / "core_id").read_text()))
        except OSError:
            cores.add(("", str(cpu)))
    return len(cores)


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


class Client:
    """The original's client with weights of one dtype."""

    def __init__(self, torch, vocab: int, hidden: int, dtype: str):
        self.torch, self.name = torch, dtype
        self.quantised = dtype == "int8"
        weights = torch.float32 if self.quantised else getattr(torch, dtype)
        self.dtype = weights

        def normal(*shape: int, std: float):
            out = torch.empty(*shape, dtype=weights)
            for part in out.split(8192):  # the float32 draw stays small
                part.copy_(torch.randn(part.shape, dtype=torch.float32) * std)
            return out

        self.lm_head = normal(vocab, hidden, std=0.02)  # [V, H]; the embedding table too
        self.cloak_matrix = normal(hidden, hidden, std=hidden**-0.5)  # [H, H]
        self.gain = torch.ones(hidden, dtype=weights)
        self.row = normal(1, hidden, std=1)  # what the body returns
        self.vocab = vocab
        self.embedding = self.lm_head
        if self.quantised:
            linear = torch.nn.Linear(hidden, vocab, bias=False)
            linear.weight = torch.nn.Parameter(self.lm_head, requires_grad=False)
            module = torch.nn.Sequential(linear)
            self.quantised_head = torch.ao.quantization.quantize_dynamic(
                module, {torch.nn.Linear}, dtype=torch.qint8)
            self.embedding = normal(1, hidden, std=1).expand(vocab, hidden)
            self.lm_head = linear = None

    def de_embed_ways(self) -> dict:
        torch = self.torch
        if self.quantised:
            return {"quantize_dynamic": lambda state: self.quantised_head(state)}
        return {"F.linear": lambda state: torch.nn.functional.linear(state, self.lm_head),
                "torch.mv": lambda state: torch.mv(self.lm_head, state[0])[None]}

    def cloak(self, token: int):
        hidden = self.torch.nn.functional.embedding(self.torch.tensor([token]), self.embedding)
        return self.torch.matmul(hidden, self.cloak_matrix)

    def uncloak(self):
        return self.torch.matmul(self.row, self.cloak_matrix.T) * self.gain

    def sample(self, logits) -> int:
        torch = self.torch
        p = torch.softmax(logits.float() / TEMPERATURE, dim=-1)
        p, ids = torch.sort(p, dim=-1, descending=True)
        before = torch.cumsum(p, dim=-1) - p
        p = p.masked_fill(before > TOP_P, 0)
        choice = torch.multinomial(p / p.sum(dim=-1, keepdim=True), 1)
        return ids.gather(-1, choice).item()

    def round(self) -> dict:
        """Milliseconds of one token: the parts, and their sum with the faster way of de-embedding."""
        ms = {}

        def timed(name: str, work):
            begin = time.perf_counter()
            result = work()
            ms[name] = 1e3 * (time.perf_counter() - begin)
            return result

        timed("embed + cloak", lambda: self.cloak(self.vocab // 3))
        state = timed("uncloak", self.uncloak)
        logits = None
        for name, way in self.de_embed_ways().items():
            logits = timed(f"de-embed, {name}", lambda way=way: way(state))
        timed("sample top-p", lambda: self.sample(logits))
        timed("argmax", lambda: self.torch.argmax(logits, dim=-1).item())
        return ms


def token_ms(parts: dict, choose: str) -> float:
    de_embed = min(ms for name, ms in parts.items() if name.startswith("de-embed"))
    return parts["embed + cloak"] + parts["uncloak"] + de_embed + parts[choose]


def summarise(samples: dict) -> dict:
    return {name: {"min": min(ms), "median": statistics.median(ms)} for name, ms in samples.items()}


class Ours:
    """cpu_client_bench, a round at a time."""

    def __init__(self, arguments: argparse.Namespace, threads: int):
        command = [arguments.bench, "-t", str(threads), "--shape", arguments.shape, "--on-request"]
        if arguments.folder:
            command += ["--folder", arguments.folder]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self.samples = {}

    def round(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("cpu_peers.py: cpu_client_bench ended; its message is above")
        for name, ms in json.loads(line).items():
            self.samples.setdefault(name, []).append(ms)

    def finish(self) -> dict:
        out, _ = self.process.communicate()
        return json.loads(out.splitlines()[-1])


def main() -> None:
    arguments = parse_arguments()
    try:
        import torch
    except ImportError:
        raise SystemExit("cpu_peers.py: needs PyTorch and numpy: pip install torch numpy")
    vocab, hidden = (int(n) for n in arguments.shape.split("x"))
    threads = arguments.threads or physical_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    ours = Ours(arguments, threads) if arguments.bench else None
    failures, samples = {}, {}
    clients = []
    for dtype in arguments.dtypes.split(","):
        try:
            clients.append(Client(torch, vocab, hidden, dtype))
            clients[-1].round()  # warm up
            samples[dtype] = {}
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            failures[dtype] = str(error).splitlines()[0]
            clients = [c for c in clients if c.name != dtype]
    for i in range(arguments.rounds):
        if ours:
            time.sleep(PAUSE)
            ours.round()
        for client in clients:
            for name, ms in client.round().items():
                samples[client.name].setdefault(name, []).append(ms)
        print(f"round {i + 1} of {arguments.rounds}", file=sys.stderr)

    result = {
        "cpu": cpu_model(), "physical_cores": physical_cores(), "threads": threads,
        "shape": arguments.shape, "rounds": arguments.rounds, "torch": torch.__version__,
        "torch_ms": {dtype: summarise(parts) for dtype, parts in samples.items()},
        "torch_failures": failures}
    for which in ("min", "median"):
        tokens = {dtype: {"top_p": token_ms(parts, "sample top-p"), "greedy": token_ms(parts, "argmax")}
                  for dtype, parts in
                  ((d, {n: ms[which] for n, ms in p.items()}) for d, p in result["torch_ms"].items())}
        result.setdefault("torch_token_ms", {})[which] = tokens
    if ours:
        result["ours"] = ours.finish()
        for which in ("min", "median"):
            ms = {name: times[which] for name, times in result["ours"]["ms"].items()}
            exact = {d: t for d, t in result["torch_token_ms"][which].items() if d != "int8"}
            best = {choose: min(t[choose] for t in exact.values()) for choose in ("top_p", "greedy")}
            de_embed = min(times[which] for dtype, parts in result["torch_ms"].items() if dtype != "int8"
                           for name, times in parts.items() if name.startswith("de-embed"))
            result.setdefault("ratios", {})[which] = {
                "top_p_token_over_best_torch": ms["certified top-p"] / best["top_p"],
                "greedy_token_over_best_torch": ms["certified greedy"] / best["greedy"],
                "certified_greedy_head_over_best_torch_de_embed":
                    ms["certified greedy, head"] / de_embed,
                "full_f16_product_over_best_torch_de_embed": ms["f16_product"] / de_embed}
    text = json.dumps(result, indent=1)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
