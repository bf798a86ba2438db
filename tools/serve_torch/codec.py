"""Rows in the wire format (engine/wire.h) and their compression (net/codec.h)."""

import lz4.block
import numpy as np

F32, F16, I8 = 1, 2, 3
MAX_F16 = 65504.0
I8_BLOCK = 64            # elements that share a scale
MIN_COMPRESS_BYTES = 4096  # at or below this: never
SAMPLE_BYTES = 64 * 1024   # a larger payload is judged by a sample from its middle first
MAX_RATIO = 255            # one byte of an LZ4 block stands for at most so many


class TensorError(Exception):
    """Bytes that do not make the rows that they should."""


def row_bytes(dtype: int, cols: int) -> int:
    if dtype == F32:
        return 4 * cols
    if dtype == F16:
        return 2 * cols
    return 2 * -(-cols // I8_BLOCK) + cols


def encode_rows(dtype: int, rows: np.ndarray) -> bytes:
    """[n, H] float32, finite, as n * row_bytes bytes."""
    if dtype == F32:
        return rows.astype("<f4").tobytes()
    if dtype == F16:
        return np.clip(rows, -MAX_F16, MAX_F16).astype("<f2").tobytes()
    n, cols = rows.shape
    blocks = -(-cols // I8_BLOCK)
    padded = np.zeros((n, blocks * I8_BLOCK), np.float32)
    padded[:, :cols] = rows
    padded = padded.reshape(n, blocks, I8_BLOCK)
    peak = np.abs(padded).max(axis=2)
    scale = np.minimum(peak / np.float32(127), np.float32(MAX_F16)).astype("<f2")
    # By the rounded scale, the one that the reader has.
    wide = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
    scaled = np.clip(padded * inverse[:, :, None], -127, 127)
    values = np.rint(scaled).astype(np.int8).reshape(n, -1)[:, :cols]
    return np.concatenate([scale.view(np.uint8).reshape(n, -1), values.view(np.uint8)],
                          axis=1).tobytes()


def decode_rows(dtype: int, data: bytes, n: int, cols: int) -> np.ndarray:
    """The reverse: [n, H] float32, a copy of its own."""
    if dtype == F32:
        return np.frombuffer(data, "<f4").reshape(n, cols).astype(np.float32)
    if dtype == F16:
        return np.frombuffer(data, "<f2").reshape(n, cols).astype(np.float32)
    blocks = -(-cols // I8_BLOCK)
    raw = np.frombuffer(data, np.uint8).reshape(n, row_bytes(I8, cols))
    scale = raw[:, :2 * blocks].copy().view("<f2").astype(np.float32)
    values = raw[:, 2 * blocks:].copy().view(np.int8).astype(np.float32)
    with np.errstate(invalid="ignore"):  # an infinite scale times 0: the caller looks
        return values * np.repeat(scale, I8_BLOCK, axis=1)[:, :cols]


def _compress(data: bytes) -> bytes | None:
    packed = lz4.block.compress(data, store_size=False)
    return packed if len(packed) <= len(data) - len(data) // 8 else None


def pack(data: bytes) -> tuple[bool, bytes]:
    """(is one LZ4 block, bytes): compressed only if that saves 1/8."""
    if len(data) > MIN_COMPRESS_BYTES:
        begin = (len(data) - SAMPLE_BYTES) // 2
        if len(data) <= SAMPLE_BYTES or _compress(data[begin:begin + SAMPLE_BYTES]) is not None:
            packed = _compress(data)
            if packed is not None:
                return True, packed
    return False, data


def unpack(is_lz4: bool, data: bytes, expected: int) -> bytes:
    """Exactly `expected` bytes, or TensorError before anything is allocated for them."""
    if not is_lz4:
        if len(data) != expected:
            raise TensorError(f"a tensor of {expected} bytes came with {len(data)}")
        return data
    if MIN_COMPRESS_BYTES < expected and expected // MAX_RATIO <= len(data) <= expected:
        try:
            rows = lz4.block.decompress(data, uncompressed_size=expected)
        except lz4.block.LZ4BlockError:
            rows = b""
        if len(rows) == expected:
            return rows
    raise TensorError(f"a compressed tensor of {len(data)} bytes does not unpack to the {expected} "
                      "bytes of its rows")
