#!/usr/bin/env python3
"""Private generation on one machine beside plain llama.cpp, on the demo model: the same weights in
float16, the same threads, in turns. llama.cpp runs twice a round, with and without its repacked
buffers, and the better figure of the two counts.

Ours is everything: client, encrypted loopback channel and body, as two processes that share the
machine. Prompt rates are prompt tokens over the time to the first token (ours) and over the prompt's
pass (llama.cpp); decode rates come from each token's own time. Every figure is a median over rounds,
in which the two take turns; ratios are made round by round. With --sessions N, N sessions decode at a
time against one server, and their rates are added: once those of one client (engine_run
--parallel), whose head serves them all in one pass, and once those of N clients of one thread each,
which all read a head of their own on the server's cores.

On a machine that does other work too, --wait S lets every measurement wait, S seconds at most, for the
rest of the machine to be idle; a round counts only if the machine was idle before and after each of
its parts, unless no round was.

Installs llama-cpp-python (built here) and gguf into --work, which keeps them, the demo model and the
keys from run to run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==1.26.4", "safetensors==0.8.0"]
PEER = ROOT / "perf" / "llama_cpp_peer.py"
PARAGRAPH = (
    "The keeper of the lighthouse wrote down the weather every morning: the wind, the height of the "
    "waves, and how far the ships could be seen. In the evening he read what he had written, and "
    "thought about the year in which the storm took the old pier. Nobody had believed him then, "
    "although the numbers were plain. He learned from it that a table of figures needs a sentence "
    "beside it, which says what they mean and what should be done. ")


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], env=environment(), check=False,
                            capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{command[0]} failed ({result.returncode}):\n{result.stderr[-2000:]}")
    return result.stdout


def environment() -> dict:
    """Options of the user's own runs must not reach the programs here, but a forced path may."""
    return {k: v for k, v in os.environ.items()
            if not k.startswith("INFEMERAL_") or k == "INFEMERAL_ISA"}


