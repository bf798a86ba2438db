#!/usr/bin/env python3
"""The programs at start, with less memory than they need (RLIMIT_AS, growing until they run).

Each must work, or end by itself with an error code and a line that says what is missing: no crash,
no silence, and no half-made output.
"""
import argparse
import os
import pathlib
import resource
import signal
import subprocess
import tempfile
import threading

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tools", required=True, help="folder of the programs")
parser.add_argument("--make-tiny-model", required=True)
options = parser.parse_args()

TOOLS = pathlib.Path(options.tools).resolve()
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("INFEMERAL_")}
CLEAN["INFEMERAL_BACKEND"] = "cpu"
# An abort is gRPC's, which ends the process when it gets no thread; the line is ours all the same.
ENDS = {1, 2, 3, -signal.SIGABRT}
ENOUGH = 1 << 32
HUNG_SECONDS = 30


def start(command, limit, **options):
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), **options)


def loads(program, limit):
    """Whether the system can map the program and its libraries: before that, no line of it runs."""
    loader = start([program], limit, env={**CLEAN, "LD_TRACE_LOADED_OBJECTS": "1"})
    loader.communicate(timeout=60)
    return loader.returncode == 0


def run(command, limit):
    """Exit code and what was printed. A server that runs is told to end, and its code is 0."""
    process = start(command, limit, env=CLEAN)
    watchdog = threading.Timer(HUNG_SECONDS, process.kill)
    watchdog.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "listening on" in line:
            process.terminate()
    code = process.wait(timeout=60)
    watchdog.cancel()
    return code, "".join(lines)


def grow(command, output=None):
    refused = 0
    limit = 8 << 20
    while limit < ENOUGH and not loads(command[0], limit):
        limit = limit * 9 // 8
    said = ""
    while limit < ENOUGH:
        code, said = run(command, limit)
        if code == -signal.SIGKILL:
            # Rarely gRPC 1.51 waits at its end for a timer thread that the system did not give it.
            # That is a matter of moments; a wait of ours would come again.
            code, said = run(command, limit)
        if code == 0:
            break
        if output is not None and output.exists():
            raise SystemExit(f"{command[0]} with {limit >> 20} MiB left {output.name} behind")
        if code not in ENDS or not said.strip():
            raise SystemExit(f"{command[0]} with {limit >> 20} MiB: exit code {code}\n{said}")
        refused += 1
        limit = limit * 9 // 8
    else:
        raise SystemExit(f"{command[0]} does not run at all\n{said}")
    print(f"{command[0].name}: refused with {refused} limits, runs with {limit >> 20} MiB")
    return refused


with tempfile.TemporaryDirectory() as temp:
    work = pathlib.Path(temp)
    subprocess.run([options.make_tiny_model, work / "model"], check=True)
    refused = grow([TOOLS / "engine_prep", "--model", work / "model", "--output", work / "out"],
                   output=work / "out")
    refused += grow([TOOLS / "engine_keygen", "--output", work / "key"], output=work / "key")
    refused += grow([TOOLS / "engine_serve", "--model", work / "out" / "body", "--listen", "127.0.0.1:0",
                     "--identity", work / "key", "--allow", work / "key.pub"])
    refused += grow([TOOLS / "engine_run", "--model", work / "out", "--threads", "1", "--max-tokens", "2",
                     "-p", "ab"])
    if refused == 0:
        raise SystemExit("no limit was too small: nothing was tested")
print("all as it should be")
