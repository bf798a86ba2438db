#!/usr/bin/env python3
"""Holds a body server to docs/protocol.md, and its rows and tokens to engine_serve's.

    conformance.py --server-command build/release/tools/engine_serve --tools build/release/tools \\
        --make-tiny-model build/release/tests/make_tiny_model

The server is started with --model, --listen, --identity, --allow and the limits of engine_serve
behind the given command. Random inputs come from a seed that is printed; --seed repeats a run.
"""

import argparse
import importlib
import sys
import time
import traceback

MODULES = ("cases_channel", "cases_steps", "cases_server")
PACKAGES = ("cryptography", "grpc", "grpc_tools", "grpc_health", "lz4", "noise", "numpy",
            "safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-command", required=True, help="program and arguments, as one")
    parser.add_argument("--tools", required=True, help="folder of engine_run and its kin")
    parser.add_argument("--make-tiny-model", required=True, help="that program")
    parser.add_argument("--needs", action="append", default=[], metavar="PACKAGE",
                        help="Python package without which the server cannot run: skip then")
    parser.add_argument("--replaces-keys", action="store_true",
                        help="The server replaces its keys after 50,000 bytes or less")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with it in their name")
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()

    for package in (*PACKAGES, *args.needs):
        try:
            importlib.import_module(package)
        except ImportError as error:
            print(f"skipped: {error}")
            return 0
    from fixture import Fixture, temporary_folder

    failed = count = 0
    with temporary_folder() as folder:
        fixture = Fixture(args, folder)
        print(f"seed {fixture.seed}", flush=True)
        for module in map(importlib.import_module, MODULES):
            before = failed
            with fixture.server(*module.FLAGS, clients=module.CLIENTS) as server:
                for name, case in list(vars(module).items()):
                    if not name.startswith("case_") or args.only not in name:
                        continue
                    count += 1
                    start = time.monotonic()
                    try:
                        case(fixture, server)
                        verdict = "ok"
                    except Exception:
                        failed += 1
                        verdict = "FAILED"
                        traceback.print_exc(file=sys.stdout)
                    print(f"{verdict} {name[5:]} ({time.monotonic() - start:.1f} s)", flush=True)
                if failed > before:
                    print(f"the server's log:\n{server.log.read_text()}")
    print(f"{count - failed} of {count} cases passed")
    return 1 if failed or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
