#!/usr/bin/env python3
"""tools/serve_torch's attention of single rows against the formula, in float64, on random pages.

On a GPU where there is one, else in Triton's interpreter. Prints `skipped:` where PyTorch or Triton
is not installed.
"""

import importlib.util
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

PAGE, PAGES = 64, 9
ERRORS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# heads, key heads, head size
SHAPES = [(9, 3, 64), (8, 2, 128), (4, 4, 80), (40, 8, 16), (24, 1, 32)]


def check(dtype_name, sessions, heads, kv_heads, size, first_position):
    import torch
    from serve_torch.decode_attention import decode_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, dtype_name)

    def normal(*shape):
        return torch.randn(shape).to(device, dtype)

    keys, values = (normal(1 + sessions * PAGES, PAGE, kv_heads, size) for _ in range(2))
    table = (1 + torch.randperm(sessions * PAGES)).view(sessions, PAGES).to(device)
    positions = torch.randint(0, PAGES * PAGE, (sessions, 1))
    positions[0] = first_position
    # What lies behind the position is poison: nobody may look at it, whatever it is.
    slots = torch.empty_like(positions)
    for i, position in enumerate(positions[:, 0].tolist()):
        places = (table[i, :, None] * PAGE + torch.arange(PAGE, device=device)).view(-1)
        for pages in (keys, values):
            pages.view(-1, kv_heads, size)[places[position:]] = float("nan")
        slots[i] = places[position].cpu()
    # As transformers hands them over: a transposed view.
    query, key, value = (normal(sessions, 1, n, size).transpose(1, 2)
                         for n in (heads, kv_heads, kv_heads))
    expected = [pages.clone() for pages in (keys, values)]
    for pages, new in zip(expected, (key, value)):
        pages.view(-1, kv_heads, size)[slots[:, 0].to(device)] = new[:, :, 0]

    out = decode_attention(query, key, value, keys, values, slots.to(device), table,
                           positions.to(device), size**-0.5)

    for pages, wanted in zip((keys, values), expected):
        assert torch.equal(pages.nan_to_num(7), wanted.nan_to_num(7)), "the cache is not as it should be"
    worst = 0.0
    for i, position in enumerate(positions[:, 0].tolist()):
        k, v = (pages[table[i]].reshape(-1, kv_heads, size)[:position + 1].double()
                .repeat_interleave(heads // kv_heads, 1) for pages in expected)
        scores = torch.einsum("hd,nhd->hn", query[i, :, 0].double(), k) * size**-0.5
        right = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
        worst = max(worst, (out[i, 0].double() - right).abs().max().item())
    assert worst < ERRORS[dtype_name], f"off by {worst}"
    return worst


def main():
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed")
        return
    import torch
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    seed = random.randrange(1 << 32)
    torch.manual_seed(seed)
    print(f"seed {seed}")
    # Triton 3.6's interpreter multiplies bfloat16 as whole numbers.
    dtypes = list(ERRORS) if torch.cuda.is_available() else ["float32", "float16"]
    edges = [0, PAGE - 1, PAGE, PAGES * PAGE - 1]
    for number, (heads, kv_heads, size) in enumerate(SHAPES):
        for dtype in dtypes:
            worst = check(dtype, 1 + number % 3, heads, kv_heads, size, edges[number % len(edges)])
            print(f"{heads} heads, {kv_heads} key heads of {size}, {dtype}: off by at most {worst:.1e}")


if __name__ == "__main__":
    main()
