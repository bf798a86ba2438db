#!/usr/bin/env python3
"""The scheduler of tools/serve_torch: which waiting steps it runs as one, and that each is answered
as if it had run alone.

The body here is a few sums of small integers, exact in float32 in any order. It holds its first run
until every step of a case waits, so that no case depends on time.
"""

import asyncio
import os
import sys
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from serve_torch.body import (INTERNAL, INVALID_ARGUMENT, RESOURCE_EXHAUSTED,  # noqa: E402
                              WANTED_ALL, WANTED_LAST, WANTED_NONE, Body, BodyInfo, BodyLost,
                              BodyStep, StepError, check_positions)
from serve_torch.scheduler import Scheduler, ServedSession, StepJob  # noqa: E402

NONE, LAST, ALL = WANTED_NONE, WANTED_LAST, WANTED_ALL
HIDDEN, CONTEXT, PATIENCE = 3, 4096, 60


class Cache:
    def __init__(self):
        self.held = np.empty((0, HIDDEN), np.float32)

    @property
    def kv_len(self):
        return len(self.held)


class SumBody(Body):
    """A row's result is the sum of all rows up to it, each times its position + 1."""

    def __init__(self):
        self.info = BodyInfo("sums", HIDDEN, CONTEXT, 1)
        self.runs = []                        # of each its steps: (cache, start_pos, rows, wanted)
        self.busy, self.go = threading.Event(), threading.Event()
        self.full, self.broken = set(), None  # caches without room; what a run raises

    def new_session(self):
        return Cache()

    def release(self, session):
        if session in self.full:
            raise RuntimeError("as asked")

    def run(self, steps):
        self.busy.set()
        assert self.go.wait(PATIENCE)
        caches = [step.session for step in steps]
        assert len(set(caches)) == len(caches), "two steps of one session"
        self.runs.append([(s.session, s.start_pos, len(s.states), s.wanted) for s in steps])
        if self.broken:
            raise self.broken
        for step in steps:
            run_alone(step, step.session in self.full)


def run_alone(step, full=False):
    cache = step.session
    try:
        check_positions(step, cache.kv_len, CONTEXT)
        if full:
            raise StepError(RESOURCE_EXHAUSTED, "full")
    except StepError as error:
        step.error = error
        return
    cache.held = np.concatenate([cache.held[:step.start_pos], step.states])
    positions = np.arange(1, len(cache.held) + 1, dtype=np.float32)[:, None]
    rows = np.cumsum(cache.held * positions, axis=0)[step.start_pos:]
    step.out = {NONE: rows[:0], LAST: rows[-1:], ALL: rows}[step.wanted]


class Case:
    """A scheduler whose body is busy until run()."""

    def __init__(self, random, max_rows=512):
        self.random = random
        self.loop = asyncio.new_event_loop()
        self.body, self.log, self.done, self.lost = SumBody(), [], [], []
        self.abandoned = set()
        self.scheduler = Scheduler(self.body, self.loop,
                                   lambda level, message: self.log.append((level, message)),
                                   max_rows, on_lost=lambda: self.lost.append(len(self.done)))
        self.jobs = []
        self.step(self.session(), 0, 1)
        assert self.body.busy.wait(PATIENCE)

    def session(self):
        return ServedSession(self.body.new_session(), None)

    def step(self, session, start, rows, wanted=NONE):
        states = self.random.integers(-4, 5, (rows, HIDDEN)).astype(np.float32)
        job = StepJob(session, BodyStep(session.body, start, states, wanted),
                      abandoned=lambda: job in self.abandoned, done=self.done.append)
        self.jobs.append(job)
        self.scheduler.submit(job)
        return job

    def run(self):
        """Until everything is answered; the runs after the one that the others waited for."""
        self.body.go.set()

        async def answers():
            while len(self.done) < len(self.jobs):
                await asyncio.sleep(0.001)

        try:
            self.loop.run_until_complete(asyncio.wait_for(answers(), PATIENCE))
        finally:
            self.scheduler.close()
            self.loop.close()
        assert len(set(self.done)) == len(self.done), "a step was answered twice"
        for session in {job.session for job in self.jobs}:
            ours = [job for job in self.jobs if job.session is session]
            assert [job for job in self.done if job.session is session] == ours, "another order"
        return self.body.runs[1:]

    def check_answers(self):
        """Against every step run by itself, in order."""
        caches = {}
        for job in self.jobs:
            if job.dropped:
                continue
            cache = caches.setdefault(job.session, Cache())
            alone = BodyStep(cache, job.step.start_pos, job.step.states, job.step.wanted)
            run_alone(alone)
            if alone.error is not None:
                assert job.step.error.code == alone.error.code
                assert job.step.out is None
                continue
            assert job.step.error is None and job.end == cache.kv_len
            assert np.array_equal(job.step.out, alone.out), (job.step.out, alone.out)
        for session, cache in caches.items():
            assert np.array_equal(session.body.held, cache.held)


