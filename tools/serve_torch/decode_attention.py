"""Attention of single rows over the paged cache, in Triton: what every generated token runs.

A row's query meets all earlier positions of its session once, so the cache is read at the memory's
speed if enough of the device takes part. Programs of `_attend` each take some pages of one key head
of one session, for all query heads that share it; `_combine` joins what they found: flash
decoding (Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The new key and
value go to their place on the way, so that nothing else touches the cache.
"""

import torch
import triton
import triton.language as tl

MAX_PARTS = 32


@triton.jit
def _attend(query, key, value, key_pages, value_pages, slots, table, positions, outs, peaks, sums,
            scaling, query_b, query_h, key_b, key_h, value_b, value_h, table_b,
            KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
            PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            PRECISION: tl.constexpr):
    b = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1)
    position = tl.load(positions + b)
    pages = position // PAGE + 1
    share = tl.cdiv(pages, PARTS)
    first = part * share
    last = tl.minimum(first + share, pages)

    rows = tl.arange(0, ROWS)  # query heads of this key head, and what fills up a tile
    columns = tl.arange(0, COLUMNS)
    inside = columns < D
    q = tl.load(query + b * query_b + (head * GROUP + rows[:, None]) * query_h + columns[None, :],
                mask=(rows[:, None] < GROUP) & inside[None, :], other=0.0)
    new_key = tl.load(key + b * key_b + head * key_h + columns, mask=inside, other=0.0)
    new_value = tl.load(value + b * value_b + head * value_h + columns, mask=inside, other=0.0)
    if last == pages and first < pages:
        at = (tl.load(slots + b) * KV_HEADS + head) * D + columns
        tl.store(key_pages + at, new_key, mask=inside)
        tl.store(value_pages + at, new_value, mask=inside)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for page in range(first, last):
        at = page * PAGE + tl.arange(0, PAGE)
        slot = tl.load(table + b * table_b + page) * PAGE + tl.arange(0, PAGE)
        where = (slot[:, None] * KV_HEADS + head) * D + columns[None, :]
        cached = (at[:, None] < position) & inside[None, :]
        is_new = at[:, None] == position
        k = tl.load(key_pages + where, mask=cached, other=0.0)
        v = tl.load(value_pages + where, mask=cached, other=0.0)
        k = tl.where(is_new, new_key[None, :], k)
        v = tl.where(is_new, new_value[None, :], v)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        scores = tl.where(at[None, :] <= position, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        kept = tl.exp(peak - higher)
        total = total * kept + tl.sum(weights, 1)
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = higher
    found = ((b * KV_HEADS + head) * GROUP + rows) * PARTS + part
    tl.store(outs + found[:, None] * D + columns[None, :], out,
             mask=(rows[:, None] < GROUP) & inside[None, :])
    tl.store(peaks + found, peak, mask=rows < GROUP)
    tl.store(sums + found, total, mask=rows < GROUP)


@triton.jit
def _combine(outs, peaks, sums, result, D: tl.constexpr, PARTS: tl.constexpr,
             COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    parts = tl.arange(0, PARTS)
    columns = tl.arange(0, COLUMNS)
    inside = columns < D
    peak = tl.load(peaks + row * PARTS + parts)
    weights = tl.exp(peak - tl.max(peak, 0))  # of parts without a page: 0
    total = tl.sum(weights * tl.load(sums + row * PARTS + parts), 0)
    out = tl.load(outs + (row * PARTS + parts[:, None]) * D + columns[None, :],
                  mask=inside[None, :], other=0.0)
    out = tl.sum(out * weights[:, None], 0) / total
    tl.store(result + row * D + columns, out.to(result.dtype.element_ty), mask=inside)


def decode_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     key_pages: torch.Tensor, value_pages: torch.Tensor, slots: torch.Tensor,
                     table: torch.Tensor, positions: torch.Tensor, scaling: float) -> torch.Tensor:
    """query [B, heads, 1, D], key and value [B, kv_heads, 1, D], pages [n, PAGE, kv_heads, D]; the
    result is [B, 1, heads, D]."""
    b, heads, _, d = query.shape
    page, kv_heads = key_pages.shape[1:3]
    group = heads // kv_heads
    parts = min(triton.next_power_of_2(table.shape[1]), MAX_PARTS)
    outs = query.new_empty((b, heads, parts, d), dtype=torch.float32)
    peaks, sums = query.new_empty((2, b, heads, parts), dtype=torch.float32)
    result = query.new_empty((b, 1, heads, d))
    columns = max(16, triton.next_power_of_2(d))
    _attend[b * kv_heads, parts](
        query, key, value, key_pages, value_pages, slots, table, positions, outs, peaks, sums,
        scaling, query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), table.stride(0), kv_heads, group, d, page, parts,
        max(16, triton.next_power_of_2(group)), columns,
        "ieee" if query.dtype == torch.float32 else "tf32")
    _combine[b * heads,](outs, peaks, sums, result, d, parts, columns)
    return result
