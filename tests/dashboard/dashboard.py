#!/usr/bin/env python3
"""The dashboard in a headless Chromium: charts are there, their values are the report's, nothing is
asked of the network, and a broken report gets a message that can be read.

Needs Debian's chromium and chromium-driver; says "skipped:" where they are missing.
"""
import argparse
import copy
import functools
import http.server
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

PHASES = ["embed", "cloak", "encode", "encrypt", "network", "body", "decrypt", "decode", "uncloak",
          "de_embed", "sample"]
SWEPT = ["sweep-ttft", "sweep-tpot"]
CHARTS = ["decode-phases", "first-phases", "ttft", "tpot", "cases", "history", "wire", "memory"]


def figures(base):
    return {"mean_ms": base, "p50_ms": base, "p95_ms": 2 * base, "p99_ms": 3 * base}


def summary(base):
    return {"mean_ms": base, "median_ms": base, "std_ms": base / 10, "min_ms": base / 2, "p50_ms": base,
            "p90_ms": 1.1 * base, "p95_ms": 1.2 * base, "p99_ms": 1.5 * base, "max_ms": 2 * base}


def make_run(backend, scale, samples):
    run = {"backend": backend, "backend_name": f"{backend} (test)",
           "requests": {"completed": 3, "failed": 0},
           "tokens": {"prompt": 9, "prompt_cached": 0, "output": 12},
           "duration_ms": 100.0, "load_ms": 50.0, "output_throughput": 30.0,
           "phases": {token: {phase: figures(scale * (i + 1 + offset)) for i, phase in enumerate(PHASES)}
                      for token, offset in (("decode", 0), ("first_token", 20))},
           "wire": {f"{kind}bytes_{way}": int(1000 * scale) * (i + 1)
                    for i, kind in enumerate(("tensor_", "packed_", "")) for way in ("up", "down")},
           "memory": {f"{kind}_bytes": (i + 1) << 20
                      for i, kind in enumerate(("peak_rss", "device_peak", "embed_tokens", "lm_head",
                                                "head_copy", "cloak", "body_weights", "kv"))}}
    run["wire"]["steps"] = 10
    for i, latency in enumerate(("ttft", "tpot", "itl", "e2el")):
        for j, q in enumerate(("p50", "p90", "p95", "p99")):
            run[f"{q}_{latency}_ms"] = scale * (10 * i + j + 1)
    if samples:
        run["samples"] = [{"ttft_ms": scale * (1 + i % 7), "e2el_ms": scale * (1 + i % 7) + 30,
                           "output_tokens": 4} for i in range(40)]
    return run


def make_sweep(backends):
    return [{"backend": backend, "rtt_ms": rtt, "bits_per_second": bits, "p50_ttft_ms": 50 + rtt + i,
             "p50_tpot_ms": 5 + rtt + i, "limit_ttft_ms": rtt + 1, "limit_tpot_ms": rtt + 0.5}
            for i, backend in enumerate(backends) for bits in (1e8, 0) for rtt in (20, 0, 10)]


# As perf/cpu_peers.py, gpu_peers.py, cpu_system.py and client_token_bench write them.
PEERS = {
    "cpu_peers.json": {"cpu": "Test CPU", "threads": 4, "shape": "100x10",
                       "torch_token_ms": {"median": {"float16": {"greedy": 9.0, "top_p": 8.0},
                                                     "float32": {"greedy": 7.0, "top_p": 12.0}}},
                       "ours": {"ms": {"certified greedy": {"median": 2.0},
                                       "certified top-p": {"median": 3.0}}}},
    "gpu_peers.json": {"schema": "infemeral-gpu-peers", "environment": {"gpu": "Test GPU"},
                       "shapes": [{"vocab_size": 100, "hidden_size": 10,
                                   "eager_original": {"sampled": {"wall_ms": 1.5},
                                                      "greedy": {"wall_ms": 1.25}},
                                   "compiled_graph_greedy": {"wall_ms": 0.75}}]},
    "cpu_system.json": {"llama_cpp_python": "1", "machine": {"cpu": "Test CPU"},
                        "runs": [{"threads": 4, "decode": {"median": 100.0},
                                  "decode_llama": {"median": 50.0}, "prompt": {"median": 1000.0},
                                  "prompt_llama": {"median": 800.0}}]},
    "client_token.jsonl": [{"backend": "cuda (Test GPU)", "shape": "100x10", "sampling": "greedy",
                            "token_ms_p50": 0.5},
                           {"backend": "cuda (Test GPU)", "shape": "100x10",
                            "sampling": "top-p 0.9, T 0.7", "token_ms_p50": 0.625},
                           {"backend": "cuda (Test GPU)", "shape": "100x10", "sampling": "T 1",
                            "token_ms_p50": 0.6}]}
