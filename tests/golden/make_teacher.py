#!/usr/bin/env python3
"""Makes smollm2_teacher.json: the plain model's opinion at every position of teacher_text.txt.

    tools/install_deps.sh --reference && .venv/bin/python tools/demo_model.py
    .venv-reference/bin/python tests/golden/make_teacher.py

The text (English, code, tables, ten languages; written for this test) is tokenised as plain text
and read in one pass in float32, so that position i sees tokens 0..i and predicts token i + 1. A
program under test reads the same tokens and compares: does its argmax agree, and how large is the
KL divergence over the buckets {top id 1, ..., top id K, everything else}?

smollm2_teacher.json, N positions, K kept ids a position:

    provenance               package versions, the model's sha256, the command
    storage_kl               mean KL divergence of the stored distribution from the exact one
    token_ids      [N]       the text
    gaps           [N]       best logit minus second-best
    top_ids        [N][K]    the most probable ids, best first: [i][0] is the argmax
    top_logprobs   [N][K]    ln of their probabilities
    rest_logprobs  [N]       ln of the probability of everything else

A reader renormalises: p_j = exp(ln p_j) over the K ids and the rest, divided by their sum. A measured
KL is meaningful well above storage_kl.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import reference

KEPT = 16
DIGITS = 4  # after the point: 1e-4 nats is far below what is measured


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


def storage_kl(seen: dict[str, np.ndarray]) -> float:
    """Mean KL divergence of the stored distribution from the exact one."""
    exact = np.concatenate([seen["log_p"], seen["rest"][:, None]], axis=1)
    stored = exact.round(DIGITS)
    stored -= np.log(np.exp(stored).sum(axis=1, keepdims=True))
    return float((np.exp(stored) * (stored - exact)).sum(axis=1).mean())


def to_json(note: dict, ids: list[int], seen: dict[str, np.ndarray]) -> str:
    """One line a position, so that a difference can be read."""
    def rows(values) -> str:
        return ",\n".join(json.dumps(row, separators=(",", ":")) for row in values)

    fields = [f"{json.dumps(name)}: {json.dumps(value, indent=1)}" for name, value in note.items()]
    fields += [f'"token_ids": {json.dumps(ids, separators=(",", ":"))}',
               f'"gaps": [{rows(seen["gap"].round(6).tolist())}]',
               f'"top_ids": [{rows(seen["top_ids"].tolist())}]',
               f'"top_logprobs": [{rows(seen["log_p"].round(DIGITS).tolist())}]',
               f'"rest_logprobs": [{rows(seen["rest"].round(DIGITS).tolist())}]']
    return "{" + ",\n".join(fields) + "}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/golden/smollm2_teacher.json.")
    parser.add_argument("--model", type=Path, default=reference.DEFAULT_MODEL, metavar="DIR")
    parser.add_argument("--output", type=Path, default=reference.GOLDEN / "smollm2_teacher.json",
                        metavar="FILE")
    args = parser.parse_args()

    text = (reference.GOLDEN / "teacher_text.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids = reference.encode(tokenizer, text, control_tokens=False)
    seen = read_text(reference.load_model(args.model), ids)
    note = {"provenance": reference.provenance(args.model, "tests/golden/make_teacher.py"),
            "storage_kl": storage_kl(seen)}
    args.output.write_text(to_json(note, ids, seen), encoding="utf-8")
    hits = float((seen["top_ids"][:-1, 0] == np.array(ids[1:])).mean())
    print(f"{args.output}: {len(ids)} positions, {int((seen['gap'] < 1e-3).sum())} gaps below "
          f"1e-3, KL of the stored distribution {note['storage_kl']:.1e}; the argmax is the "
          f"text's next token at {hits:.1%}")


if __name__ == "__main__":
    main()
