#!/usr/bin/env python3
"""The server of front_test.py: serve_torch with a body whose rows are the sums of a session's rows
up to them, exact in float32 in any order, and whose steps wait or fail when they are asked to."""

import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from serve_torch.body import (RESOURCE_EXHAUSTED, WANTED_ALL, WANTED_NONE, Body,  # noqa: E402
                              BodyInfo, BodyLost, StepError, check_positions, read_manifest)
from serve_torch.cli import main  # noqa: E402

HIDDEN, CONTEXT = 64, 4096  # make_tiny_model's, and enough


class Cache:
    def __init__(self):
        self.held = np.zeros((0, HIDDEN), np.float32)

    @property
    def kv_len(self):
        return len(self.held)


class SumBody(Body):
    """A first number of 7 in a step asks for a failure, 6 for the body's end, 5 for its end when the
    session is released; 8 waits while there is a file `hold`. There is room for 3 sessions."""

    def __init__(self, options, log):
        self.info = BodyInfo("sums", HIDDEN, CONTEXT, 1, *read_manifest(Path(options.model)))
        self.open = 0
        self.front = bool(options.front)
        self.log = log
        self.hold = Path(options.identity).with_name("hold")

    def new_session(self):
        if self.open == 3:
            raise StepError(RESOURCE_EXHAUSTED, "all three are in use")
        self.open += 1
        return Cache()

    def release(self, session):
        self.open -= 1
        if 5 in session.held[:, 0]:
            raise RuntimeError("no such luck")

    def run(self, steps):
        assert (threading.current_thread() is threading.main_thread()) == self.front
        self.log("info", f"rows {[len(step.states) for step in steps]}")
        for step in steps:
            if step.states[0, 0] == 7:
                raise RuntimeError("no such luck")
            if step.states[0, 0] == 6:
                raise BodyLost("no luck ever again")
            while step.states[0, 0] == 8 and self.hold.exists():
                time.sleep(0.01)
            try:
                check_positions(step, step.session.kv_len, self.info.max_context)
            except StepError as error:
                step.error = error
                continue
            held = np.concatenate([step.session.held[:step.start_pos], step.states])
            step.session.held = held
            back = {WANTED_ALL: len(step.states), WANTED_NONE: 0}.get(step.wanted, 1)
            step.out = np.cumsum(held, axis=0)[len(held) - back:]

    def close(self):
        self.log("info", "the body is closed")


def load(options, console):
    # With --front neither is needed.
    assert not options.front or not {"grpc", "cryptography"} & set(sys.modules)
    return SumBody(options, console.log)


if __name__ == "__main__":
    sys.exit(main(load=load))
