#!/usr/bin/env python3
"""What of a step's result tools/serve_torch brings from the device to the host: the rows that are
wanted, the same ones as if all were, and nothing where nobody reads them. That the graphs give what
the layers give without them; on a CPU, where there are none, their steps are computed instead of
replayed. And that what is not finite stays with those who sent it.

The layers are transformers', with random weights. A case prints `skipped:` where PyTorch is not
installed.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from serve_torch.body import (INVALID_ARGUMENT, RESOURCE_EXHAUSTED, WANTED_ALL,  # noqa: E402
                              WANTED_LAST, WANTED_NONE, BodyInfo, BodyLost, BodyStep)

NONE, LAST, ALL = WANTED_NONE, WANTED_LAST, WANTED_ALL
HIDDEN, CONTEXT, MAX_BATCH = 32, 256, 4


def make_body(decode, device, seed, dtype="float32"):
    import torch
    import transformers
    from serve_torch import parallel
    from serve_torch.torch_body import TorchBody
    from serve_torch.torch_model import ATTENTION, PAGE, ModelOptions, TorchModel

    class Watched(parallel.RankZero):
        """Keeps the number of rows that each run brought back, of all steps together."""

        def __init__(self, model):
            super().__init__(model)
            self.back = []

        def run(self, *step):
            out = super().run(*step)
            self.back.append(out.shape[0] * out.shape[1])
            return out

        def decode(self, *step):
            out = super().decode(*step)
            self.back.append(out.shape[0] * out.shape[1])
            return out

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=4, max_position_embeddings=CONTEXT)
    config._attn_implementation = ATTENTION
    model = transformers.AutoModel.from_config(config).to(device, getattr(torch, dtype))
    pages = 0 if device == "cpu" else 4 * MAX_BATCH * -(-CONTEXT // PAGE) + 1
    torch_model = TorchModel(model, ModelOptions(decode, MAX_BATCH, CONTEXT, pages,
                                                 lambda level, message: None))
    if decode == "graph" and device == "cpu":
        add_graphs(torch_model)
    ranks = Watched(torch_model)
    return TorchBody(BodyInfo("random", HIDDEN, CONTEXT, 1), ranks, pages, MAX_BATCH), ranks


def add_graphs(model):
    """Those of a GPU, with the step computed where they would be replayed."""
    import torch
    from serve_torch.torch_model import StepGraph

    class ComputedGraph(StepGraph):
        @torch.no_grad()
        def start(self):
            self._device.copy_(self._host)
            self.out = self.forward()
            self._result.copy_(self.out[:, -1:])

    torch.cuda.current_stream = lambda: SimpleNamespace(synchronize=lambda: None)
    model._graphs = {(batch, width): ComputedGraph(model, batch, 1, width)
                     for batch in model._batches for width in model._tables}
    model._prompt_graphs = {(rows, 4): ComputedGraph(model, 1, rows, 4) for rows in (32, 128)}


def run(body, steps):
    """Steps of new sessions, each a list of (rows, wanted); what each of them returned."""
    sessions = [body.new_session() for _ in steps]
    starts, results = [0] * len(steps), [[] for _ in steps]
    for turn in range(max(map(len, steps))):
        batch = [(i, BodyStep(sessions[i], starts[i], rows, wanted))
                 for i, (rows, wanted) in ((i, step[turn]) for i, step in enumerate(steps)
                                           if turn < len(step))]
        body.run([step for _, step in batch])
        for i, step in batch:
            assert step.error is None, step.error
            starts[i] += len(step.states)
            results[i].append(step.out)
    for session in sessions:
        body.release(session)
    return results


def check(decode, device, seed):
    """Returns the rows of a prompt."""
    random = np.random.default_rng(seed)
    body, ranks = make_body(decode, device, seed)

    def rows(n):
        return random.standard_normal((n, HIDDEN)).astype(np.float32)

    # A prompt in steps of several rows.
    parts = [rows(n) for n in (3, 70, 9)]
    [whole] = run(body, [[(part, ALL) for part in parts]])
    assert ranks.back == [3, 70, 9] and [len(out) for out in whole] == ranks.back
    ranks.back.clear()
    [wanted] = run(body, [[(parts[0], NONE), (parts[1], LAST), (parts[2], NONE)]])
    assert ranks.back == [0, 1, 0], ranks.back
    assert [out.shape for out in wanted] == [(0, HIDDEN), (1, HIDDEN), (0, HIDDEN)]
    assert np.array_equal(wanted[1][0], whole[1][-1])
    assert np.abs(whole[1]).max() > 0

    # Single rows of several sessions, which run together: one that wants its row brings all.
    firsts = [rows(1) for _ in range(3)]
    ranks.back.clear()
    everyone = run(body, [[(first, ALL)] for first in firsts])
    assert ranks.back == [3]
    ranks.back.clear()
    some = run(body, [[(firsts[0], LAST)], [(firsts[1], NONE)], [(firsts[2], ALL)]])
    assert ranks.back == [3]
    assert [len(out) for [out] in some] == [1, 0, 1]
    assert np.array_equal(some[0][0], everyone[0][0])
    assert np.array_equal(some[2][0], everyone[2][0])
    ranks.back.clear()
    assert all(out.shape == (0, HIDDEN) for [out] in run(body, [[(first, NONE)]
                                                                for first in firsts]))
    assert ranks.back == [0], ranks.back
    # What nobody read was computed all the same: the next row sees it.
    [[_, after]] = run(body, [[(firsts[0], NONE), (firsts[1], LAST)]])
    [[_, same]] = run(body, [[(firsts[0], ALL), (firsts[1], ALL)]])
    [[alone]] = run(body, [[(firsts[1], ALL)]])
    assert np.array_equal(after, same) and not np.array_equal(after, alone)
    body.close()
    return np.concatenate(whole)


def check_what_is_not_finite(decode, device, seed):
    """A client's rows may overflow in the layers. What they leave in the cache, in pages of the
    session and in page 0, is nothing to other sessions, nor to this one once they are cut off."""
    random = np.random.default_rng(seed)
    body, ranks = make_body(decode, device, seed, "float16")

    def rows(n):
        return random.standard_normal((n, HIDDEN)).astype(np.float32)

    def step(session, start, states, wanted=ALL):
        ran = BodyStep(session, start, states, wanted)
        body.run([ran])
        return ran

    session = body.new_session()
    step(session, 0, rows(3))
    for bad in (65520, -1e30):
        for n in (1, 3):
            states = rows(n)
            states[-1, 5] = bad
            refused = step(session, 3, states)
            assert refused.error.code == INVALID_ARGUMENT and refused.out is None
            assert session.kv_len == 3
    states[-1, 5] = 65519  # the next smaller ones are 65504
    assert step(session, 3, states).error is None

    # Nor do rows stay where a graph takes them from.
    for graph in ranks._model._prompt_graphs.values():
        for n in (30, 3, 7):
            step(session, 0, rows(n))
        assert not graph._states[0, :-7].any()

    # In place of an overflow between the layers, which random weights do not give.
    body._overflow = float("inf")
    prompt, other = rows(40), rows(9)
    for n in (1, 40):
        [[kept], [others]] = run(body, [[(prompt, ALL)], [(other, ALL)]])
        session = body.new_session()
        step(session, 0, prompt[:20])
        # Of a prompt's rows the first, which those behind it and those that fill up a graph see.
        poison = rows(n)
        poison[0] = 1e30
        assert not np.isfinite(step(session, 0, poison).out).any()
        assert np.array_equal(run(body, [[(other, ALL)]])[0][0], others)
        [[first]] = run(body, [[(prompt[:1], ALL)]])
        assert np.array_equal(step(session, 0, prompt[:1]).out, first)
        assert np.isfinite(step(session, 1, prompt[1:]).out).all()
        assert np.array_equal(step(session, 0, prompt).out, kept)
        # Single rows together, of sessions with more pages and fewer.
        long = body.new_session()
        step(long, 0, rows(70))
        pair = [BodyStep(session, 40, other[:1], ALL), BodyStep(long, 70, other[:1], ALL)]
        body.run(pair)
        assert all(np.isfinite(one.out).all() for one in pair)
        body.release(session)
        body.release(long)
    body.close()


def check_failures(seed):
    """A run that fails fails its steps, but after a fault of the device nothing else can be run."""
    body, ranks = make_body("eager", "cpu", seed)
    rows = np.ones((2, HIDDEN), np.float32)

    def fail(*_):
        raise RuntimeError("an illegal memory access")

    ranks._model.run = fail
    for works, kind in ((True, RuntimeError), (False, BodyLost)):
        ranks._model.device_works = lambda works=works: works
        try:
            body.run([BodyStep(body.new_session(), 0, rows, ALL)])
            raise AssertionError("no failure")
        except (RuntimeError, BodyLost) as error:
            assert type(error) is kind and "illegal" in str(error), error
    print("ok failures", flush=True)


def check_cache_size():
    """--max-kv-mib is of all ranks together."""
    import torch
    from serve_torch import torch_body
    from serve_torch.body import LoadError

    page_bytes, free = 1 << 20, 125 << 20  # of a page over all ranks; of each GPU

    def pages(mib, world):
        options = SimpleNamespace(max_kv_mib=mib, max_sessions=8)
        with (patch("torch.cuda.mem_get_info", lambda device: (free, free)),
              patch.multiple(torch_body.parallel, world_size=lambda: world,
                             smallest=lambda value, device: value)):
            return torch_body.cache_pages(options, 64 * 1000, page_bytes, torch.device("cuda"))

    for world in (1, 2, 4):
        room = 100 * world  # four fifths of what is free
        assert pages(0, world) == room
        for mib in (50, 90):  # and what whole pages cost 8 sessions
            assert pages(mib, world) == mib + 9
        assert pages(room, world) == room
        try:
            pages(room + 1, world)
            raise AssertionError("not refused")
        except LoadError as error:
            assert str(error).endswith(f"room for {room} MiB"), error
    print("ok size of the cache", flush=True)


def check_a_cache_that_cannot_grow(seed):
    """A session's step is refused; the others, and this one later, go on."""
    import torch
    random = np.random.default_rng(seed)
    body, _ = make_body("eager", "cpu", seed)
    zeros = torch.zeros

    def rows(n):
        return random.standard_normal((n, HIDDEN)).astype(np.float32)

    def memory_for(tensors, size):
        """So many tensors of the cache, none of more pages."""
        left = [tensors]

        def limited(shape, *rest, **named):
            if len(shape) == 4:
                left[0] -= 1
                if left[0] < 0 or shape[0] > size:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to "
                                       "allocate 1 bytes")
            return zeros(shape, *rest, **named)

        return patch("torch.zeros", limited)

    def step(session, start, states):
        ran = BodyStep(session, start, states, ALL)
        body.run([ran])
        return ran

    def pages():
        return {len(getattr(attention, name)) for attention in model._attentions
                for name in ("key_pages", "value_pages")}

    prompt, more = rows(40), rows(200)
    [[kept, after]] = run(body, [[(prompt, ALL), (more[:60], ALL)]])
    body, ranks = make_body("eager", "cpu", seed)
    model = ranks._model
    first, second = body.new_session(), body.new_session()
    assert np.array_equal(step(first, 0, prompt).out, kept) and pages() == {2}
    for _ in range(2):
        with memory_for(3, size=100):  # of the four that both layers have
            assert step(second, 0, more).error.code == RESOURCE_EXHAUSTED
        assert pages() == {2} and second.kv_len == 0
        assert np.array_equal(step(first, 0, prompt).out, kept)
    # A new session takes the page that there is, not one that the refused one gives back.
    body.release(first)
    body.release(second)
    third = body.new_session()
    with memory_for(0, size=0):
        assert np.array_equal(step(third, 0, prompt).out, kept)
    # There is no room for twice as many, but for what is needed.
    with memory_for(100, size=3):
        assert np.array_equal(step(third, 40, more[:60]).out, after)
    assert pages() == {3}
    body.close()
    print("ok a cache that cannot grow", flush=True)


