#!/usr/bin/env python3
"""What of a step's result tools/serve_torch brings from the device to the host: the rows that are
wanted, the same ones as if all were, and nothing where nobody reads them. On a GPU also that the
graphs give what the layers give without them.

The layers are transformers', with random weights. A case prints `skipped:` where PyTorch is not
installed.
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from serve_torch.body import (WANTED_ALL, WANTED_LAST, WANTED_NONE, BodyInfo,  # noqa: E402
                              BodyStep)

NONE, LAST, ALL = WANTED_NONE, WANTED_LAST, WANTED_ALL
HIDDEN, CONTEXT, MAX_BATCH = 32, 256, 4


def make_body(decode, device, seed):
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
    model = transformers.AutoModel.from_config(config).to(device)
    pages = 0 if device == "cpu" else 4 * MAX_BATCH * -(-CONTEXT // PAGE) + 1
    ranks = Watched(TorchModel(model, ModelOptions(decode, MAX_BATCH, CONTEXT, pages,
                                                   lambda level, message: None)))
    return TorchBody(BodyInfo("random", HIDDEN, CONTEXT, 1), ranks, pages, MAX_BATCH), ranks


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


def main():
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error}")
        return
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}", flush=True)
    cases = [("eager", "cpu")]
    if torch.cuda.is_available():
        cases += [("eager", "cuda"), ("graph", "cuda")]
    first = None
    for decode, device in cases:
        rows = check(decode, device, seed)
        first = rows if first is None else first
        error = np.linalg.norm(rows - first, axis=1) / np.linalg.norm(first, axis=1)
        assert error.max() < 1e-4, (decode, device, error)
        print(f"ok {decode} on {device}", flush=True)


if __name__ == "__main__":
    main()
