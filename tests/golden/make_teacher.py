#!/usr/bin/env python3
"""Makes smollm2_teacher.bin: the plain model's opinion at every position of teacher_text.txt.

    tools/install_deps.sh --tests && .venv/bin/python tools/demo_model.py
    .venv/bin/python tests/golden/make_teacher.py

The text (English, code, tables, ten languages; written for this test) is tokenised as plain text and
read in one pass in float32, so that position i sees tokens 0..i and predicts token i + 1. A program
under test reads the same tokens and compares: does its argmax agree, and how large is the KL
divergence over the buckets {top id 1, ..., top id K, everything else}?

smollm2_teacher.bin, little-endian, without padding; N positions, K kept ids a position:

    char[8]   "IETEACH1"
    u32       N
    u32       K
    u16[N]    token ids of the text
    f32[N]    best logit minus second-best
    f32[N]    ln of the probability of everything outside the K ids
    u16[N*K]  the K most probable ids of each position, best first: [i*K] is the argmax
    f16[N*K]  ln of their probabilities

A reader renormalises: p_j = exp(ln p_j) over the K ids and the rest, divided by their sum. What the
float16 costs is printed by this script as the KL divergence between the exact and the stored
distribution; a measured KL is meaningful well above it.

smollm2_teacher.json beside it holds the provenance and the sha256 of the binary file.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import reference

MAGIC = b"IETEACH1"
KEPT = 32


@torch.inference_mode()
def read_text(model, ids: list[int]) -> dict[str, np.ndarray]:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    top, top_ids = logits.topk(KEPT)
    # float64 from here on: the rest is a difference of nearly equal numbers.
    top, logits = top.double(), logits.double()
    log_z = logits.logsumexp(1, keepdim=True)
    rest = logits.scatter(1, top_ids, float("-inf")).logsumexp(1) - log_z[:, 0]
    return {"gap": (top[:, 0] - top[:, 1]).numpy(), "rest": rest.numpy(),
            "top_ids": top_ids.numpy(), "log_p": (top - log_z).numpy()}


def pack(ids: list[int], seen: dict[str, np.ndarray]) -> bytes:
    arrays = ((ids, "<u2"), (seen["gap"], "<f4"), (seen["rest"], "<f4"),
              (seen["top_ids"], "<u2"), (seen["log_p"], "<f2"))
    return MAGIC + struct.pack("<II", len(ids), KEPT) + b"".join(
        np.asarray(values).astype(dtype).tobytes() for values, dtype in arrays)


def storage_kl(seen: dict[str, np.ndarray]) -> float:
    """Mean KL divergence of the stored distribution from the exact one."""
    exact = np.concatenate([seen["log_p"], seen["rest"][:, None]], axis=1)
    stored = np.concatenate([seen["log_p"].astype(np.float16).astype(np.float64),
                             seen["rest"].astype(np.float32).astype(np.float64)[:, None]], axis=1)
    stored -= np.log(np.exp(stored).sum(axis=1, keepdims=True))
    return float((np.exp(stored) * (stored - exact)).sum(axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/golden/smollm2_teacher.bin.")
    parser.add_argument("--model", type=Path, default=reference.DEFAULT_MODEL, metavar="DIR")
    parser.add_argument("--output", type=Path, default=reference.GOLDEN / "smollm2_teacher.bin",
                        metavar="FILE")
    args = parser.parse_args()

    text = (reference.GOLDEN / "teacher_text.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = reference.encode(tokenizer, text, control_tokens=False)
    seen = read_text(reference.load_model(args.model), ids)
    args.output.write_bytes(pack(ids, seen))

    note = {"provenance": reference.provenance(args.model, "tests/golden/make_teacher.py"),
            "positions": len(ids), "kept_ids": KEPT, "storage_kl": storage_kl(seen),
            "sha256": reference.sha256(args.output)}
    args.output.with_suffix(".json").write_text(json.dumps(note, indent=2) + "\n",
                                                encoding="utf-8")
    hits = float((seen["top_ids"][:-1, 0] == np.array(ids[1:])).mean())
    print(f"{args.output}: {len(ids)} positions, {int((seen['gap'] < 1e-3).sum())} gaps below "
          f"1e-3, KL of the stored distribution {note['storage_kl']:.1e}; the argmax is the "
          f"text's next token at {hits:.1%}")


if __name__ == "__main__":
    main()
