"""Signals that come before there is a server: imports take a second, and a large model minutes."""

import contextlib
import os
import signal
from collections.abc import Callable


def write_line(level: str, message: str) -> None:
    """On stderr, past Python's buffers, which a signal's handler might find in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"{level}: {message}\n".encode(errors="replace"))


class EarlySignals:
    """Installs its handlers in the process; the server's own replace them."""

    def __init__(self):
        self.log: Callable[[str, str], None] = write_line  # the console's, once there is one
        self.hangup = False  # the allow list must be read again once there is a server
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        if number == signal.SIGHUP:
            self.hangup = True
            return
        self.log("info", "shutting down")
        # Nothing is owed to anybody yet, and what loads would take an exception for its own.
        os._exit(0)
