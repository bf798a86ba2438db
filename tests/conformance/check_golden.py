#!/usr/bin/env python3
"""The demo model through a body server: greedy tokens against tests/golden/smollm2_greedy.json.

    check_golden.py OUT --server-command "python tools/serve_torch" --tools build/release/tools

OUT is the demo model as engine_prep wrote it with --body-dtype f32. The client's two ends are a few
lines of numpy, so neither end of the answer is engine_run's. Every token is generated, none is
forced: one that differs is counted once, and what follows it differs too. Needs the packages of
tests/requirements.txt and of tools/serve_torch/requirements.txt.

With --engine-run the client is engine_run, from the prompts' text to the answers' text; a prompt
counts when its whole text is that of the golden tokens.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import client as protocol
import numpy as np
from fixture import Server, key_bytes
from safetensors.numpy import load_file
from tokenizers import Tokenizer

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))
from check_body_with_transformers import GOLDEN, cloak_from_seed  # noqa: E402

MAX_ROWS = 512


class Ends:
    """What the client knows: tables and cloak."""

    def __init__(self, folder: Path):
        tensors = load_file(folder / "client.safetensors")
        self.embed = tensors["embed_tokens.weight"].astype(np.float32)
        self.head = tensors.get("lm_head.weight", tensors["embed_tokens.weight"]).astype(np.float32)
        self.gain = tensors["final_norm.weight"].astype(np.float32)
        self.cloak = cloak_from_seed((folder / "cloak.key").read_bytes(),
                                     self.embed.shape[1]).astype(np.float16).astype(np.float64)
        self.inverse = np.linalg.inv(self.cloak)  # of the rounded matrix, which is not orthogonal

    def rows(self, ids: list[int]) -> np.ndarray:
        return (self.embed[ids] @ self.cloak).astype(np.float32)

    def token(self, row: np.ndarray) -> int:
        return int(((row @ self.inverse).astype(np.float32) * self.gain @ self.head.T).argmax())


def generate(client, session: int, ends: Ends, ids: list[int], count: int) -> list[int]:
    at, rows, tokens = 0, ends.rows(ids), []
    while True:
        for begin in range(0, len(rows), MAX_ROWS):
            out = client.step(session, at, rows[begin:begin + MAX_ROWS], protocol.LAST)
            at += len(rows[begin:begin + MAX_ROWS])
        tokens.append(ends.token(out[0]))
        if len(tokens) == count:
            return tokens
        rows = ends.rows(tokens[-1:])


def golden_with_numpy(args, server: Server, keys: list[Path]) -> int:
    """Prints what is different; the exit code."""
    ends = Ends(args.prepared / "client")
    manifest = json.loads((args.prepared / "body/infemeral.json").read_text())
    body = (bytes.fromhex(manifest["model_fingerprint"]),
            bytes.fromhex(manifest["cloak_commitment"]), ends.embed.shape[1])
    protocol.TIMEOUT = 3600
    same = total = 0
    client = protocol.Client(server.address, key_bytes(keys[0]), key_bytes(Path(f"{keys[1]}.pub")),
                             body)
    session = client.open().session
    for prompt in golden_prompts(args):
        wanted = prompt["output_ids"]
        tokens = generate(client, session, ends, prompt["input_ids"], len(wanted))
        equal = sum(a == b for a, b in zip(tokens, wanted))
        if equal < len(wanted):
            first = next(i for i, (a, b) in enumerate(zip(tokens, wanted)) if a != b)
            print(f"{prompt['id']}: differs from token {first} on, gap {prompt['gaps'][first]:g}")
        same += equal
        total += len(wanted)
    client.close()
    print(f"{same} of {total} greedy tokens are the golden ones")
    return 0 if same == total else 1


def golden_with_engine_run(args, server: Server, keys: list[Path], folder: Path) -> int:
    """As golden_with_numpy()."""
    tokenizer = Tokenizer.from_file(str(args.prepared / "client/tokenizer.json"))
    lines = read_lines(GOLDEN.parent / "prompts.jsonl")
    golden = {prompt["id"]: prompt for prompt in golden_prompts(args)}
    same = tokens = 0
    for chat in (False, True):
        prompts = [line for line in lines
                   if line["id"] in golden and line.get("chat", False) == chat]
        if not prompts:
            continue
        file, results = folder / f"prompts{chat}.jsonl", folder / f"results{chat}.jsonl"
        file.write_text("".join(json.dumps({"id": p["id"], "prompt": p["prompt"]}) + "\n"
                                for p in prompts), encoding="utf-8")
        subprocess.run([*map(str, [
            args.tools / "engine_run", "--quiet", "--model", args.prepared, "--server",
            server.address, "--server-key", f"{keys[1]}.pub", "--identity", keys[0], "--file", file,
            "--output", results, "--wire", "f32", "--temp", "0", "--ignore-eos", "--max-tokens",
            len(golden[prompts[0]["id"]]["output_ids"]), *(["--chat"] if chat else [])])],
            check=True)
        for line in read_lines(results):
            wanted = golden[line["id"]]
            text = tokenizer.decode(wanted["output_ids"])
            equal = (line.get("text") == text
                     and line["prompt_tokens"] == len(wanted["input_ids"])
                     and line["output_tokens"] == len(wanted["output_ids"]))
            if not equal:
                print(f"{line['id']}: {line}\n  for {text!r}")
            same += equal
            tokens += line["output_tokens"] if equal else 0
    print(f"{same} of {len(golden)} prompts have the golden text, {tokens} greedy tokens")
    return 0 if same == len(golden) else 1


def read_lines(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as lines:  # not splitlines(): prompts hold other line ends
        return [json.loads(line) for line in lines]


def golden_prompts(args) -> list[dict]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["prompts"][:args.prompts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, metavar="OUT")
    parser.add_argument("--server-command", required=True)
    parser.add_argument("--tools", type=Path, required=True, help="folder of engine_keygen and engine_run")
    parser.add_argument("--prompts", type=int, metavar="N", help="only the first N")
    parser.add_argument("--engine-run", action="store_true", help="engine_run is the client")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        keys = [protocol.new_key_file(args.tools, folder / f"{name}.key")
                for name in ("client", "server")]
        command = [*shlex.split(args.server_command), "--model", args.prepared / "body",
                   "--listen", "127.0.0.1:0", "--identity", keys[1], "--allow", f"{keys[0]}.pub"]
        with Server([*map(str, command)], folder / "server.log") as server:
            if args.engine_run:
                return golden_with_engine_run(args, server, keys, folder)
            return golden_with_numpy(args, server, keys)


if __name__ == "__main__":
    sys.exit(main())
