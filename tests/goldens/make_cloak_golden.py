#!/usr/bin/env python3
"""Prints the golden values of tests/cloak_test.cpp.

An implementation of the cloak's definition that shares nothing with the engine: hashlib's BLAKE2b,
the ChaCha20 of the package `cryptography`, and Gram-Schmidt (done twice) in place of Householder.
"""
import hashlib
import math
import struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

N = 64
SEED = bytes(range(32))


def keyed(domain):
    return hashlib.blake2b(SEED, key=domain, digest_size=32).digest()


key = keyed(b"infemeral cloak matrix v1")
stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * N * N))
words = struct.unpack(f"<{N * N}Q", stream)
gaussians = []
for a, b in zip(words[::2], words[1::2]):
    radius = math.sqrt(-2 * math.log(((a >> 11) + 1) * 2.0**-53))
    angle = 2 * math.pi * ((b >> 11) * 2.0**-53)
    gaussians += [radius * math.cos(angle), radius * math.sin(angle)]
columns = [gaussians[j * N : (j + 1) * N] for j in range(N)]

q = []
for column in columns:
    for _ in range(2):
        for other in q:
            d = math.fsum(x * y for x, y in zip(other, column))
            column = [y - d * x for x, y in zip(other, column)]
    norm = math.sqrt(math.fsum(x * x for x in column))
    q.append([x / norm for x in column])  # a positive diagonal of R

print("commitment", keyed(b"infemeral cloak commitment v1").hex())
for row, col in [(0, 0), (0, 63), (63, 0), (63, 63), (31, 17), (17, 31), (5, 50), (50, 5)]:
    print(f"{{{row}, {col}, {q[col][row]!r}}},")