def check_what_does_not_fit(seed):
    """Models that are too large, and more ranks than GPUs, are the user's to know of in a line."""
    import torch
    import transformers
    from serve_torch import torch_body
    from serve_torch.body import LoadError

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def capture(*_):
        try:
            no_room()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def refused(word, call, *given):
        try:
            call(*given)
            raise AssertionError("not refused")
        except LoadError as error:
            assert word in str(error), error

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = SimpleNamespace(device="cpu", dtype="auto", decode="auto", threads=1, max_context=0,
                              max_batch=MAX_BATCH)
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        make_body("eager", "cpu", seed)[1]._model.model.save_pretrained(folder)

        def load():
            torch_body.load_body(folder, options, lambda *_: None)

        load()
        with patch("torch.nn.Module.to", no_room):
            refused("torchrun", load)
        with patch("transformers.AutoModel.from_pretrained", no_room):
            refused("torchrun", load)
        for failure in (no_room, capture):
            with patch("serve_torch.torch_body.TorchModel", failure):
                refused("--max-kv-mib", load)
    with (patch("torch.cuda.is_available", lambda: True),
          patch("torch.cuda.device_count", lambda: 2), patch.dict(os.environ, LOCAL_RANK="2")):
        refused("--nproc-per-node 2", torch_body.choose_device, "cuda")
    print("ok what does not fit", flush=True)


def main():
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error}")
        return
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}", flush=True)
    cases = [("eager", "cpu"), ("graph", "cpu")]
    if torch.cuda.is_available():
        cases += [("eager", "cuda"), ("graph", "cuda")]
    first = None
    for decode, device in cases:
        rows = check(decode, device, seed)
        first = rows if first is None else first
        error = np.linalg.norm(rows - first, axis=1) / np.linalg.norm(first, axis=1)
        assert error.max() < 1e-4, (decode, device, error)
        check_what_is_not_finite(decode, device, seed)
        print(f"ok {decode} on {device}", flush=True)
    check_failures(seed)
    check_cache_size()
    check_a_cache_that_cannot_grow(seed)
    check_what_does_not_fit(seed)


if __name__ == "__main__":
    main()
