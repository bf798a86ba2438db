#!/usr/bin/env python3
"""A full disk and write errors, at one call after the other, under the programs that write files.

Each must say so in one line that names the file, exit with an error, leave what was there before as
it was, and no temporary behind. With --all every call fails once, otherwise a sample of them.
"""
import argparse
import errno
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tools", required=True, help="folder of the programs")
parser.add_argument("--make-tiny-model", required=True)
parser.add_argument("--preload", required=True, help="tests/fail_io.cpp as a library")
parser.add_argument("--all", action="store_true", help="every call, not a sample")
options = parser.parse_args()

SEED = int(os.environ.get("INFEMERAL_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
random.seed(SEED)
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("INFEMERAL_")}
CLEAN["INFEMERAL_BACKEND"] = "cpu"
failures = 0


def fail(message):
    global failures
    failures += 1
    print(f"FAILED: {message}")


def contents(folder):
    """Every file and folder below, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*"))}


class Case:
    """One command in a folder of its own, made afresh by `prepare` for every run."""

    def __init__(self, name, command, prepare, allowed, names):
        self.name, self.command, self.prepare = name, command, prepare
        self.allowed = allowed  # (before, after, good): whether a failed run may leave this
        self.names = names      # one of these is in the message

    def run(self, work, fail_at, fail_with):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        self.prepare(work)
        before = contents(work)
        log = work.parent / "log"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            self.command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            env={**CLEAN, "LD_PRELOAD": os.path.abspath(options.preload), "FAIL_AT": str(fail_at),
                 "FAIL_WITH": str(fail_with), "FAIL_LOG": str(log)}, timeout=120)
        calls, failed = log.read_text().split()
        return done, before, contents(work), int(calls), failed

    def test(self, work):
        done, _, good, calls, _ = self.run(work, 0, 0)
        if done.returncode != 0:
            fail(f"{self.name} does not work at all: {done.stderr}")
            return
        short, _, after, _, _ = self.run(work, 1, 0)
        if short.returncode != 0 or set(after) != set(good):
            fail(f"{self.name}: short writes: exit {short.returncode}: {short.stderr}")
        at = list(range(1, calls + 1))
        if not options.all and calls > 12:
            at = sorted({1, 2, *at[-5:], *random.sample(at, 4)})
        for n in at:
            number = random.choice([errno.ENOSPC, errno.EIO])
            done, before, after, _, failed = self.run(work, n, number)
            what = f"{self.name}, call {n} of {calls} ({failed}, {errno.errorcode[number]})"
            if failed == "-":
                continue  # the program came to an end in another way: fewer calls than counted
            if done.returncode <= 0:
                fail(f"{what}: exit {done.returncode}: {done.stderr}")
            lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
            if len(lines) != 1 or not any(name in lines[0] for name in self.names):
                fail(f"{what}: the message names no file: {done.stderr!r}")
            if not self.allowed(before, after, good):
                changed = [k for k in {*before, *after} if before.get(k) != after.get(k)]
                fail(f"{what}: left behind: {sorted(changed)}")
        print(f"{self.name}: {len(at)} of {calls} calls failed")


def unchanged(before, after, good):
    return before == after


def prefix_of(*names):
    """The named files hold a beginning of what a good run writes; the others are as before."""
    def allowed(before, after, good):
        for name in {*before, *after}:
            if name not in names and before.get(name) != after.get(name):
                return False
        for name in names:
            now = after.get(name)
            if now is None and before.get(name) is not None:
                return False
            if now is not None and now != before.get(name):
                if not now.startswith(before.get(name, b"")):
                    return False
        return True
    return allowed


def main():
    tools = pathlib.Path(options.tools).resolve()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        subprocess.run([options.make_tiny_model, str(root / "model")], check=True,
                       stdout=subprocess.DEVNULL)
        prep = [str(tools / "engine_prep"), "--quiet", "-t", "1"]
        model = [*prep, "--model", str(root / "model"), "--output"]
        subprocess.run([*model, str(root / "prepared")], check=True, env=CLEAN)
        (root / "text").write_text("one two three\n" * 20)
        (root / "prompts").write_text("one\ntwo\nthree\n")
        run = [str(tools / "engine_run"), "--quiet", "-t", "1", "-m", str(root / "prepared"), "-f",
               str(root / "prompts"), "-n", "3"]

        def nothing(work):
            pass

        def copy(work):
            shutil.copytree(root / "prepared", work / "out")

        def old_files(work):
            (work / "report.json").write_text("an old report\n")

        def half_done(work):
            done = subprocess.run([*run, "-o", "all.jsonl"], cwd=work, env=CLEAN, check=True)
            assert done.returncode == 0
            lines = (work / "all.jsonl").read_text().splitlines(keepends=True)
            (work / "results.jsonl").write_text(lines[0])
            (work / "all.jsonl").unlink()

        cases = [
            Case("engine_keygen", [str(tools / "engine_keygen"), "-o", "key"], nothing, unchanged,
                 ["key"]),
            Case("engine_prep", [*model, "out"], nothing, unchanged, ["out"]),
            Case("engine_prep --force", [*model, "out", "--force"], copy, unchanged, ["out"]),
            Case("engine_prep --token-counts",
                 [*prep, "--output", "out", "--token-counts", str(root / "text"), "--subset-size",
                  "5"], copy, unchanged, ["out"]),
            Case("engine_run -o", [*run, "-o", "results.jsonl"], nothing,
                 prefix_of("results.jsonl"), ["results.jsonl"]),
            Case("engine_run -o --continue", [*run, "-o", "results.jsonl", "--continue"], half_done,
                 prefix_of("results.jsonl"), ["results.jsonl"]),
            Case("engine_run --report", [*run, "--report", "report.json"], old_files, unchanged,
                 ["report.json"]),
        ]
        for case in cases:
            case.test(root / "work")
    if failures:
        print(f"seed {SEED}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
