"""engine_serve in front of a body: it speaks with the clients, and this process runs the layers.

It is a child of this process, with a socket between them and memory for rows that both have mapped;
tools/worker_body.h draws what goes over them.
"""

import argparse
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable

import numpy as np

from .body import (EXIT_SERVER, Body, BodyInfo, BodyLost, BodyStep, LoadError, StepError,
                   body_failed)

MAGIC, VERSION = 0x57464e49, 2
HELLO = struct.Struct("=IIIIQ32s32sII")
SETUP = struct.Struct("=IIIIQ")
MESSAGE = struct.Struct("=IIQ")
RUN, RAN, RELEASE = 1, 2, 3
STEP = np.dtype([("session", "u8"), ("start_pos", "u4"), ("rows", "u4"), ("wanted", "u4"),
                 ("unused", "u4")])
RESULT = np.dtype([("code", "u4"), ("kv_len", "u4"), ("message", "S248")])
MAX_TEXT_BYTES = 512
AWAKE_SECONDS = 0.002
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Area:
    """The memory that both processes have, as arrays."""

    def __init__(self, descriptor: int, max_rows: int, hidden_size: int, size: int):
        memory = mmap.mmap(descriptor, size)
        end = 0

        def part(dtype, *shape: int) -> np.ndarray:
            nonlocal end
            array = np.ndarray(shape, dtype, memory, end)
            end = -(-(end + array.nbytes) // 64) * 64
            return array

        self.steps = part(STEP, max_rows)
        self.results = part(RESULT, max_rows)
        self.codes, self.kv_lens = self.results["code"], self.results["kv_len"]
        self.states = part(np.float32, max_rows, hidden_size)
        self.out = part(np.float32, max_rows, hidden_size)
        if end != size:
            raise LoadError("engine_serve and serve_torch are not of the same release")


class Worker:
    """Runs what engine_serve asks for, on the thread that calls serve()."""

    def __init__(self, body: Body, channel: socket.socket, area: Area,
                 log: Callable[[str, str], None]):
        self._body = body
        self._channel = channel
        self._area = area
        self._log = log
        self._sessions = {}

    def serve(self) -> None:
        """Until engine_serve has ended."""
        message = bytearray(MESSAGE.size)
        while self._receive(message) > 0:
            kind, count, number = MESSAGE.unpack(message)
            if kind == RELEASE:
                session = self._sessions.pop(number, None)
                if session is not None:
                    self._body.release(session)
            else:
                self._run(count)
                self._channel.send(MESSAGE.pack(RAN, count, number))

    def _receive(self, message: bytearray) -> int:
        """A session that decodes asks again soon, and a process that sleeps is awake 100 us late:
        so this one looks by itself for as long as a token takes the client and the network."""
        end = time.monotonic() + AWAKE_SECONDS
        while time.monotonic() < end:
            try:
                return self._channel.recv_into(message, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
        return self._channel.recv_into(message)

    def _run(self, count: int) -> None:
        area, steps, firsts, first = self._area, [], [], 0
        for number, start_pos, rows, wanted, _ in area.steps[:count].tolist():
            step = BodyStep(self._sessions.get(number), start_pos,
                            area.states[first:first + rows], wanted)
            if step.session is None:
                try:
                    step.session = self._sessions[number] = self._body.new_session()
                except StepError as error:
                    step.error = error
            steps.append(step)
            firsts.append(first)
            first += rows
        ready = [step for step in steps if step.error is None]
        try:
            self._body.run(ready)
        except BodyLost:
            raise
        except Exception as error:
            failed = body_failed(error, self._log)
            for step in ready:
                step.error = failed
        for i, step in enumerate(steps):
            if step.error is None:
                area.out[firsts[i]:firsts[i] + len(step.out)] = step.out
                area.codes[i], area.kv_lens[i] = 0, step.session.kv_len
            else:
                kv_len = 0 if step.session is None else step.session.kv_len
                area.results[i] = (step.error.code, kv_len, step.error.message.encode())


def hello(info: BodyInfo) -> bytes:
    return HELLO.pack(MAGIC, VERSION, info.hidden_size, info.max_context, info.kv_bytes_per_token,
                      info.model_fingerprint, info.cloak_commitment,
                      int(info.spares_processors), 0) + info.description.encode()[:MAX_TEXT_BYTES]


def receive_area(channel: socket.socket, hidden_size: int) -> Area | None:
    """None when engine_serve ends instead."""
    data, descriptors, _, _ = socket.recv_fds(channel, SETUP.size, 1)
    if not data:
        return None
    try:
        magic, version, max_rows, _, size = SETUP.unpack(data)
        if (magic, version) != (MAGIC, VERSION) or len(descriptors) != 1:
            raise LoadError("engine_serve and serve_torch are not of the same release")
        return Area(descriptors[0], max_rows, hidden_size, size)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def command(options: argparse.Namespace, descriptor: int) -> list[str]:
    """engine_serve with what this program's options say to it."""
    flags = [f"--worker={descriptor}"]
    for name in ("listen", "identity", "tls-cert", "tls-key", "tls-client-ca", "metrics",
                 "max-sessions", "max-sessions-per-client", "max-kv-mib"):
        value = getattr(options, name.replace("-", "_"))
        if value != "":
            flags.append(f"--{name}={value}")
    flags += [f"--allow={value}" for value in options.allow]
    flags += [f"--{name}" for name in ("quiet", "verbose") if getattr(options, name)]
    return [options.front, *flags]


def check_program(name: str) -> None:
    if shutil.which(name) is None:
        raise LoadError(f"--front {name}: no such program; give the path of engine_serve")


class Front:
    """engine_serve as a child process, to which signals of this one are passed on."""

    def __init__(self, options: argparse.Namespace, descriptor: int):
        # Python's own handlers wait for the main thread, which may be long in a step.
        self._signals, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.detach())
        # Until it waits for them, the child must not end by them: it inherits the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        # Its options are all on the command line, and this program's are not all its own.
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith("INFEMERAL_")}
        try:
            # A session of its own: what a terminal or torchrun sends to the group comes from here.
            self._child = subprocess.Popen(command(options, descriptor), pass_fds=(descriptor,),
                                           env=environment, start_new_session=True)
        except OSError as error:
            raise LoadError(f"cannot start {options.front}: {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=self._pass_on_signals, daemon=True).start()

    def _pass_on_signals(self) -> None:
        ending = False
        while True:
            for number in self._signals.recv(64):
                self._child.send_signal(number)
                if number != signal.SIGHUP:
                    if ending:  # the second one does not wait; engine_serve ends by itself
                        os._exit(128 + number)
                    ending = True

    def wait(self) -> int:
        return self._child.wait()


def serve(options: argparse.Namespace, body: Body, log: Callable[[str, str], None]) -> int:
    """The exit code, once engine_serve has ended."""
    area = None
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        channel.send(hello(body.info))
        front = Front(options, theirs.fileno())
    try:
        area = receive_area(channel, body.info.hidden_size)
        if area is not None:
            Worker(body, channel, area, log).serve()
    except ConnectionError:
        pass  # as the end of what it sends
    except LoadError:
        raise
    except Exception as error:
        body_failed(error, log)
    finally:
        channel.close()  # should anything have failed here, it ends too
        code = front.wait()
    if code < 0:
        log("error", f"{options.front} was ended by {signal.Signals(-code).name}")
        return EXIT_SERVER
    if code == 0 and area is None:
        raise LoadError(f"{options.front} is not engine_serve of this release")
    return code
