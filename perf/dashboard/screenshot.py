#!/usr/bin/env python3
"""Makes the README's pictures of the dashboard, docs/dashboard-light.webp and -dark.webp, from the committed
reports: the page as engine_bench writes it, in a headless Chromium.

Needs Debian's chromium and chromium-driver, and tests/requirements.txt for selenium.

    perf/dashboard/screenshot.py --bench build/release/perf/engine_bench
"""
import argparse
import base64
import pathlib
import shutil
import subprocess
import sys
import tempfile

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

ROOT = pathlib.Path(__file__).resolve().parents[2]
WIDTH = 1200
BESIDE = ("cpu-2*/cpu_peers-16-cores.json", "cpu-system-*/f16-sessions.json", "h100-*/gpu_peers.json",
          "h100-*/client_token.jsonl")


def newest(pattern):
    found = sorted((ROOT / "perf/results").glob(pattern))
    if not found:
        sys.exit(f"screenshot: perf/results/{pattern} is missing")
    return found[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=pathlib.Path, required=True, help="engine_bench")
    parser.add_argument("--report", type=pathlib.Path, help="another report than the newest baseline")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs", help="the folder to write to")
    args = parser.parse_args()
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        sys.exit("screenshot: no chromium and chromium-driver (Debian packages of these names)")

    with tempfile.TemporaryDirectory() as temporary:
        page = pathlib.Path(temporary) / "page.html"
        command = [args.bench, "--from", args.report or newest("cpu-bench-*/report.json"), "--html", page]
        for pattern in BESIDE:
            command += ["--history", newest(pattern)]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        options = Options()
        options.binary_location = chromium
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--hide-scrollbars"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                "width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False})
            for scheme in ("light", "dark"):
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
                    "features": [{"name": "prefers-color-scheme", "value": scheme}]})
                browser.get(page.as_uri())
                browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
                # Down to the chart that has the peers.
                height = browser.execute_script(
                    "return document.getElementById('peers').closest('figure').getBoundingClientRect().bottom + 16")
                shot = browser.execute_cdp_cmd("Page.captureScreenshot", {
                    "format": "webp", "quality": 80, "captureBeyondViewport": True,
                    "clip": {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}})
                file = args.output / f"dashboard-{scheme}.webp"
                file.write_bytes(base64.b64decode(shot["data"]))
                print(f"{file}: {file.stat().st_size // 1024} KB")
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
