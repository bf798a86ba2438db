#!/usr/bin/env python3
"""What engine_run and engine_bench report, read by the programs that it is made for.

Prepares a small model, runs both, and holds the reports against perf/report.schema.json (jsonschema),
the exports against their consumers' own readers where there are some: prometheus_client's parser,
Google Benchmark's compare.py (Debian: libbenchmark-tools). The other formats are held against the
fields that their consumers read.
"""
import argparse
import copy
import errno
import getpass
import json
import math
import os
import pathlib
import pty
import re
import socket
import subprocess
import sys
import tempfile

import jsonschema
from prometheus_client.parser import text_string_to_metric_families

COMPARE = "/usr/share/benchmark/compare.py"
CASES = {"ttft": "cpu", "decode": "cpu", "prefill": "cpu", "head": "cpu", "load": "cpu",
         "codec": "none", "channel": "none"}
PROMPT = "a xylophone in the orangery"
# Words of engine_bench's own prompts (perf/bench_prompts.h).
BENCH_WORDS = ["clockmaker", "harbour", "capital of France", "boulevards"]


def run(*command, code=0):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == code, f"{command}: exit {result.returncode}, not {code}\n{result.stderr}"
    return result


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")
    return json.loads(text, parse_constant=refuse)


def objects(value, path=()):
    """Every object inside, with its path."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from objects(inner, path + (key,))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from objects(inner, path + (i,))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def check_schema(schema, report):
    validator = jsonschema.Draft202012Validator(schema)
    errors = [f"{e.json_path}: {e.message[:200]}" for e in validator.iter_errors(report)]
    assert not errors, errors


def check_schema_can_fail(schema, report):
    """At every object, an unknown field (where names are fixed) and a null in each place."""
    validator = jsonschema.Draft202012Validator(schema)
    small = copy.deepcopy(report)  # one of what there are many of
    small["cases"] = [case for case in small["cases"] if case["name"] == "channel"]
    small["runs"][0]["samples"] = small["runs"][0]["samples"][:1]
    small["runs"][0]["samples"][0]["tokens_ms"] = small["runs"][0]["samples"][0]["tokens_ms"][:1]
    for _, inner in objects(small):
        if "samples_ms" in inner:
            inner["samples_ms"] = inner["samples_ms"][:1]
    assert validator.is_valid(small)
    tried = 0
    for path, original in objects(small):
        changes = [(key, None) for key in original]
        if path != ("environment", "libraries"):
            changes.append(("surprise", 1))
        for key, value in changes:
            damaged = copy.deepcopy(small)
            at(damaged, path)[key] = value
            assert not validator.is_valid(damaged), f"{key}: {value} passes at {path}"
            tried += 1
    for key in small:
        damaged = {k: v for k, v in small.items() if k != key}
        assert not validator.is_valid(damaged), f"a report without {key} passes"
    small["created"] = "2026-01-31 12:00:00"
    assert not validator.is_valid(small), "a date that is not ISO 8601 passes"
    assert tried > 200, tried


def check_private(text, *more):
    secrets = [socket.gethostname(), tempfile.gettempdir(), *BENCH_WORDS, *more]
    if getpass.getuser() not in ("root", "nobody"):
        secrets.append(getpass.getuser())
    for secret in secrets:
        assert not secret or secret not in text, f"{secret!r} is in the report"


def check_run_figures(run_figures):
    for name in ("ttft", "tpot", "itl", "e2el"):
        p = [run_figures[f"{q}_{name}_ms"] for q in ("p50", "p90", "p95", "p99")]
        assert p == sorted(p) and p[0] > 0, (name, p)
        assert run_figures[f"median_{name}_ms"] == p[0]
    wire, memory = run_figures["wire"], run_figures["memory"]
    for way in ("up", "down"):
        assert 0 < wire[f"packed_bytes_{way}"] <= wire[f"tensor_bytes_{way}"], wire
        assert wire[f"packed_bytes_{way}"] < wire[f"bytes_{way}"], wire
    assert wire["handshakes"] == 1 and wire["reconnects"] == 0
    for kind in ("peak_rss_bytes", "client_weights_bytes", "embed_tokens_bytes", "head_copy_bytes",
                 "cloak_bytes", "body_weights_bytes", "kv_bytes"):
        assert memory[kind] > 0, kind
    assert memory["lm_head_bytes"] == 0  # the small model's is tied


def check_github(text, report, smaller):
    entries = strict_json(text)
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names)) and len(names) >= len(CASES)
    for entry in entries:
        # What github-action-benchmark's extract.ts takes from a custom result.
        assert set(entry) <= {"name", "unit", "value", "range", "extra"}
        assert isinstance(entry["name"], str) and isinstance(entry["unit"], str)
        assert isinstance(entry["value"], (int, float)) and math.isfinite(entry["value"])
        assert entry["value"] > 0
        assert entry["unit"] == "ms" if smaller else entry["unit"].endswith("s/s")
    by_name = {entry["name"]: entry["value"] for entry in entries}
    for case in report["cases"]:
        key = f"{case['name']}/{case['backend']}"
        if smaller:
            assert by_name[key + " p50"] == case["p50_ms"]
        else:
            assert by_name[key] == case["items_per_second"]


def check_google_benchmark(text, report, folder):
    parsed = strict_json(text)
    assert parsed["context"]["num_cpus"] == report["environment"]["logical_cores"]
    for case in report["cases"]:
        name = f"{case['name']}/{case['backend']}"
        real = [b["real_time"] for b in parsed["benchmarks"]
                if b["run_name"] == name and b["run_type"] == "iteration"]
        assert real == case["samples_ms"], name
        aggregates = {b["aggregate_name"]: b["real_time"] for b in parsed["benchmarks"]
                      if b["run_name"] == name and b["run_type"] == "aggregate"}
        assert aggregates == {"mean": case["mean_ms"], "median": case["median_ms"],
                              "stddev": case["std_ms"]}, name
    if not os.path.exists(COMPARE):
        print(f"not tried: {COMPARE} is not here (Debian: libbenchmark-tools)")
        return
    slower = copy.deepcopy(parsed)
    for benchmark in slower["benchmarks"]:
        benchmark["real_time"] *= 2
    before, after, out = folder / "before.json", folder / "after.json", folder / "diff.json"
    before.write_text(text)
    after.write_text(json.dumps(slower))
    run(sys.executable, "-B", COMPARE, "-d", out, "benchmarks", before, after)
    differences = {d["name"]: d["measurements"] for d in json.loads(out.read_text())}
    for case in report["cases"]:
        measured = differences[f"{case['name']}/{case['backend']}"]
        assert all(abs(m["time"] - 1) < 1e-9 for m in measured), measured


def check_bencher(text, report):
    parsed = strict_json(text)
    for benchmark, measures in parsed.items():
        assert isinstance(benchmark, str) and set(measures) <= {"latency", "throughput"}
        for metric in measures.values():
            # The Bencher Metric Format: a value, and bounds that may be left out.
            assert set(metric) <= {"value", "lower_value", "upper_value"}
            assert metric.get("lower_value", 0) <= metric["value"]
            assert metric["value"] <= metric.get("upper_value", math.inf)
    for case in report["cases"]:
        measures = parsed[f"{case['name']}/{case['backend']}"]
        assert math.isclose(measures["latency"]["value"], 1e6 * case["p50_ms"])  # nanoseconds
        assert measures["throughput"]["value"] == case["items_per_second"]


def check_prometheus(text, report):
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for family in families.values():
        assert re.fullmatch(r"infemeral_[a-z0-9_]+", family.name), family.name
        assert family.documentation and family.type in ("gauge", "summary"), family
        assert family.samples, family.name
        keys = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
        assert len(keys) == len(set(keys)), f"{family.name} has a sample twice"
    assert families["infemeral_build_info"].samples[0].labels["revision"] == \
        report["build"]["git_revision"]

    def value(family, **labels):
        found = [s.value for s in families[family].samples if s.labels == labels]
        assert len(found) == 1, (family, labels, found)
        return found[0]
    for case in report.get("cases", []):
        labels = {"case": case["name"], "backend": case["backend"]}
        for quantile, field in (("0.5", "p50_ms"), ("0.99", "p99_ms")):
            got = value("infemeral_bench_case_seconds", quantile=quantile, **labels)
            assert math.isclose(got, 1e-3 * case[field], rel_tol=1e-7), (labels, got)
        summary = families["infemeral_bench_case_seconds"].samples
        counts = [s.value for s in summary if s.name.endswith("_count") and s.labels == labels]
        assert counts == [case["count"]]
        for phase, figures in case["phases"].items():
            got = value("infemeral_bench_phase_seconds", phase=phase, **labels)
            assert math.isclose(got, 1e-3 * figures["p50_ms"], rel_tol=1e-7), (phase, got)
    for figures in report.get("runs", [report]):
        backend = figures.get("backend", report["options"].get("backend"))
        got = value("infemeral_wire_bytes", backend=backend, direction="up", stage="packed")
        assert got == figures["wire"]["packed_bytes_up"]
        got = value("infemeral_ttft_seconds", backend=backend, quantile="0.5")
        assert math.isclose(got, 1e-3 * figures["p50_ttft_ms"], rel_tol=1e-7)


def check_sweep(bench, prepared, schema, folder):
    """Every place of the line is in the report, none faster than the line, and in every export."""
    file = folder / "sweep.json"
    measured = run(bench, "-m", prepared, "-o", file, "--backend", "cpu", "--case", "codec", "--runs", "2",
                   "-n", "4", "--prefill-tokens", "30", "--sweep", "rtt=0,15", "--sweep", "bandwidth=2M,1G",
                   "--quiet")
    report = strict_json(file.read_text())
    check_schema(schema, report)
    assert report["environment"]["read_bytes_per_second"] > 1e8
    places = [(p["bits_per_second"], p["rtt_ms"]) for p in report["sweep"]]
    assert places == [(bits, rtt) for bits in (2e6, 1e9) for rtt in (0, 15)], places
    for p in report["sweep"]:
        assert (p["prompt_tokens"], p["output_tokens"], p["requests"]) == (30, 4, 2)
        # 30 rows up and one down, of float16; a row each way. LZ4 may take a little off.
        row_ms = 1e3 * 16 * report["model"]["hidden_size"] / p["bits_per_second"]
        for latency, rows in (("ttft", 31), ("tpot", 2)):
            limit = p[f"limit_{latency}_ms"]
            assert p["rtt_ms"] + 0.5 * rows * row_ms < limit < p["rtt_ms"] + 1.001 * rows * row_ms, p
            assert min(p[f"mean_{latency}_ms"], p[f"p50_{latency}_ms"]) >= limit, p
    assert [line.split()[1:3] for line in measured.stdout.split("\n\n")[1].splitlines()[1:]] == \
        [["0", "2"], ["15", "2"], ["0", "1000"], ["15", "1000"]], measured.stdout

    names = {f"sweep_{latency}/rtt:{p['rtt_ms']:g}ms/line:{p['bits_per_second'] / 1e6:g}M/cpu": p[f"p50_{latency}_ms"]
             for p in report["sweep"] for latency in ("ttft", "tpot")}
    export = lambda kind: run(bench, "--from", file, "--export", kind).stdout
    github = {entry["name"]: entry["value"] for entry in strict_json(export("github-smaller"))}
    google = {b["name"]: b["real_time"] for b in strict_json(export("google-benchmark"))["benchmarks"]}
    bencher = strict_json(export("bencher"))
    families = {f.name: f for f in text_string_to_metric_families(export("prometheus"))}
    for name, ms in names.items():
        assert github[f"{name} median"] == ms and google[name] == ms, name
        assert math.isclose(bencher[name]["latency"]["value"], 1e6 * ms), name
    for p in report["sweep"]:
        labels = {"backend": "cpu", "rtt_ms": f"{p['rtt_ms']:g}", "line": f"{p['bits_per_second'] / 1e6:g}M"}
        for family, more, ms in (("ttft_seconds", {"quantile": "0.5"}, p["p50_ttft_ms"]),
                                 ("tpot_limit_seconds", {}, p["limit_tpot_ms"])):
            found = [s.value for s in families[f"infemeral_sweep_{family}"].samples
                     if s.labels == {**labels, **more}]
            assert len(found) == 1 and math.isclose(found[0], 1e-3 * ms, rel_tol=1e-7), (family, labels, found)

    for damage in ({"rtt_ms": -1}, {"limit_ttft_ms": None}, {"extra": 1}):
        bad = copy.deepcopy(report)
        bad["sweep"][0].update(damage)
        assert not jsonschema.Draft202012Validator(schema).is_valid(bad), damage
    for word, arguments in (("rtt", ["--sweep", "rtt=fast"]), ("bandwidth", ["--sweep", "bandwidth=1"]),
                            ("takes rtt", ["--sweep", "loss=1"]), ("twice", ["--sweep", "rtt=1", "--sweep", "rtt=2"]),
                            ("--server local", ["--sweep", "rtt=1", "--server", "127.0.0.1:1"])):
        refused = run(bench, "-m", prepared, "--quiet", *arguments, code=2)
        assert word in refused.stderr and len(refused.stderr.splitlines()) == 1, refused.stderr


def stderr_of(command, terminal):
    """What a program says on stderr, as a terminal or as a pipe."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    text = b""
    while True:
        try:
            piece = os.read(reader, 4096)
        except OSError as error:  # how a terminal ends
            assert error.errno == errno.EIO
            piece = b""
        if not piece:
            break
        text += piece
    os.close(reader)
    assert process.wait() == 0, text
    return text.decode()


