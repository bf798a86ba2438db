#!/usr/bin/env python3
"""The README's figures are those of the reports under perf/results/, and perf/readme_figures.py --check
notices when they are not."""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=pathlib.Path, required=True)
    args = parser.parse_args()
    script = args.root / "perf/readme_figures.py"

    def run(root, *arguments):
        return subprocess.run([sys.executable, "-B", str(script), "--root", str(root), *arguments],
                              capture_output=True, text=True)

    checked = run(args.root, "--check")
    assert checked.returncode == 0, checked.stderr

    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary)
        shutil.copytree(args.root / "perf/results", copy / "perf/results")
        readme = copy / "README.md"
        original = (args.root / "README.md").read_text(encoding="utf-8")

        def refused(text, word):
            readme.write_text(text, encoding="utf-8")
            done = run(copy, "--check")
            assert done.returncode == 1 and word in done.stderr, (word, done)
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert readme.read_text(encoding="utf-8") == text, "--check has changed the README"
        marker = "<!-- figures: speed;"
        start = original.index("| median |")
        digit = next(i for i in range(start, len(original)) if original[i] in "12345678")
        refused(original[:digit] + "9" + original[digit + 1:], "does not say what")
        refused(original + "\nIt takes 12.5 ms.\n", "12.5 ms")
        refused(original.replace(marker, "<!--"), "markers")
        refused(original.replace("figures: speed", "figures: weather"), "weather")

        # A newer report is taken, and writing mends what --check finds.
        baseline = sorted((copy / "perf/results").glob("cpu-bench-*/report.json"))[-1]
        report = json.loads(baseline.read_text())
        next(c for c in report["cases"] if c["name"] == "decode")["p50_ms"] = 1234.5
        newer = copy / "perf/results/cpu-bench-2999-01-01"
        newer.mkdir()
        (newer / "report.json").write_text(json.dumps(report))
        refused(original, "does not say what")
        written = run(copy)
        assert written.returncode == 0, written.stderr
        text = readme.read_text(encoding="utf-8")
        assert "| 1,230 |" in text and "cpu-bench-2999-01-01" in text
        assert run(copy, "--check").returncode == 0
        del report["cases"]
        (newer / "report.json").write_text(json.dumps(report))
        refused(text, "cases")
    print("all as it should be")


if __name__ == "__main__":
    main()
