#!/usr/bin/env python3
"""Checks what engine_prep wrote with programs that nobody here wrote.

    .venv-reference/bin/python tests/check_body_with_transformers.py OUT

OUT/body must be a checkpoint that stock Hugging Face transformers loads. It gets cloaked embeddings
as `inputs_embeds`; the client's two ends are spelt out below in a few lines of PyTorch; the tokens
must be the plain model's, tests/golden/smollm2_greedy.json.

Each prompt is read in one pass together with its golden answer: if the most likely token at every
position is the answer's next token, then greedy decoding would have written the answer. A position
whose golden gap is below 1e-3 may differ; it is printed.

The cloak comes from the seed, made again here with hashlib, the package `cryptography` and numpy's
QR, and is compared with the matrix file where there is one.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent / "golden" / "smollm2_greedy.json"
NEAR_TIE = 1e-3
# Rotated or not, weights are rounded to the body's dtype: only float32 must give every token.
MIN_AGREEMENT = {torch.float32: 1.0, torch.float16: 0.995, torch.bfloat16: 0.95}


def cloak_from_seed(seed: bytes, size: int) -> np.ndarray:
    """[size, size] float64: subkey, ChaCha20 keystream, Box-Muller, QR with a positive diagonal."""
    key = hashlib.blake2b(seed, key=b"infemeral cloak matrix v1", digest_size=32).digest()
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(stream.update(bytes(8 * (size * size + 1))), dtype="<u8") >> 11
    pairs = words[: words.size // 2 * 2].reshape(-1, 2).astype(np.float64)
    radius = np.sqrt(-2 * np.log((pairs[:, 0] + 1) * 2.0**-53))
    angle = 2 * np.pi * pairs[:, 1] * 2.0**-53
    gaussians = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    q, r = np.linalg.qr(gaussians[: size * size].reshape(size, size).T)  # filled column by column
    return q * np.sign(np.diag(r))


def load_cloak(client: Path, size: int) -> torch.Tensor:
    made = cloak_from_seed((client / "cloak.key").read_bytes(), size).astype(np.float16)
    stored = client / "cloak.safetensors"
    if not stored.exists():
        return torch.from_numpy(made).float()
    cloak = load_file(stored)["cloak"].float()
    # Neighbouring float16 values below 1 are at most 2^-11 apart.
    difference = float((cloak - torch.from_numpy(made).float()).abs().max())
    if difference > 2.0**-11:
        raise SystemExit(f"{stored} is not what cloak.key gives: entries differ by {difference:g}")
    return cloak


def uncloak(rows: torch.Tensor, cloak: torch.Tensor) -> torch.Tensor:
    """rows * Q^-1. Rounded to float16, Q is not quite orthogonal: one step of iterative refinement,
    as the client takes where rows come in float32."""
    plain = rows @ cloak.T
    return plain + (rows - plain @ cloak) @ cloak.T


@torch.inference_mode()
def check(folder: Path, golden: dict) -> bool:
    client = load_file(folder / "client" / "client.safetensors")
    embed = client["embed_tokens.weight"].float()          # [V, H]
    head = client.get("lm_head.weight", embed).float()     # [V, H]
    gain = client["final_norm.weight"].float()             # [H]
    cloak = load_cloak(folder / "client", embed.shape[1])  # [H, H]

    body, loading = transformers.AutoModel.from_pretrained(
        folder / "body", torch_dtype=torch.float32, attn_implementation="eager",
        output_loading_info=True)
    body.eval()
    faults = {name: found for name, found in loading.items() if found}
    if faults:
        raise SystemExit(f"{folder / 'body'} is no stock checkpoint: {faults}")
    dtype = transformers.AutoConfig.from_pretrained(folder / "body").torch_dtype

    agreed = near_ties = total = 0
    for prompt in golden["prompts"]:
        answer = torch.tensor(prompt["output_ids"])
        ids = torch.tensor(prompt["input_ids"] + prompt["output_ids"][:-1])
        sent = embed[ids] @ cloak
        returned = body(inputs_embeds=sent[None], use_cache=False).last_hidden_state[0]
        logits = (uncloak(returned[-len(answer):], cloak) * gain) @ head.T
        for i in (logits.argmax(1) != answer).nonzero()[:, 0].tolist():
            tie = prompt["gaps"][i] < NEAR_TIE
            near_ties += tie
            print(f"  {prompt['id']}, token {i}: {int(logits[i].argmax())} instead of "
                  f"{int(answer[i])}, gap {prompt['gaps'][i]:g}{' (allowed)' if tie else ''}")
        agreed += int((logits.argmax(1) == answer).sum())
        total += len(answer)
    passed = agreed + near_ties >= MIN_AGREEMENT[dtype] * total
    print(f"{folder}: body in {dtype}, {agreed} of {total} tokens agree with transformers' plain "
          f"model, {near_ties} near-ties differ: {'ok' if passed else 'FAILED'}")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Check the output of engine_prep with Hugging Face transformers.")
    parser.add_argument("prepared", type=Path, metavar="OUT", help="what engine_prep wrote")
    parser.add_argument("--prompts", type=int, metavar="N", help="only the first N prompts")
    args = parser.parse_args()
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    golden["prompts"] = golden["prompts"][: args.prompts]
    return 0 if check(args.prepared, golden) else 1


if __name__ == "__main__":
    sys.exit(main())
