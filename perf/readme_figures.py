#!/usr/bin/env python3
"""Writes the README's figures from the reports under perf/results/, between the README's markers.

    perf/readme_figures.py            write them
    perf/readme_figures.py --check    exit 1 when the README says something else, or has a figure of
                                      its own outside of the markers

Of every kind of report the newest is taken, by the date in its folder's name.
"""
import argparse
import json
import math
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN = "<!-- figures: {name}; perf/readme_figures.py writes what follows -->"
END = "<!-- end of figures -->"
MARKED = re.compile(r"<!-- figures: (\w+);[^\n]*-->\n(.*?)" + re.escape(END), re.DOTALL)
# Speeds and times of machines. What a user waits for a build is no benchmark's business.
FIGURE = re.compile(r"\d[\d.,]*\s*(?:ms|µs|us|tokens/s|tok/s|[GTM]B/s|GFLOPS)\b")


class Missing(Exception):
    pass


class Results:
    """Reports, and which of them were read."""

    def __init__(self, root):
        self.root = root
        self.folders = []

    def newest(self, pattern):
        """The newest file of this kind, and a link to its folder."""
        found = sorted((self.root / "perf/results").glob(pattern),
                       key=lambda path: (re.findall(r"\d{4}-\d\d-\d\d", path.parent.name), str(path)))
        if not found:
            raise Missing(f"perf/results/{pattern} is missing")
        folder = found[-1].parent.relative_to(self.root)
        return found[-1].read_text(encoding="utf-8"), f"[{folder.name}]({folder}/)"

    def json(self, pattern):
        text, link = self.newest(pattern)
        return json.loads(text), link

    def json_lines(self, pattern):
        text, link = self.newest(pattern)
        return [json.loads(line) for line in text.splitlines() if line.strip()], link


def digits(value):
    """Three significant digits, without an exponent."""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, places):,.{max(0, places)}f}"


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cores(n):
    words = {1: "one core", 2: "two cores"}
    return words.get(n, f"{n} cores")


def private_generation(results):
    report, link = results.json("cpu-bench-*/report.json")
    environment, model, options = report["environment"], report["model"], report["options"]
    cases = {case["name"]: case for case in report["cases"] if case["backend"] in ("cpu", "none")}
    requests = report["runs"][0]
    prompt = requests["tokens"]["prompt"] // requests["requests"]["completed"]
    names = (("ttft", f"first token of a prompt of {prompt} tokens"), ("decode", "every token after it"),
             ("prefill", f"first token of a prompt of {options['prefill_tokens']} tokens"),
             ("head", "of a token, the client's work alone"),
             ("channel", "of a token, the encrypted way there and back over loopback"))
    rows = [(text, digits(cases[name]["p50_ms"]), digits(cases[name]["p99_ms"])) for name, text in names]
    return (f"Private generation, client and body on {cores(environment['logical_cores'])} of "
            f"{environment['cpu']}, {environment['memory_bytes'] / 1e9:.0f} GB ({model['body']}, hidden size "
            f"{model['hidden_size']}, vocabulary {model['vocab_size']:,}, {options['head']} head; {link}):\n\n"
            + table(("milliseconds", "median", "p99"), rows))


def on_a_gpu(results):
    report, link = results.json("h?00-*/report.json")
    environment = report["environment"]
    cases = {(case["name"], case["backend"]): case for case in report["cases"]}
    rows = [(text, *(digits(cases[name, backend]["p50_ms"]) for backend in ("cpu", "cuda")))
            for name, text in (("ttft", "first token of a short prompt"), ("decode", "every token after it"),
                               ("head", "of a token, the client's work alone"))]
    return (f"The same model with its body on {cores(environment['logical_cores'])} of {environment['cpu']}, and the client "
            f"there or on an {environment['gpus'][0]} beside them ({link}):\n\n"
            + table(("milliseconds, medians", "client on the CPU", "client on the GPU"), rows))


def larger_bodies(results):
    one, link = results.json("h?00-*/serve_torch-8b.json")
    two, _ = results.json("h?00-*/serve_torch-70b.json")
    rows = []
    for shape, report in (("Llama 3 8B's shape, float16", one), ("Llama 3 70B's shape, bfloat16", two)):
        mode = list(report["modes"].values())[-1]
        rows.append((f"{shape}, {report['n_gpus']} x {report['gpus'][0]}", digits(mode["step_ms"]["p50_ms"]),
                     digits(report["limit_ms"]), digits(mode["tokens_per_s"])))
    return (f"Larger bodies on PyTorch (`tools/serve_torch`, random weights, one session; {link}):\n\n"
            + table(("", "step, ms", "reading the weights once, ms", "tokens a second"), rows))


def beside_llama_cpp(results):
    system, link = results.json("cpu-system-*/f16-sessions.json")
    run = max(system["runs"], key=lambda run: run["threads"])
    rows = [(text, digits(run[ours]["median"]), digits(run[theirs]["median"]),
             digits(run[ratio]["median"]))
            for text, ours, theirs, ratio in (
                (f"prompt of {run['prompt_tokens']} tokens", "prompt", "prompt_llama", "prompt_ratio"),
                ("decode", "decode", "decode_llama", "decode_ratio"))]
    rows += [(f"decode, {system['sessions']} {text}", digits(run[name]["median"]), "", "")
             for text, name in (("prompts at once, one client", "one_client"),
                                ("clients at once", "clients"))]
    return (f"The same private system beside plain llama.cpp (llama-cpp-python {system['llama_cpp_python']}) on the "
            f"same weights and {cores(system['machine']['cpus'])} of {system['machine']['cpu']} ({link}):\n\n"
            + table((f"tokens a second, {run['threads']} threads", "private", "llama.cpp", "ratio"), rows))