PEER_VALUES = {
    "client, 100x10, greedy (4 threads of Test CPU)": {"infemeral": 2.0, "PyTorch, float32": 7.0},
    "client, 100x10, top-p (4 threads of Test CPU)": {"infemeral": 3.0, "PyTorch, float16": 8.0},
    "client, 100x10, greedy (Test GPU)": {"infemeral": 0.5, "PyTorch, original": 1.25,
                                          "PyTorch, compiled, head alone": 0.75},
    "client, 100x10, top-p (Test GPU)": {"infemeral": 0.625, "PyTorch, original": 1.5},
    "whole system, a decoded token (4 threads of Test CPU)": {"infemeral": 10.0,
                                                              "llama.cpp, not private": 20.0},
    "whole system, a token of the prompt (4 threads of Test CPU)": {"infemeral": 1.0,
                                                                    "llama.cpp, not private": 1.25}}


def write_peers(folder):
    for name, data in PEERS.items():
        text = "\n".join(map(json.dumps, data)) + "\n" if name.endswith("l") else json.dumps(data)
        (folder / name).write_text(text)


def make_report(revision, created, scale=1.0, backends=("cpu",), samples=False, sweep=False):
    cases = [{"name": name, "backend": backend, "count": 5, **summary(scale * (i + 1)),
              "items_per_second": 9.5}
             for i, name in enumerate(("ttft", "decode", "head")) for backend in backends]
    cases.append({"name": "codec", "backend": "none", "count": 5, **summary(scale / 100),
                  "items_per_second": 3.0})
    return {"schema": "infemeral-report", "schema_version": 1, "created": created,
            "tool": "engine_bench", "build": {"version": "0.1.0", "git_revision": revision,
                                              "build_type": "Release", "compiler": "GNU 12"},
            "environment": {"cpu": "Test <b>CPU</b>", "logical_cores": 2, "gpus": [],
                            **({"read_bytes_per_second": 1e9} if sweep else {})},
            "model": {"type": "llama", "hidden_size": 8, "vocab_size": 9, "tied_embeddings": True,
                      "body": "llama </script><script>window.hacked=1</script>"},
            "options": {"head": "certified", "wire": "f16"},
            "runs": [make_run(b, scale * (i + 1), samples) for i, b in enumerate(backends)],
            "cases": cases, **({"sweep": make_sweep(backends)} if sweep else {})}


