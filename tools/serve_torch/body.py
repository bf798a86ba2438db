"""The transformer layers behind the server: hidden states in, normed last hidden states out.

The counterpart of engine/body.h. Any class with these methods can be served: torch_body.py in
earnest, a few lines of numpy in the tests.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Codes of an Error frame (docs/protocol.md); gRPC's numbers.
INVALID_ARGUMENT = 3
NOT_FOUND = 5
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
INTERNAL = 13

WANTED_NONE, WANTED_LAST, WANTED_ALL = 0, 1, 2
EXIT_SERVER = 3  # of the program, after a failure that is not its user's


class StepError(Exception):
    """One request's failure; the session and the connection go on."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


class BodyLost(Exception):
    """The body can run nothing any more: the server ends. One sentence for the log."""


class LoadError(Exception):
    """The body cannot be served; one sentence for the user."""


@dataclass
class BodyInfo:
    description: str          # for logs and for Opened.body
    hidden_size: int          # H
    max_context: int          # positions that a session may hold
    kv_bytes_per_token: int   # over all layers
    model_fingerprint: bytes = bytes(32)  # zero for a checkpoint that engine_prep did not write
    cloak_commitment: bytes = bytes(32)
    spares_processors: bool = False  # the layers run elsewhere than on this machine's processors


@dataclass
class BodyStep:
    session: object           # made by the same Body
    start_pos: int            # <= its kv_len; the cache is cut to it first
    states: np.ndarray        # [rows, H] float32, finite; until run() returns
    wanted: int
    out: np.ndarray | None = None    # [0 | 1 | rows, H] float32, set by run()
    error: StepError | None = None   # instead of `out`


class Body(ABC):
    """run() and release() are called on one thread, new_session() perhaps on another. A release()
    that raises leaves a body that is not used again, a run() only if that is BodyLost."""

    info: BodyInfo

    @abstractmethod
    def new_session(self):
        """An object with `kv_len`, the number of positions held."""

    @abstractmethod
    def release(self, session) -> None:
        """Wipes and frees the session's cache."""

    @abstractmethod
    def run(self, steps: list[BodyStep]) -> None:
        """Runs every step, each of another session, each with its own `out` or `error`."""

    def close(self) -> None:
        """After the last run."""


def body_failed(error: Exception, log: Callable[[str, str], None]) -> StepError:
    """For the steps of a run() that raised, a fault of ours or of the device: they learn no
    details."""
    kind = "" if isinstance(error, BodyLost) else f"{type(error).__name__}: "
    log("error", f"the body failed: {kind}{error}")
    return StepError(INTERNAL, "the body failed; the server's log says why")


def check_positions(step: BodyStep, kv_len: int, max_context: int) -> None:
    """What only the body can know of a step: raises INVALID_ARGUMENT."""
    if step.start_pos > kv_len:
        raise StepError(INVALID_ARGUMENT, f"the step starts at position {step.start_pos}, "
                                          f"but the session holds {kv_len}")
    end = step.start_pos + len(step.states)
    if end > max_context:
        raise StepError(INVALID_ARGUMENT, f"the step ends at position {end}, "
                                          f"beyond the context of {max_context}")


def read_manifest(folder: Path) -> tuple[bytes, bytes]:
    """Model fingerprint and cloak commitment from infemeral.json; zero where there is none."""
    file = folder / "infemeral.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return bytes(32), bytes(32)
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {file}: {error}") from None
    values = []
    for name in ("model_fingerprint", "cloak_commitment"):
        text = manifest.get(name) if isinstance(manifest, dict) else None
        try:
            value = bytes.fromhex(text) if isinstance(text, str) and len(text) == 64 else b""
        except ValueError:
            value = b""
        if len(value) != 32:
            raise LoadError(
                f"{file}: {name} is not 64 hexadecimal digits; run engine_prep again")
        values.append(value)
    return values[0], values[1]