def client_work(results):
    cpu, cpu_link = results.json("cpu-2*/cpu_peers-16-cores.json")
    tokens, gpu_link = results.json_lines("h?00-*/client_token.jsonl")
    peers, _ = results.json("h?00-*/gpu_peers.json")
    kernels, _ = results.json_lines("h?00-*/kernels_bench.jsonl")
    shape = cpu["shape"]
    vocab, hidden = (int(n) for n in shape.split("x"))
    gpu_peer = next(s for s in peers["shapes"] if (s["vocab_size"], s["hidden_size"]) == (vocab, hidden))
    rows = []

    def row(what, ours, theirs, against):
        rows.append((what, digits(ours), f"{digits(theirs)} ({against})", f"{ours / theirs:.2f}"))
    for name, field, ours in (("greedy", "greedy", "certified greedy"), ("top-p 0.9", "top_p", "certified top-p")):
        # PyTorch's int8 is measured too; its tokens are not the model's.
        dtype, theirs = min(((d, t[field]) for d, t in cpu["torch_token_ms"]["median"].items() if d != "int8"),
                            key=lambda x: x[1])
        row(f"{cpu['threads']} CPU cores, {name}", cpu["ours"]["ms"][ours]["median"], theirs, f"PyTorch, {dtype}")
    environment = peers["environment"]
    for name, sampling, eager in (("greedy", "greedy", "greedy"), ("top-p 0.9", "top-p 0.9, T 0.7", "sampled")):
        ours = next(t for t in tokens if t["shape"] == shape and t["sampling"] == sampling)
        row(f"{environment['gpu']}, {name}", ours["token_ms_p50"], gpu_peer["eager_original"][eager]["wall_ms"],
            "PyTorch, the Python original")
    ours = next(k for k in kernels if k.get("shape") == shape and k["what"] == "certified greedy, row on device")
    compiled = gpu_peer["compiled_graph_greedy"]
    row("of it, uncloak, head and choice on the device", ours["us"] / 1e3, compiled["gpu_ms"],
        "PyTorch, compiled, one CUDA graph")
    read = next(k for k in kernels if k["what"] == "read_bandwidth")
    return (f"The client's work for a token at a vocabulary of {vocab:,} and a hidden size of {hidden:,}, on "
            f"{cpu['physical_cores']} cores of {cpu['cpu']} ({cpu_link}; PyTorch {cpu['torch']}) and on an "
            f"{environment['gpu']} (CUDA {environment['cuda']}, driver {environment['driver']}; its memory reads "
            f"{read['tb_per_s']:.2f} TB/s; {gpu_link}; PyTorch {environment['torch']}):\n\n"
            + table(("milliseconds, medians", "ours", "beside", "ratio"), rows))


def speed(results):
    parts = (private_generation, beside_llama_cpp, client_work, on_a_gpu, larger_bodies)
    return "\n\n".join(part(results) for part in parts) + "\n"


def profile(results):
    """What --profile prints, of the baseline's requests."""
    report, _ = results.json("cpu-bench-*/report.json")
    run = next(run for run in report["runs"] if run["backend"] == "cpu")
    first, decode = run["phases"]["first_token"], run["phases"]["decode"]
    total = decode["total"]["mean_ms"]
    phases = [name for name, value in decode.items() if isinstance(value, dict) and name != "total"]
    rows = [(name, first[name]["mean_ms"], decode[name]["mean_ms"]) for name in phases]
    rows.append(("explained", *(sum(token[name]["mean_ms"] for name in phases) for token in (first, decode))))
    rows.append(("total", first["total"]["mean_ms"], total))
    lines = [f"{'phase':10} {'first (ms)':>14} {'decode (ms)':>14} {'share':>8}"]
    lines += [f"{name:10} {a:14.3f} {b:14.3f} {100 * b / total:7.1f}%" for name, a, b in rows]
    return "\n" + "\n".join("    " + line for line in lines) + "\n\n"


SECTIONS = {"speed": speed, "profile": profile}


def filled(text, results):
    seen = []

    def fill(match):
        name = match[1]
        if name not in SECTIONS:
            raise Missing(f"the README asks for figures named {name}, which this script does not have")
        seen.append(name)
        body = SECTIONS[name](results).strip("\n")
        return f"{BEGIN.format(name=name)}\n\n{body}\n\n{END}"
    new = MARKED.sub(fill, text)
    if sorted(seen) != sorted(SECTIONS):
        raise Missing(f"the README has markers for {seen or 'nothing'}; each of {list(SECTIONS)} must be there once")
    return new


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when something differs")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="the repository")
    args = parser.parse_args()
    readme = args.root / "README.md"
    old = readme.read_text(encoding="utf-8")
    try:
        new = filled(old, Results(args.root))
    except (Missing, KeyError, StopIteration, ValueError) as error:
        sys.exit(f"readme_figures: a report is not as expected: {error!r}")
    by_hand = FIGURE.findall(MARKED.sub("", old))
    if by_hand:
        sys.exit(f"readme_figures: README.md has figures outside of the markers: {', '.join(by_hand)}")
    if args.check and new != old:
        sys.exit("readme_figures: README.md does not say what perf/results/ says; run perf/readme_figures.py")
    if not args.check:
        readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
