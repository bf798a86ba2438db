#!/usr/bin/env python3
"""Makes smollm2_greedy.json: what the plain model says to each prompt of prompts.jsonl.

    tools/install_deps.sh --reference && .venv/bin/python tools/demo_model.py
    .venv-reference/bin/python tests/golden/make_golden.py

Greedy decoding in float32 with a KV cache, always 64 tokens (the end-of-sequence token is a token
like any other), no penalty. The file is one JSON object:

    provenance   versions, command, sha256 of the weights and the tokenizer
    n_tokens     64
    prompts      list in the order of prompts.jsonl, each with
      id           as in prompts.jsonl
      input_ids    the prompt's tokens
      output_ids   [64] the greedy tokens
      second_ids   [64] the runner-up at each position
      gaps         [64] best logit minus second-best; below 1e-3 another implementation may
                   rightly choose the second, and from there on write another text

The script then runs the same model in float64 over prompt and answer, which tells how much of a
gap is rounding (below 1e-4 with either BLAS of Debian).
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import DynamicCache

import reference

N_TOKENS = 64
NEAR_TIE = 1e-3


@torch.inference_mode()
def generate(model, input_ids: list[int]) -> dict:
    output_ids, second_ids, gaps = [], [], []
    ids, cache = torch.tensor([input_ids]), DynamicCache()
    for _ in range(N_TOKENS):
        step = model(input_ids=ids, past_key_values=cache, use_cache=True)
        (best, second), (best_id, second_id) = (
            x.tolist() for x in step.logits[0, -1].topk(2))
        output_ids.append(best_id)
        second_ids.append(second_id)
        gaps.append(float(f"{best - second:.6g}"))
        ids = torch.tensor([[best_id]])
    return {"output_ids": output_ids, "second_ids": second_ids, "gaps": gaps}


@torch.inference_mode()
def rounding(model64, entry: dict) -> tuple[int, float]:
    """Tokens that float64 would choose otherwise, and the largest change of a gap."""
    ids = torch.tensor([entry["input_ids"] + entry["output_ids"][:-1]])
    logits = model64(input_ids=ids).logits[0, len(entry["input_ids"]) - 1:]
    chosen = logits.gather(1, torch.tensor(entry["output_ids"])[:, None])[:, 0]
    second = logits.gather(1, torch.tensor(entry["second_ids"])[:, None])[:, 0]
    changed = int((logits.argmax(1) != torch.tensor(entry["output_ids"])).sum())
    return changed, float(((chosen - second) - torch.tensor(entry["gaps"])).abs().max())


def write(path: Path, golden: dict) -> None:
    """One line a list, so that a change of the file can be read."""
    entries = []
    for entry in golden["prompts"]:
        fields = (f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items())
        entries.append("    {\n" + ",\n".join(fields) + "\n    }")
    head = json.dumps({k: v for k, v in golden.items() if k != "prompts"}, indent=2)
    path.write_text(head[:-2] + ',\n  "prompts": [\n' + ",\n".join(entries) + "\n  ]\n}\n",
                    encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/golden/smollm2_greedy.json.")
    parser.add_argument("--model", type=Path, default=reference.DEFAULT_MODEL, metavar="DIR")
    parser.add_argument("--output", type=Path, default=reference.GOLDEN / "smollm2_greedy.json",
                        metavar="FILE")
    args = parser.parse_args()

    prompts = reference.read_prompts()
    model = reference.load_model(args.model)
    entries = [{"id": prompt["id"], "input_ids": ids, **generate(model, ids)}
               for prompt, ids in zip(prompts, reference.prompt_ids(args.model, prompts))]
    golden = {"provenance": reference.provenance(args.model, "tests/golden/make_golden.py"),
              "n_tokens": N_TOKENS, "prompts": entries}
    write(args.output, golden)

    ties = [(e["id"], i, gap) for e in entries for i, gap in enumerate(e["gaps"])
            if gap < NEAR_TIE]
    print(f"{args.output}: {len(entries)} prompts x {N_TOKENS} tokens, "
          f"{len(ties)} gaps below {NEAR_TIE}")
    for name, position, gap in ties:
        print(f"  {name}, token {position}: {gap}")
    model64 = model.double()
    checks = [rounding(model64, entry) for entry in entries]
    print(f"float64: {sum(c for c, _ in checks)} tokens differ, a gap changes by at most "
          f"{max(d for _, d in checks):.2g}")


if __name__ == "__main__":
    main()