def idle_share() -> float:
    """Of all CPUs, over a quarter of a second."""
    def read() -> list[int]:
        return [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    before = read()
    time.sleep(0.25)
    spent = [b - a for a, b in zip(before, read())]
    return (spent[3] + spent[4]) / max(1, sum(spent))


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = args.work.resolve()
        self.python = self.work / "venv" / "bin" / "python"
        self.model = self.work / "SmolLM2-135M-Instruct"
        self.prepared = self.work / f"prepared-{args.body_dtype}"
        self.gguf = self.work / "model-f16.gguf"
        self.text = PARAGRAPH * 5  # about 450 tokens

    def quiet(self) -> bool:
        """Whether the machine is idle, or becomes so in time."""
        end = time.monotonic() + self.args.wait
        while True:
            if idle_share() > 0.9:
                return True
            if time.monotonic() >= end:
                return False

    def program(self, name: str) -> Path:
        return self.args.programs.resolve() / name

    def prepare(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.python.exists():
            run(sys.executable, "-m", "venv", self.work / "venv")
        log("llama-cpp-python and gguf (the first time this builds, which takes minutes)")
        os.environ.setdefault("CMAKE_ARGS", "-DGGML_NATIVE=ON")
        run(self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-binary", "llama-cpp-python", *PACKAGES)
        run(self.python, ROOT / "tools" / "demo_model.py", "--output", self.model)
        if not (self.prepared / "body" / "config.json").exists():
            run(self.program("engine_prep"), "--model", self.model, "--output", self.prepared,
                "--body-dtype", self.args.body_dtype)
        for name in ("client", "server"):
            if not (self.work / f"{name}.key").exists():
                run(self.program("engine_keygen"), "--output", self.work / f"{name}.key")
        if not self.gguf.exists():
            source = run(self.python, "-c", "import sys; sys.path.insert(0, sys.argv[1]); "
                         "import demo_model; print(demo_model.fetch_gguf())", ROOT / "tools").strip()
            partial = self.gguf.with_suffix(".partial")
            run(self.python, PEER, "make-gguf", self.model, source, partial)
            partial.rename(self.gguf)

    @contextmanager
    def server(self, threads: int):
        log_path = self.work / "server.log"
        with log_path.open("w") as out:
            process = subprocess.Popen(
                [self.program("engine_serve"), "--model", self.prepared / "body", "--listen",
                 "127.0.0.1:0", "--identity", self.work / "server.key", "--allow",
                 self.work / "client.key.pub", "-t", str(threads)],
                stdout=out, stderr=subprocess.STDOUT, env=environment())
        try:
            while not (text := log_path.read_text()).startswith("listening on "):
                if process.poll() is not None:
                    raise SystemExit(f"engine_serve ended:\n{text}")
                time.sleep(0.05)
            yield text.split()[2].rstrip(",")
        finally:
            process.terminate()
            process.wait()

    def client(self, address: str, threads: int, name: str, tokens: int, texts: list[str]):
        """A started engine_run, with a session for every text, and its report's file."""
        report = self.work / f"report-{name}.json"
        process = subprocess.Popen(
            [self.program("engine_run"), "--model", self.prepared, "--server", address,
             "--server-key", self.work / "server.key.pub", "--identity", self.work / "client.key",
             "-t", str(threads), *(part for text in texts for part in ("-p", text)), "--parallel",
             str(len(texts)), "-n", str(tokens + 1), "--temp", "0", "--ignore-eos",
             "--quiet", "--profile", "--report", report, "-o", self.work / f"results-{name}.jsonl",
             "--overwrite"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
        return process, report

    def finish(self, process: subprocess.Popen, report: Path) -> dict:
        _, errors = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"engine_run failed: {errors[-2000:]}")
        return json.loads(report.read_text())

    def ours(self, address: str, threads: int) -> dict:
        report = self.finish(*self.client(address, threads, "single", self.args.tokens, [self.text]))
        sample = report["samples"][0]
        text = json.loads((self.work / "results-single.jsonl").read_text())["text"]
        totals = [token["total"] for token in sample["tokens_ms"][1:]]
        phases = {name: value["p50_ms"] for name, value in report["phases"]["decode"].items()
                  if isinstance(value, dict) and "p50_ms" in value}
        return {"prompt_tokens": sample["prompt_tokens"], "prompt_ms": sample["ttft_ms"],
                "tokens_ms": totals, "text": text, "phases_p50_ms": phases}

    def together(self, address: str, clients: int, threads: int) -> float:
        """Tokens a second of all sessions, shared out among `clients`; each from the middle of its
        run, when all were there."""
        texts = [PARAGRAPH] * (self.args.sessions // clients)
        started = [self.client(address, threads, f"session-{i}", self.args.tokens, texts)
                   for i in range(clients)]
        rate = 0.0
        for process, report in started:
            for sample in self.finish(process, report)["samples"]:
                tokens = sample["tokens_ms"]
                part = tokens[len(tokens) // 4:len(tokens) * 3 // 4]
                rate += 1e3 / statistics.mean(token["total"] for token in part)
        return rate


def rates(measured: dict) -> tuple[float, float]:
    return (measured["prompt_tokens"] / measured["prompt_ms"] * 1e3,
            1e3 / statistics.median(measured["tokens_ms"]))


def spread(values: list[float]) -> dict:
    ordered = sorted(values)
    return {"median": round(statistics.median(ordered), 3), "min": round(ordered[0], 3),
            "max": round(ordered[-1], 3), "rounds": len(ordered)}


def measure(bench: Bench, peer: subprocess.Popen, threads: int) -> dict:
    args = bench.args

    def theirs() -> list[dict]:
        both = []
        for repack in (True, False):
            request = {"text": bench.text, "threads": threads, "tokens": args.tokens,
                       "repack": repack}
            peer.stdin.write(json.dumps(request) + "\n")
            peer.stdin.flush()
            both.append(json.loads(peer.stdout.readline()))
        return both

    rows = {name: [] for name in ("prompt", "decode", "prompt_llama", "decode_llama", "one_client",
                                  "clients", "prompt_ratio", "decode_ratio", "one_client_ratio",
                                  "clients_ratio")}
    phases: list[dict] = []
    same_text = 0
    quiet_rounds: list[int] = []
    with bench.server(threads) as address:
        theirs(), bench.ours(address, threads)  # warm
        for index in range(args.rounds):
            quiet = bench.quiet()
            a = bench.ours(address, threads)
            quiet &= bench.quiet()
            b = theirs()
            quiet &= bench.quiet()
            if a["prompt_tokens"] != b[0]["prompt_tokens"]:
                raise SystemExit("the two tokenize the prompt differently")
            same_text += a["text"].startswith(b[0]["text"])
            prompt, decode = rates(a)
            prompt_llama, decode_llama = map(max, zip(*map(rates, b)))
            for name, value in (("prompt", prompt), ("decode", decode),
                                ("prompt_llama", prompt_llama), ("decode_llama", decode_llama),
                                ("prompt_ratio", prompt / prompt_llama),
                                ("decode_ratio", decode / decode_llama)):
                rows[name].append(value)
            phases.append(a["phases_p50_ms"])
            line = (f"{threads} threads, round {index + 1}: prompt {prompt:.0f} / "
                    f"{prompt_llama:.0f} tokens/s, decode {decode:.1f} / {decode_llama:.1f}")
            if args.sessions > 1:
                for name, clients, client_threads in (("one_client", 1, threads),
                                                      ("clients", args.sessions, 1)):
                    all_sessions = bench.together(address, clients, client_threads)
                    rows[name].append(all_sessions)
                    rows[name + "_ratio"].append(all_sessions / decode)
                    line += (f", {args.sessions} sessions of {clients} client"
                             f"{'s' if clients > 1 else ''} {all_sessions:.1f}")
                    quiet &= bench.quiet()
            if quiet:
                quiet_rounds.append(index)
            log(line + ("" if quiet else " (not quiet)"))
    if quiet_rounds:
        rows = {name: [values[i] for i in quiet_rounds] for name, values in rows.items() if values}
        phases = [phases[i] for i in quiet_rounds]
    return {"threads": threads, "prompt_tokens": b[0]["prompt_tokens"],
            "rounds": args.rounds, "quiet_rounds": len(quiet_rounds),
            "rounds_with_the_same_text": same_text,
            "phases_p50_ms": {name: round(statistics.median(p[name] for p in phases), 4)
                              for name in phases[0]},
            **{name: spread(values) for name, values in rows.items() if values}}


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    flags = next((v.split() for k, v in fields.items() if k.strip() == "flags"), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16")
    model = next((v.strip() for k, v in fields.items() if k.strip() == "model name"), "unknown")
    return {"cpu": model, "cpus": os.cpu_count(),
            "instruction_sets": [flag for flag in wanted if flag in flags]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True,
                        help="has engine_prep, engine_keygen, engine_serve and engine_run")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", default="2", help="one count or several, as 2,1")
    parser.add_argument("--sessions", type=int, default=8, help="1: leave this part out")
    parser.add_argument("--wait", type=float, default=0, metavar="S")
    parser.add_argument("--body-dtype", default="f16", choices=("f16", "bf16", "i8"))
    args = parser.parse_args()
    bench = Bench(args)
    bench.prepare()
    peer = subprocess.Popen([bench.python, PEER, "serve", bench.gguf], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=environment())
    about = json.loads(peer.stdout.readline())
    result = {"machine": machine(), "llama_cpp_python": about["version"],
              "llama_cpp": about["system"], "body_dtype": args.body_dtype,
              "sessions": args.sessions, "decode_tokens": args.tokens,
              "runs": [measure(bench, peer, int(count)) for count in args.threads.split(",")]}
    peer.stdin.close()
    peer.wait()
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