def case_steps_that_wait_together_run_as_one(random):
    for wanted in (NONE, LAST, ALL):
        case = Case(random)
        session = case.session()
        at = 0
        for rows in (32, 64, 128, 256):
            case.step(session, at, rows, wanted if rows == 256 else NONE)
            at += rows
        assert case.run() == [[(session.body, 0, 480, wanted)]]
        jobs = case.jobs[1:]
        assert [job.end for job in jobs] == [32, 96, 224, 480]
        back = {NONE: 0, LAST: 1, ALL: 256}[wanted]
        assert [len(job.step.out) for job in jobs] == [0, 0, 0, back]
        # Once, not four times: the client adds them up.
        assert jobs[0].compute_ms > 0 and not any(job.compute_ms for job in jobs[1:])
        case.check_answers()


def case_what_is_no_continuation_runs_by_itself(random):
    # (start_pos, rows, wanted) of what waits, and of the runs that it makes.
    for waiting, runs in (
            # The cache is cut: into the first step, before both, and to the same step again.
            ([(0, 8, NONE), (5, 4, LAST)], [(0, 8, NONE), (5, 4, LAST)]),
            ([(0, 8, NONE), (8, 8, NONE), (0, 3, NONE), (3, 2, ALL)],
             [(0, 16, NONE), (0, 5, ALL)]),
            ([(0, 8, NONE), (0, 8, NONE)], [(0, 8, NONE), (0, 8, NONE)]),
            # A gap, which the body refuses.
            ([(0, 8, NONE), (9, 4, LAST)], [(0, 8, NONE), (9, 4, LAST)]),
            # Goes on after the first step, but the second one is between them.
            ([(0, 8, NONE), (4, 2, NONE), (8, 8, LAST)],
             [(0, 8, NONE), (4, 2, NONE), (8, 8, LAST)]),
            # Rows are wanted.
            ([(0, 8, LAST), (8, 4, NONE)], [(0, 8, LAST), (8, 4, NONE)]),
            ([(0, 8, ALL), (8, 4, NONE), (12, 2, LAST)], [(0, 8, ALL), (8, 6, LAST)]),
            # 20 rows are the most.
            ([(0, 8, NONE), (8, 12, NONE), (20, 2, LAST)], [(0, 20, NONE), (20, 2, LAST)]),
            ([(0, 8, NONE), (8, 13, NONE), (21, 7, LAST)], [(0, 8, NONE), (8, 20, LAST)]),
            # Single rows: the last token of a prompt is one of its rows, a step of one is none.
            ([(0, 8, NONE), (8, 1, LAST)], [(0, 9, LAST)]),
            ([(0, 1, NONE), (1, 1, NONE), (2, 4, NONE), (6, 1, LAST)],
             [(0, 1, NONE), (1, 1, NONE), (2, 5, LAST)])):
        case = Case(random, max_rows=20)
        session = case.session()
        for step in waiting:
            case.step(session, *step)
        assert case.run() == [[(session.body, *step)] for step in runs], (waiting, case.body.runs)
        case.check_answers()