def check_progress(command, *stages):
    """A bar for every stage on a terminal, wiped at the end; in a pipe nothing of it."""
    drawn = stderr_of(command, terminal=True)
    for stage in stages:
        assert re.search(rf"\r{stage} +\[[#.]{{30}}\] +\d+%", drawn), (stage, drawn)
    assert drawn.rindex("\r\x1b[K") > drawn.rindex("%"), drawn
    piped = stderr_of(command, terminal=False)
    assert "\r" not in piped and "%" not in piped and "\x1b" not in piped, piped


def check_gate(bench, report, folder):
    baseline, slow = folder / "baseline.json", folder / "slow.json"
    baseline.write_text(json.dumps(report))
    same = run(bench, "--from", baseline, "--baseline", baseline)
    assert same.stderr == "" and "head/cpu" in same.stdout and "SLOWER" not in same.stdout

    slower = copy.deepcopy(report)
    head = next(case for case in slower["cases"] if case["name"] == "head")
    head["p50_ms"] += 0.3 * head["phases"]["de_embed"]["p50_ms"]
    head["phases"]["de_embed"]["p50_ms"] *= 1.3
    slow.write_text(json.dumps(slower))
    found = run(bench, "--from", slow, "--baseline", baseline, "--max-ratio", "1.2", code=1)
    assert "head on cpu became slower in the phase de_embed" in found.stderr, found.stderr
    assert "SLOWER" in found.stdout
    run(bench, "--from", slow, "--baseline", baseline, "--max-ratio", "1.4")

    other = copy.deepcopy(report)
    other["model"]["hidden_size"] += 1
    slow.write_text(json.dumps(other))
    refused = run(bench, "--from", slow, "--baseline", baseline, code=2)
    assert "hidden_size" in refused.stderr and len(refused.stderr.splitlines()) == 1
    for bad in ("", "[]", "{}", '{"schema": 1}', '{"schema": "infemeral-report"}',
                json.dumps(report)[:-9]):
        slow.write_text(bad)
        for command in ((bench, "--from", slow, "--baseline", baseline),
                        (bench, "--from", baseline, "--baseline", slow),
                        (bench, "--from", slow, "--export", "prometheus")):
            refused = run(*command, code=2)
            assert refused.stdout == "" and len(refused.stderr.splitlines()) == 1, refused.stderr
    for bad in ("[]", "{}", '{"schema": "infemeral-report"}'):  # nothing that could be shown
        slow.write_text(bad)
        refused = run(bench, "--from", slow, code=2)
        assert "no cases" in refused.stderr and len(refused.stderr.splitlines()) == 1, refused.stderr
    refused = run(bench, "--from", folder / "nowhere.json", code=2)
    assert "nowhere.json" in refused.stderr


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", type=pathlib.Path, required=True)
    parser.add_argument("--bench", type=pathlib.Path, required=True)
    parser.add_argument("--make-tiny-model", type=pathlib.Path, required=True)
    parser.add_argument("--schema", type=pathlib.Path, required=True)
    args = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("INFEMERAL_")]:
        del os.environ[name]

    schema = json.loads(args.schema.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for recorded in sorted(args.schema.parent.glob("results/*/report.json")):
        check_schema(schema, strict_json(recorded.read_text()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        model, prepared = folder / "model", folder / "prepared"
        run(args.make_tiny_model, model)
        run(args.tools / "engine_prep", "--model", model, "--output", prepared)

        check_progress([args.tools / "engine_prep", "--model", model, "--output", prepared, "--force"],
                       "cloak", "client", "body")
        prompts = folder / "prompts.txt"
        prompts.write_text("one\ntwo\n")
        check_progress([args.tools / "engine_run", "-m", prepared, "-f", prompts, "-n", "2", "--overwrite", "-o",
                        folder / "results.jsonl"], "prompts")

        for profile in ([], ["--profile"]):
            file = folder / "run.json"
            run(args.tools / "engine_run", "-m", prepared, "-p", PROMPT, "-p", PROMPT + "!", "-n", "4",
                "--ignore-eos", "--quiet", "--report", file, *profile)
            text = file.read_text()
            report = strict_json(text)
            check_schema(schema, report)
            check_private(text, PROMPT, "xylophone", str(folder))
            check_run_figures(report)
            assert ("samples" in report) == bool(profile)
            exported = run(args.bench, "--from", file, "--export", "prometheus")
            check_prometheus(exported.stdout, report)

        file = folder / "bench.json"
        command = [args.bench, "-m", prepared, "-o", file, "--backend", "cpu", "--runs", "2", "-n", "6",
                   "--prefill-tokens", "40", "--save-detailed", "--quiet"]
        measured = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if measured.returncode == 2 and "build, whose times say nothing" in measured.stderr:
            assert not file.exists() and report["build"]["build_type"] != "Release"
            print("engine_bench rightly records nothing in this build")
            return
        assert measured.returncode == 0, measured.stderr
        assert measured.stderr == "", measured.stderr
        text = file.read_text()
        report = strict_json(text)
        check_schema(schema, report)
        check_schema_can_fail(schema, report)
        check_private(text, str(folder))
        assert {case["name"]: case["backend"] for case in report["cases"]} == CASES
        for case in report["cases"]:
            assert f"{case['name']}/{case['backend']}" in measured.stdout
            assert len(case["samples_ms"]) == case["count"] > 0
            # How much that must be is asked of a model whose tokens take longer (tests/bench_test.cpp).
            explained = sum(sum(phase["samples_ms"]) for phase in case["phases"].values())
            share = explained / sum(case["samples_ms"])
            assert abs(case["explained_share"] - share) < 1e-4 and 0 < share < 1.001, (case["name"], share)
        assert len(report["runs"]) == 1
        check_run_figures(report["runs"][0])

        export = lambda kind: run(args.bench, "--from", file, "--export", kind).stdout
        check_github(export("github-smaller"), report, smaller=True)
        check_github(export("github-bigger"), report, smaller=False)
        check_google_benchmark(export("google-benchmark"), report, folder)
        check_bencher(export("bencher"), report)
        check_prometheus(export("prometheus"), report)
        check_gate(args.bench, report, folder)

        check_sweep(args.bench, prepared, schema, folder)
        check_progress([args.bench, "-m", prepared, "--backend", "cpu", "--case", "decode", "--runs", "1", "-n",
                        "2", "--prefill-tokens", "8", "--sweep", "rtt=0"], "cpu load", "cpu check", "cpu decode",
                       "cpu sweep")

        # Only what was asked for, and without samples unless asked for.
        run(args.bench, "-m", prepared, "-o", file, "--backend", "cpu", "--case", "codec", "--case",
            "head", "--runs", "1", "-n", "2", "--prefill-tokens", "8", "--head", "full", "--quiet")
        small = strict_json(file.read_text())
        check_schema(schema, small)
        assert [case["name"] for case in small["cases"]] == ["head", "codec"]
        assert "samples_ms" not in small["cases"][0] and small["runs"][0]["tokens"]["output"] == 0
        check_prometheus_empty = export("prometheus")
        assert list(text_string_to_metric_families(check_prometheus_empty))
        assert strict_json(export("github-smaller"))

        for bad, word in ((["--case", "speed"], "case"), (["--export", "csv"], "export"),
                          (["-n", "1"], "max-tokens"), (["--max-ratio", "0.5"], "max-ratio"),
                          (["--wire", "f64"], "wire"), (["--head", "best"], "head"),
                          (["-n", "5000"], "context"), (["-o", folder / "no" / "x"], "no/x")):
            refused = run(args.bench, "-m", prepared, "--case", "ttft", "--case", "decode", "--runs", "1",
                          "--prefill-tokens", "8", "-n", "4", "--quiet", *bad, code=2) \
                if "-n" not in bad and "--case" not in bad else \
                run(args.bench, "-m", prepared, "--runs", "1", "--quiet", *bad, code=2)
            assert word in refused.stderr and len(refused.stderr.splitlines()) == 1, refused.stderr
        run(args.bench, code=2)
        refused = run(args.bench, "-m", prepared, "--server", "127.0.0.1:1", code=2)
        assert "--server-key" in refused.stderr
    print("all as it should be")


if __name__ == "__main__":
    main()