class Page:
    def __init__(self, chromium, driver):
        options = Options()
        options.binary_location = chromium
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1280,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.driver.set_page_load_timeout(60)

    def open(self, url):
        self.driver.get(url)

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, what, script):
        for _ in range(200):
            if self.js(f"return Boolean({script})"):
                return
            time.sleep(0.05)
        raise AssertionError(f"no {what} within 10 s; messages: {self.messages()}")

    def chart(self, name):
        return self.js("""
            const c = Chart.getChart(arguments[0]);
            if (!c) return null;
            return {type: c.config.type, labels: c.data.labels.map(String),
                    datasets: c.data.datasets.map((d) => ({label: d.label, data: [...d.data]})),
                    limits: c.config.data.limits ?? [],
                    width: c.width, height: c.height};""", name)

    def drawn_lengths(self, name, horizontal):
        """Pixels of every bar, as drawn: a list for each dataset."""
        return self.js("""
            const c = Chart.getChart(arguments[0]);
            return c.data.datasets.map((_, i) => c.getDatasetMeta(i).data.map(
                (bar) => Math.abs(arguments[1] ? bar.x - bar.base : bar.y - bar.base)));""",
                       name, horizontal)

    def messages(self):
        return [p.text for p in self.driver.find_elements(By.CSS_SELECTOR, "#messages p")]

    def console_errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")
                if entry["level"] in ("SEVERE", "WARNING")]

    def check_quiet(self):
        errors = self.console_errors()
        assert not errors, errors
        asked = self.js("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert asked == [], asked


def close(a, b):
    return len(a) == len(b) and all(
        (x is None and y is None) or math.isclose(x, y, rel_tol=1e-9) for x, y in zip(a, b))


def dataset(chart, label):
    found = [d["data"] for d in chart["datasets"] if d["label"] == label]
    assert len(found) == 1, (label, [d["label"] for d in chart["datasets"]])
    return found[0]


def check_sweep(page, report):
    for latency in ("ttft", "tpot"):
        chart = page.chart(f"sweep-{latency}")
        series = {}
        for p in report.get("sweep", []):
            speed = f"{p['bits_per_second'] / 1e6:.0f} Mbit/s" if p["bits_per_second"] else "line not limited"
            label = speed if len(report["runs"]) == 1 else f"{p['backend']}, {speed}"
            series.setdefault(label, []).append((p["rtt_ms"], p[f"p50_{latency}_ms"], p[f"limit_{latency}_ms"]))
        for label, points in series.items():
            points.sort()
            for name, place in ((label, 1), (f"{label}: limit", 2)):
                shown = [(p["x"], p["y"]) for p in dataset(chart, name)]
                assert shown == [(p[0], p[place]) for p in points], (name, shown)


def check_limits(page, report):
    """What a decode token reads, at the speed of the memory: drawn, and said."""
    speed = report["environment"].get("read_bytes_per_second")
    expected = []
    for run in report["runs"]:
        memory = run["memory"]
        client = memory["head_copy_bytes"] + memory["cloak_bytes"] if run["backend"] == "cpu" else 0
        expected.append(1e3 * (memory["body_weights_bytes"] + client) / speed if speed else None)
    assert close(page.chart("decode-phases")["limits"], expected), expected
    said = page.driver.find_element(By.ID, "decode-limit").get_attribute("textContent")
    for limit in expected:
        assert (limit is None and said == "") or f"{limit:.3g}"[:4] in said, (limit, said)
    if not speed:
        return
    # The line is where it should be: its colour stands in the canvas at that place.
    found = page.js("""
        const c = Chart.getChart('decode-phases'), limit = c.config.data.limits[0];
        const ratio = c.currentDevicePixelRatio, x = c.scales.x.getPixelForValue(limit);
        const bar = c.getDatasetMeta(0).data[0];
        const strip = c.ctx.getImageData((x - 2) * ratio, (bar.y - bar.height / 2 - 5) * ratio, 4 * ratio, 4 * ratio).data;
        const probe = document.createElement('canvas').getContext('2d');
        probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue('--bad').trim();
        probe.fillRect(0, 0, 1, 1);
        const want = probe.getImageData(0, 0, 1, 1).data;
        for (let i = 0; i < strip.length; i += 4) {
          if ([0, 1, 2].every((j) => Math.abs(strip[i + j] - want[j]) < 8) && strip[i + 3] > 200) return true;
        }
        return false;""")
    assert found, "the memory's limit is not drawn"


def check_value_table(page, chart, label, values):
    """The text beside a chart says what it shows."""
    rows = page.js("""
        return [...document.getElementById(arguments[0]).closest('figure').querySelectorAll('details tr')]
            .map((tr) => [...tr.cells].map((c) => c.textContent))""", chart)
    row = next(row for row in rows if row[0] == label)
    assert [float(text.replace(",", "")) for text in row[1:]] == [float(f"{v:.4g}") for v in values], row


def check_peers(page):
    chart = page.chart("peers")
    assert sorted(chart["labels"]) == sorted(PEER_VALUES), chart["labels"]
    for i, group in enumerate(chart["labels"]):
        shown = {d["label"]: d["data"][i] for d in chart["datasets"] if d["data"][i] is not None}
        assert shown == PEER_VALUES[group], (group, shown)


def check_values(page, report):
    """The charts of a page that shows this report alone."""
    for name in CHARTS:
        chart = page.chart(name)
        assert chart and chart["datasets"] and chart["width"] > 100 and chart["height"] > 100, name
    for name in SWEPT:
        assert bool(page.chart(name)) == ("sweep" in report), name
    runs = report["runs"]
    backends = [run["backend"] for run in runs]
    check_sweep(page, report)
    check_limits(page, report)
    check_value_table(page, "decode-phases", "body", [run["phases"]["decode"]["body"]["mean_ms"] for run in runs])
    for name, token in (("decode-phases", "decode"), ("first-phases", "first_token")):
        chart = page.chart(name)
        assert chart["labels"] == backends
        for phase in PHASES:
            assert close(dataset(chart, phase),
                         [run["phases"][token][phase]["mean_ms"] for run in runs]), (name, phase)
        # What is seen is in proportion.
        lengths = page.drawn_lengths(name, True)
        times = [d["data"] for d in chart["datasets"]]
        total = sum(map(sum, lengths))
        assert total > 100, (name, lengths)
        for drawn, values in zip(lengths, times):
            for a, b in zip(drawn, values):
                expected = b * total / sum(map(sum, times))
                assert abs(a - expected) <= 0.01 * total, (name, a, expected)
    for name in ("ttft", "tpot", "cases", "wire", "memory"):
        heights = [h for bars in page.drawn_lengths(name, False) for h in bars if h is not None]
        assert max(heights) > 50, (name, heights)
    for name, latency in (("ttft", "ttft"), ("tpot", "tpot")):
        chart = page.chart(name)
        for run in runs:
            shown = dataset(chart, run["backend"])
            if "samples" in run:  # a histogram: every sample is in one bar
                assert sum(shown) == len(run["samples"]), (name, shown)
            else:
                assert close(shown, [run[f"{q}_{latency}_ms"] for q in ("p50", "p90", "p95", "p99")])
    chart = page.chart("cases")
    for case in report["cases"]:
        shown = dataset(chart, case["backend"])[chart["labels"].index(case["name"])]
        assert math.isclose(shown, case["p50_ms"]), case["name"]
    wire = page.chart("wire")
    for run in runs:
        fields = [f"{kind}bytes_{way}" for way in ("up", "down") for kind in ("tensor_", "packed_", "")]
        assert close(dataset(wire, run["backend"]),
                     [run["wire"][f] / run["wire"]["steps"] for f in fields])
    memory = page.chart("memory")
    assert math.isclose(dataset(memory, backends[0])[0], runs[0]["memory"]["peak_rss_bytes"] / 2 ** 20)
    rows = page.js("""return [...document.querySelectorAll('#figures tr')].slice(1)
                         .map((r) => [...r.cells].map((c) => c.textContent))""")
    assert [row[1:3] for row in rows] == [[c["name"], c["backend"]] for c in report["cases"]]
    assert [row[4] for row in rows] == [f"{c['p50_ms']:.4f}" for c in report["cases"]]
    assert report["environment"]["cpu"] in page.driver.find_element(By.ID, "summary").text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", type=pathlib.Path, required=True)
    parser.add_argument("--report", type=pathlib.Path, help="a real report, shown too")
    parser.add_argument("--screenshot", type=pathlib.Path, help="a folder for pictures")
    args = parser.parse_args()
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        print("skipped: no chromium and chromium-driver (Debian packages of these names)")
        return
    for name in [name for name in os.environ if name.startswith("INFEMERAL_")]:
        del os.environ[name]

    def write_page(out, *arguments):
        done = subprocess.run([str(args.bench), *map(str, arguments), "--html", str(out)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        one = make_report("aaaaaaaaaaaa", "2026-01-01T10:00:00Z", backends=("cpu", "cuda"), sweep=True)
        detailed = make_report("bbbbbbbbbbbb", "2026-01-02T10:00:00Z", scale=1.5, samples=True)
        (folder / "one.json").write_text(json.dumps(one))
        (folder / "detailed.json").write_text(json.dumps(detailed))
        probe = subprocess.run([str(args.bench), "--html", str(folder / "empty.html")],
                               capture_output=True, text=True)
        if probe.returncode != 0 and "no dashboard" in probe.stderr:
            print("skipped: engine_bench was built without Chart.js")
            return
        assert probe.returncode == 0, probe.stderr

        page = Page(chromium, driver)
        try:
            # The report inside the page.
            write_page(folder / "one.html", "--from", folder / "one.json")
            page.open(f"file://{folder}/one.html")
            check_values(page, one)
            assert page.messages() == []
            assert not page.js("return window.hacked"), "a report's text was run as a script"
            page.check_quiet()
            select = Select(page.driver.find_element(By.ID, "history-case"))
            assert select.first_selected_option.text == "decode"
            select.select_by_visible_text("head")
            assert close(dataset(page.chart("history"), "cuda"), [3.0])

            write_page(folder / "detailed.html", "--from", folder / "detailed.json")
            page.open(f"file://{folder}/detailed.html")
            check_values(page, detailed)
            page.check_quiet()

            assert not page.driver.find_element(By.ID, "peers").is_displayed()

            # Beside older ones: history in order of time; and beside peers.
            write_peers(folder)
            write_page(folder / "both.html", "--from", folder / "detailed.json", "--history",
                       folder / "one.json", *(word for name in PEERS for word in ("--history", folder / name)))
            page.open(f"file://{folder}/both.html")
            assert page.messages() == []
            check_peers(page)
            history = page.chart("history")
            assert [label[:12] for label in history["labels"]] == ["aaaaaaaaaaaa", "bbbbbbbbbbbb"]
            assert close(dataset(history, "cpu"), [2.0, 3.0])
            assert close(dataset(history, "cuda"), [2.0, None])
            assert len(page.chart("decode-phases")["labels"]) == 3

            # Dark, and on a phone.
            background = "return getComputedStyle(document.body).backgroundColor"
            light = page.js(background)
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
                "features": [{"name": "prefers-color-scheme", "value": "dark"}]})
            page.wait("dark page", f"(function(){{{background}}})() !== '{light}'")
            page.wait("dark charts",
                      "Chart.getChart('memory').options.plugins.legend.labels.color === '#e7ebf0'")
            if args.screenshot:
                page.driver.save_screenshot(str(args.screenshot / "dark.png"))
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
            page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                "width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True})
            page.open(f"file://{folder}/both.html")
            assert page.js("return document.documentElement.scrollWidth") <= 375
            for name in [*CHARTS, *SWEPT, "peers"]:
                width = page.chart(name)["width"]
                assert 250 < width <= 375, (name, width)
            if args.screenshot:
                page.driver.save_screenshot(str(args.screenshot / "phone.png"))
            page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            page.check_quiet()

            # By the file picker, good and broken ones.
            page.open(f"file://{folder}/empty.html")
            assert page.driver.find_element(By.ID, "empty").is_displayed()
            assert not page.driver.find_element(By.ID, "content").is_displayed()
            broken = {"text.json": ("{nonsense", "not JSON"), "list.json": ("[1]", "not a report"),
                      "null.json": ("null", "not a report"),
                      "other.json": ('{"schema": "other"}', "not a report"),
                      "next.json": (json.dumps({**one, "schema_version": 2}), "version 2"),
                      "late.json": (json.dumps({**one, "created": "soon"}), "date")}
            pointless = copy.deepcopy(one)
            del pointless["sweep"][1]["limit_ttft_ms"]
            broken["point.json"] = (json.dumps(pointless), "sweep")
            broken["peers.json"] = (json.dumps({**PEERS["cpu_peers.json"], "ours": {"ms": {}}}), "damaged")
            headless = copy.deepcopy(one)
            del headless["runs"][0]["phases"]["decode"]["body"]
            broken["phase.json"] = (json.dumps(headless), "body")
            caseless = copy.deepcopy(one)
            caseless["cases"][0]["p50_ms"] = None
            broken["case.json"] = (json.dumps(caseless), "p50")
            broken["null_run.json"] = (json.dumps({**one, "runs": [None]}), "run")
            broken["odd_runs.json"] = (json.dumps({**one, "runs": 7}), "damaged")
            for name, (text, _) in broken.items():
                (folder / name).write_text(text)
            picker = page.driver.find_element(By.ID, "files")
            picker.send_keys("\n".join(str(folder / name) for name in broken))
            page.wait("messages", f"document.querySelectorAll('#messages p').length === {len(broken)}")
            for name, (_, why) in broken.items():
                said = [m for m in page.messages() if m.startswith(name)]
                assert len(said) == 1 and why in said[0], (name, said)
            assert not page.driver.find_element(By.ID, "content").is_displayed()
            picker.send_keys(str(folder / "one.json"))
            page.wait("charts", "Chart.getChart('cases')")
            check_values(page, one)
            picker.send_keys("\n".join(str(folder / name) for name in PEERS))
            page.wait("peers", "Chart.getChart('peers')?.data.labels.length === 6")
            check_peers(page)
            assert page.console_errors() == []

            # A folder's worth.
            results = folder / "results"
            (results / "inner").mkdir(parents=True)
            for name, text in (("one.json", json.dumps(one)), ("inner/two.json", json.dumps(detailed)),
                               ("inner/other.json", '{"benchmarks": []}'), ("README.md", "# Results"),
                               ("inner/broken.json", json.dumps({**one, "runs": [None]}))):
                (results / name).write_text(text)
            write_peers(results)
            page.open(f"file://{folder}/empty.html")
            page.driver.find_element(By.ID, "folder").send_keys(str(results))
            page.wait("messages", "document.querySelectorAll('#messages p').length === 2")
            assert sorted(page.messages()) == [
                "1 other JSON file in this folder is not for this page",
                "inner/broken.json cannot be shown: a run has no \"phases\""], page.messages()
            assert len(page.chart("history")["labels"]) == 2
            check_peers(page)
            assert page.console_errors() == []

            # ?report= from a server, and one that is not there.
            class Quiet(http.server.SimpleHTTPRequestHandler):
                def log_message(self, *_):
                    pass
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(
                Quiet, directory=str(folder)))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            root = f"http://127.0.0.1:{server.server_address[1]}"
            page.open(f"{root}/empty.html?report=one.json&report=missing.json")
            page.wait("charts", "Chart.getChart('cases')")
            page.wait("message", "document.querySelectorAll('#messages p').length === 1")
            check_values(page, one)
            assert "missing.json" in page.messages()[0] and "404" in page.messages()[0]
            server.shutdown()

            if args.report:
                write_page(folder / "real.html", "--from", args.report)
                page.console_errors()
                page.open(f"file://{folder}/real.html")
                check_values(page, json.loads(args.report.read_text()))
                page.check_quiet()
                if args.screenshot:
                    page.js("window.scrollTo(0, 0)")
                    page.driver.set_window_size(1280, 1900)
                    page.driver.save_screenshot(str(args.screenshot / "light.png"))
        finally:
            page.driver.quit()
    print("all as it should be")


if __name__ == "__main__":
    main()
