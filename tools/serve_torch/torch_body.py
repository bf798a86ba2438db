"""A body on PyTorch: sessions and their pages, and which rows run together."""

import argparse
import contextlib
import heapq
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from . import parallel
from .body import (INVALID_ARGUMENT, RESOURCE_EXHAUSTED, WANTED_ALL, WANTED_NONE, Body, BodyInfo,
                   BodyLost, BodyStep, LoadError, StepError, check_positions, read_manifest)
from .torch_model import ATTENTION, PAGE, ModelOptions, TorchModel, out_of_memory

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Of a GPU's memory that is free once the weights are there: for the KV cache; the rest is for the
# activations of a long step and for the graphs.
CACHE_SHARE = 0.8


def overflow_of(dtype: torch.dtype) -> float:
    """The smallest number that becomes infinite in it: half a step beyond its largest one."""
    info = torch.finfo(dtype)
    return info.max / (2 - info.eps) * (2 - info.eps / 2)


class Session:
    def __init__(self):
        self.kv_len = 0
        self.pages: list[int] = []  # position p is in pages[p // PAGE]


class TorchBody(Body):
    def __init__(self, info: BodyInfo, ranks: parallel.RankZero, pages: int, max_batch: int):
        """`pages` of the KV cache; 0: it grows as needed."""
        self.info = info
        self._ranks = ranks
        self._max_batch = max_batch
        self._overflow = overflow_of(ranks.dtype)
        self._grows = pages == 0
        self._n_pages = max(pages, 1)
        # A heap, as a cache grows to the highest page in use; page 0 belongs to nobody.
        self._free = list(range(1, self._n_pages))

    def new_session(self) -> Session:
        return Session()

    def release(self, session: Session) -> None:
        if session.pages:
            self._ranks.wipe(np.array(session.pages))
            for page in session.pages:
                heapq.heappush(self._free, page)
            session.pages = []
        session.kv_len = 0

    def close(self) -> None:
        self._ranks.stop()

    def run(self, steps: list[BodyStep]) -> None:
        ready = [step for step in steps if self._prepare(step)]
        single = [step for step in ready if len(step.states) == 1]
        groups = [single[i:i + self._max_batch] for i in range(0, len(single), self._max_batch)]
        groups += [[step] for step in ready if len(step.states) > 1]
        for group in groups:
            try:
                rows = self._forward(group)
            except BodyLost:
                raise
            except Exception as error:
                if out_of_memory(error):
                    for step in group:
                        step.error = StepError(RESOURCE_EXHAUSTED, "the server's device has no "
                                               "memory left for this step; try again later, or "
                                               "with a shorter prompt")
                    continue
                if not self._ranks.device_works():
                    raise BodyLost(f"the device can be used no more: {error}") from error
                raise
            for step, out in zip(group, rows):
                step.session.kv_len = step.start_pos + len(step.states)
                step.out = (out if step.wanted == WANTED_ALL else
                            out[:0] if step.wanted == WANTED_NONE else out[-1:])

    def _prepare(self, step: BodyStep) -> bool:
        """Cuts the session's cache and takes the pages that the step needs."""
        session = step.session
        try:
            check_positions(step, session.kv_len, self.info.max_context)
            if np.abs(step.states).max() >= self._overflow:
                raise StepError(INVALID_ARGUMENT, "the step holds a value that is not finite in "
                                                  "the body's number format")
            missing = -(-(step.start_pos + len(step.states)) // PAGE) - len(session.pages)
            if self._grows and missing > len(self._free):
                grown = self._n_pages + missing
                self._free += range(self._n_pages, grown)  # higher than all of the heap
                self._n_pages = grown
            if missing > len(self._free):
                raise StepError(RESOURCE_EXHAUSTED, "the server's memory for KV caches is full; "
                                                    "try again later, or with a shorter prompt")
        except StepError as error:
            step.error = error
            return False
        session.pages += [heapq.heappop(self._free) for _ in range(missing)]
        session.kv_len = step.start_pos
        return True

    def _forward(self, group: list[BodyStep]) -> np.ndarray:
        """[B, the most rows that one of them wants, H]; all steps of a group have as many rows."""
        rows = len(group[0].states)
        if rows == 1 and self._ranks.decodes:
            back = int(any(step.wanted != WANTED_NONE for step in group))
            return self._ranks.decode([step.states for step in group],
                                      [step.start_pos for step in group],
                                      [step.session.pages for step in group], back).copy()
        back = max({WANTED_ALL: rows, WANTED_NONE: 0}.get(step.wanted, 1) for step in group)
        ends = [step.start_pos + rows for step in group]
        positions = np.array([[end - rows] for end in ends]) + np.arange(rows)
        table = np.zeros((len(group), -(-max(ends) // PAGE)), np.int64)
        for i, step in enumerate(group):
            used = -(-ends[i] // PAGE)
            table[i, :used] = step.session.pages[:used]
        pages = table[np.arange(len(group))[:, None], positions // PAGE]
        slots = pages * PAGE + positions % PAGE
        states = np.stack([step.states for step in group])
        # A copy: the model uses its memory again.
        return self._ranks.run(states, positions, slots, table, back).copy()


# ---- loading ----


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise LoadError("PyTorch finds no GPU; --device cpu runs without one")
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise LoadError(f"PyTorch finds {count} GPUs on this host, and every process takes "
                            f"one; give torchrun --nproc-per-node {count}")
        torch.cuda.set_device(local)
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def choose_decode(name: str, device: torch.device) -> str:
    if device.type == "cuda":
        if name == "auto":
            return "compile" if parallel.world_size() == 1 else "graph"
        return name
    if name == "graph":
        raise LoadError("--decode graph needs a GPU")
    return "eager" if name == "auto" else name


@contextlib.contextmanager
def memory_for(what: str):
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise LoadError(f"there is no memory for {what}") from None


def load_weights(folder: Path, dtype: str, device: torch.device,
                 architecture=transformers.AutoModel) -> torch.nn.Module:
    """The checkpoint through transformers; its share of it on a rank of several."""
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} has no config.json; is it the body folder that engine_prep "
                        "wrote?")
    settings = {"dtype": DTYPES.get(dtype, "auto"), "attn_implementation": ATTENTION,
                "local_files_only": True, "output_loading_info": True}
    if parallel.world_size() > 1:
        parallel.start(device.type)
        from transformers.distributed import DistributedConfig
        settings["distributed_config"] = DistributedConfig(tp_plan="auto")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with memory_for(f"the weights of {folder}; torchrun shares them among several GPUs "
                    "(docs/scaling.md)"):
        try:
            model, loading = architecture.from_pretrained(folder, **settings)
        except Exception as error:  # of many kinds, from several libraries
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise LoadError(f"transformers cannot load {folder}: {lines[0]}") from error
        if parallel.world_size() == 1:
            model = model.to(device)
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, loading.get(what) or ()))
        # The embedding table is the client's: no row of it is asked for here.
        names = [name for name in names if "embed_tokens" not in name]
        if names:
            raise LoadError(f"{folder} is no whole checkpoint: {what.replace('_', ' ')} "
                            f"{', '.join(names[:3])}")
    return model


def context_of(config, asked: int, folder: Path) -> int:
    limit = config.max_position_embeddings
    if asked > limit:
        raise LoadError(f"a context of {asked} positions was asked for; the model in {folder} has "
                        f"{limit}")
    context = asked or limit
    types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in types if types else window is not None
    if slides and window is not None and window < context:
        raise LoadError(f"the model in {folder} has sliding-window attention, which is the same as "
                        f"full attention up to {window} positions only: give --max-context "
                        f"{window}, or use engine_serve")
    return context


def cache_pages(options: argparse.Namespace, context: int, page_bytes: int,
                device: torch.device) -> int:
    """`page_bytes` over all ranks, as --max-kv-mib is; each has its share of every page."""
    if device.type != "cuda":
        return 0
    # A session rounds up to whole pages; page 0 is nobody's.
    most = options.max_sessions * -(-context // PAGE) + 1
    room = parallel.world_size() * int(CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    free = room // page_bytes
    if options.max_kv_mib > 0:
        asked = (options.max_kv_mib << 20) // page_bytes + options.max_sessions + 1
        if asked > free + options.max_sessions + 1 and most > free:
            raise LoadError(f"--max-kv-mib {options.max_kv_mib}: beside the weights there is room "
                            f"for {free * page_bytes >> 20} MiB")
        most = min(most, asked)
    pages = parallel.smallest(min(most, free), device)
    if pages < 2:
        raise LoadError("the GPU has no memory left for KV caches")
    return pages


def load_body(folder: Path, options: argparse.Namespace,
              log: Callable[[str, str], None]) -> TorchBody | None:
    """None on a rank that followed rank 0 to its end."""
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    decode = choose_decode(options.decode, device)
    fingerprint, commitment = read_manifest(folder)
    model = load_weights(folder, options.dtype, device)
    config = model.config
    context = context_of(config, options.max_context, folder)
    head_dim = model.layers[0].self_attn.head_dim
    world = parallel.world_size()
    if config.num_key_value_heads % world != 0:
        raise LoadError(f"the model's {config.num_key_value_heads} key-value heads cannot be "
                        f"shared evenly by {world} ranks")
    kv_bytes = (2 * len(model.layers) * config.num_key_value_heads * head_dim
                * model.dtype.itemsize)
    pages = cache_pages(options, context, kv_bytes * PAGE, device)
    if decode != "eager":
        log("info", f"preparing graphs ({decode})")
    with memory_for("KV caches and graphs beside the weights; a smaller --max-kv-mib, "
                    "--max-context or --max-batch takes less"):
        torch_model = TorchModel(model,
                                 ModelOptions(decode, options.max_batch, context, pages, log))
    if parallel.rank() != 0:
        parallel.follow(torch_model, log)
        return None
    dtype = next(name for name, value in DTYPES.items() if value == model.dtype)
    where = f"{world} x {device.type}" if world > 1 else device.type
    info = BodyInfo(f"{config.model_type} {len(model.layers)} layers {dtype}, PyTorch on {where}",
                    config.hidden_size, context, kv_bytes, fingerprint, commitment,
                    spares_processors=device.type != "cpu")
    return TorchBody(info, parallel.RankZero(torch_model), pages, options.max_batch)
