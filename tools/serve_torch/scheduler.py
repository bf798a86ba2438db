"""The body's one thread (net/scheduler.h): takes the steps of all connections, runs them together.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .body import WANTED_NONE, Body, BodyLost, BodyStep, StepError, body_failed


@dataclass(eq=False)
class ServedSession:
    """A session as the server holds it; on the event loop's thread."""

    body: object
    lease: object
    steps: int = 0       # submitted, not yet done
    closed: bool = False


@dataclass(eq=False)
class StepJob:
    session: ServedSession
    step: BodyStep
    abandoned: Callable[[], bool]     # asked right before the run; then the step is dropped
    done: Callable[["StepJob"], None]  # on the event loop, also for a step that was dropped
    dropped: bool = False
    compute_ms: float = 0.0           # of the run; 0 where the step ran as part of an earlier one

    @property
    def end(self) -> int:
        """The session's positions after the step."""
        return self.step.start_pos + len(self.step.states)


class Chain:
    """Waiting steps of one session that are one step to the body: each goes on where the one
    before it ends, and only the last wants rows. A long prompt comes in small steps, so that a slow
    line soon carries one; where the line is faster than the body they wait here, and a pass over
    the weights for each of them would be wasted."""

    def __init__(self, first: StepJob):
        self.jobs = [first]
        self.rows = len(first.step.states)

    def takes(self, job: StepJob, max_rows: int) -> bool:
        last = self.jobs[-1]
        return (last.step.wanted == WANTED_NONE and job.step.start_pos == last.end
                and self.rows + len(job.step.states) <= max_rows
                # Single rows have a faster path in the body, which two of them would leave.
                and self.rows > 1)

    def append(self, job: StepJob) -> None:
        self.jobs.append(job)
        self.rows += len(job.step.states)

    def body_step(self) -> BodyStep:
        first, last = self.jobs[0].step, self.jobs[-1].step
        if first is last:
            return first
        states = np.concatenate([job.step.states for job in self.jobs])
        return BodyStep(first.session, first.start_pos, states, last.wanted)

    def share(self, ran: BodyStep) -> None:
        """To each step what it would have got alone."""
        for job in self.jobs:
            job.step.error = ran.error
            if ran.error is None:
                rows = 0 if job.step.wanted == WANTED_NONE else len(job.step.states)
                job.step.out = ran.out[max(0, len(ran.out) - rows):]


@dataclass
class Scheduler:
    body: Body
    loop: asyncio.AbstractEventLoop
    log: Callable[[str, str], None]
    max_rows: int  # of a step to the body
    on_lost: Callable[[], None]  # on the event loop: no step is run any more, all of them fail
    _waiting: dict[ServedSession, deque[StepJob]] = field(default_factory=dict)
    _released: list = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stop: bool = False
    _lost: StepError | None = None

    def __post_init__(self):
        self._thread = threading.Thread(target=self._run, name="body")
        self._thread.start()

    def submit(self, job: StepJob) -> None:
        with self._changed:
            self._waiting.setdefault(job.session, deque()).append(job)
            self._changed.notify()

    def release(self, body_session) -> None:
        """No step of it waits or runs."""
        with self._changed:
            self._released.append(body_session)
            self._changed.notify()

    def close(self) -> None:
        """Finishes the run in progress and drops what waits. Blocks."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _take_batch(self) -> tuple[list[Chain], list[StepJob]]:
        """Of every session its oldest waiting step, as a run must not hold two of one session, and
        what can be one step with it; apart from them, steps that nobody waits for any more."""
        chains, dropped = [], []
        for session, jobs in list(self._waiting.items()):
            chain = None
            while jobs and (chain is None or chain.takes(jobs[0], self.max_rows)):
                job = jobs.popleft()
                job.dropped = job.abandoned()
                if job.dropped:
                    dropped.append(job)
                    break
                if chain is None:
                    chain = Chain(job)
                    chains.append(chain)
                else:
                    chain.append(job)
            if not jobs:
                del self._waiting[session]
        return chains, dropped

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._waiting or self._released)
                if self._stop:
                    return
                released, self._released = self._released, []
            self._release_body(released)
            with self._changed:
                chains, dropped = self._take_batch()
            if chains:
                self._run_body(chains)
            done = [job for chain in chains for job in chain.jobs] + dropped
            if done:
                self.loop.call_soon_threadsafe(self._deliver, done)

    def _release_body(self, sessions: list) -> None:
        try:
            for session in sessions if self._lost is None else ():
                self.body.release(session)
        except Exception as error:
            self._lose(body_failed(error, self.log))

    def _lose(self, failed: StepError) -> None:
        self._lost = failed
        self.loop.call_soon_threadsafe(self.on_lost)

    def _run_body(self, chains: list[Chain]) -> None:
        start = time.perf_counter()
        failed = self._lost
        try:
            if failed is None:
                steps = [chain.body_step() for chain in chains]
                self.body.run(steps)
                for chain, step in zip(chains, steps):
                    chain.share(step)
        except Exception as error:
            failed = body_failed(error, self.log)
            if isinstance(error, BodyLost):
                self._lose(failed)
        if failed is not None:
            for job in (job for chain in chains for job in chain.jobs):
                job.step.out = None
                job.step.error = failed
        elapsed = 1000 * (time.perf_counter() - start)
        for chain in chains:
            # The answers leave together, so the client has waited for the first of them; and it
            # takes no more of a wait for compute than the wait was long.
            chain.jobs[0].compute_ms = elapsed

    @staticmethod
    def _deliver(batch: list[StepJob]) -> None:
        for job in batch:
            job.done(job)
