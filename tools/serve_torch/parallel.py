"""The same step on every rank of a tensor-parallel group.

Under torchrun each process holds its share of every layer. Rank 0 serves; before it computes, it
sends the step to the others, who wait for nothing else.

A rank that fails in the middle of a step leaves the others in a collective for ever. So it ends,
and torchrun then ends them.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from .body import EXIT_SERVER, BodyLost
from .torch_model import TorchModel

STOP, RUN, WIPE = 0, 1, 2


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def start(device_type: str) -> None:
    # The others wait in a broadcast for as long as no client asks: that is no fault.
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo",
                            timeout=timedelta(days=365))


def end(model: TorchModel) -> None:
    # NCCL waits for every graph that has captured one of its operations.
    model.drop_graphs()
    dist.destroy_process_group()


def smallest(value: int, device: torch.device) -> int:
    """Of all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor.item())


class RankZero:
    """What the body calls: the model, on all ranks."""

    def __init__(self, model: TorchModel):
        self._model = model
        self._alone = world_size() == 1
        self._lost = False

    @contextlib.contextmanager
    def _together(self):
        """Around what all ranks do."""
        try:
            yield
        except Exception as error:
            if self._alone:
                raise
            self._lost = True
            raise BodyLost(f"rank 0 failed while the others wait for it: {type(error).__name__}: "
                           f"{error}") from error

    def _send(self, kind: int, shape: tuple[int, ...], integers: np.ndarray) -> None:
        device = self._model.device
        dist.broadcast(torch.tensor([kind, *shape, integers.size], device=device), 0)
        if integers.size > 0:
            dist.broadcast(torch.from_numpy(integers).to(device), 0)

    def run(self, states, positions, slots, table, back: int) -> np.ndarray:
        with self._together():
            if not self._alone:
                b, t, _ = states.shape
                integers = np.concatenate([x.reshape(-1) for x in (positions, slots, table)])
                self._send(RUN, (b, t), integers)
                dist.broadcast(torch.from_numpy(states).to(self._model.device), 0)
            return self._model.run(states, positions, slots, table, back)

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    def device_works(self) -> bool:
        return self._model.device_works()

    @property
    def decodes(self) -> bool:
        """Whether single rows may go the short way."""
        return self._alone and self._model.has_graphs

    def decode(self, rows, positions, tables, back: int) -> np.ndarray:
        return self._model.decode(rows, positions, tables, back)

    def wipe(self, pages: np.ndarray) -> None:
        with self._together():
            if not self._alone:
                self._send(WIPE, (0, 0), pages)
            self._model.wipe(pages)

    def stop(self) -> None:
        if self._lost:
            os._exit(EXIT_SERVER)  # Python's own end waits for what the device still has to do
        if not self._alone:
            with self._together():
                self._send(STOP, (0, 0), np.empty(0, np.int64))
                end(self._model)


def follow(model: TorchModel, log: Callable[[str, str], None]) -> None:
    """The other ranks; returns when rank 0 stops."""
    try:
        _follow(model)
    except Exception as error:
        log("error", f"rank {rank()} failed: {type(error).__name__}: {error}")
        os._exit(EXIT_SERVER)


def _follow(model: TorchModel) -> None:
    # torchrun passes signals on to every rank: rank 0 still answers what is pending.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        header = torch.empty(4, dtype=torch.int64, device=model.device)
        dist.broadcast(header, 0)
        kind, b, t, count = header.tolist()
        if kind == STOP:
            end(model)
            return
        integers = torch.empty(count, dtype=torch.int64, device=model.device)
        dist.broadcast(integers, 0)
        integers = integers.cpu().numpy()
        if kind == WIPE:
            model.wipe(integers)
            continue
        states = torch.empty((b, t, model.hidden_size), device=model.device)
        dist.broadcast(states, 0)
        positions, slots, table = np.split(integers, [b * t, 2 * b * t])
        model.run(states.cpu().numpy(), positions.reshape(b, t), slots.reshape(b, t),
                  table.reshape(b, -1), back=0)