def case_sessions_are_kept_apart(random):
    case = Case(random)
    a, b, c = case.session(), case.session(), case.session()
    case.step(a, 0, 8)
    case.step(b, 0, 5)
    case.step(c, 0, 1, LAST)
    case.step(b, 8, 2)           # where a's first step ends, not b's
    case.step(a, 8, 4, LAST)
    case.step(b, 5, 3, LAST)
    assert case.run() == [[(a.body, 0, 12, LAST), (b.body, 0, 5, NONE), (c.body, 0, 1, LAST)],
                          [(b.body, 8, 2, NONE)], [(b.body, 5, 3, LAST)]]
    case.check_answers()


def case_an_abandoned_step_ends_what_runs_together(random):
    case = Case(random)
    a, b, c = case.session(), case.session(), case.session()
    steps = [case.step(session, at, 4) for session in (a, b, c) for at in (0, 4, 8)]
    case.abandoned = {steps[1], steps[3], steps[8]}
    runs = case.run()
    # Without the dropped rows there is nothing that the third step of a, or the second of b, could
    # go on from.
    assert runs == [[(a.body, 0, 4, NONE), (c.body, 0, 8, NONE)],
                    [(a.body, 8, 4, NONE), (b.body, 4, 8, NONE)]], runs
    assert {job for job in case.jobs if job.dropped} == case.abandoned
    assert steps[2].step.error.code == INVALID_ARGUMENT
    case.check_answers()


def case_an_error_reaches_all(random):
    for broken in (None, RuntimeError("as asked"), BodyLost("as asked")):
        case = Case(random)
        a, b = case.session(), case.session()
        case.body.full, case.body.broken = {a.body}, broken
        steps = [case.step(a, 0, 8), case.step(a, 8, 8), case.step(a, 16, 8, LAST)]
        other = case.step(b, 0, 2, LAST)
        lost = isinstance(broken, BodyLost)  # in the run that the others waited for
        assert case.run() == ([] if lost else [[(a.body, 0, 24, LAST), (b.body, 0, 2, LAST)]])
        code = INTERNAL if broken else RESOURCE_EXHAUSTED
        for job in steps:
            assert job.step.error.code == code and job.step.out is None
        if broken:
            assert other.step.error.code == INTERNAL and other.step.out is None
            assert all(level == "error" and "as asked" in text for level, text in case.log)
            assert len(case.lost) == lost and len(case.log) == (1 if lost else 2)
        else:
            assert other.step.error is None and len(other.step.out) == 1 and not case.log


def case_a_release_that_fails_ends_what_is_run(random):
    case = Case(random)
    a, b = case.session(), case.session()
    case.body.full = {a.body}
    case.scheduler.release(a.body)
    waiting = [case.step(b, 0, 8, LAST), case.step(b, 8, 8, LAST)]
    case.scheduler.release(a.body)  # nothing is released any more
    assert case.run() == []
    for job in waiting:
        assert job.step.error.code == INTERNAL and "as asked" not in job.step.error.message
    assert len(case.lost) == 1
    assert case.log == [("error", "the body failed: RuntimeError: as asked")]


def case_random_steps_are_answered_as_if_alone(random):
    merged = 0
    for held in [True, False] * 20:
        case = Case(random, max_rows=int(random.integers(4, 40)))
        if not held:  # steps come while others run
            case.body.go.set()
        sessions = [case.session() for _ in range(3)]
        ends = {session: 0 for session in sessions}
        for _ in range(40):
            session = sessions[random.integers(len(sessions))]
            start = ends[session]
            if random.random() < 0.2:  # cut, or beyond the end
                start = max(0, start + int(random.integers(-6, 2)))
            rows = int(random.choice([1, 2, 3, 4]))
            case.step(session, start, rows, int(random.choice([NONE, NONE, NONE, LAST, ALL])))
            if start <= ends[session]:
                ends[session] = start + rows
        merged += len(case.jobs) - 1 - sum(map(len, case.run()))
        case.check_answers()
    assert merged > 0


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}", flush=True)
    random = np.random.default_rng(seed)
    cases = [(name, case) for name, case in globals().items() if name.startswith("case_")]
    for name, case in cases:
        case(random)
        print(f"ok {name[5:]}", flush=True)


if __name__ == "__main__":
    main()
