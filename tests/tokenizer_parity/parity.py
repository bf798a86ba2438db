#!/usr/bin/env python3
"""Compares this tokenizer with Hugging Face's `tokenizers`, string by string.

  parity.py --driver BUILD/tests/tokenizer_driver [--tokenizer-json SmolLM2/tokenizer.json]...

Every vocabulary is asked to encode every string (as bytes, special-token text as text and as
tokens), to encode it in segments, to decode what came out, and to decode random ids. Prints one line
a vocabulary and leaves with 1 at the first one that differs anywhere.
"""

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tokenizers  # noqa: E402

import strings  # noqa: E402
import vocabularies  # noqa: E402


class Requests:
    """What the driver is asked, and what Hugging Face answers."""

    def __init__(self):
        self.bytes = bytearray()
        self.expected = []  # (ids or text, description)

    def text(self, data):
        self.bytes += struct.pack("<I", len(data)) + data

    def encode(self, data, add_special, parse_special, ids):
        self.bytes += struct.pack("<cBB", b"E", add_special, parse_special)
        self.text(data)
        self.expected.append((ids, f"encode {data[:200]!r} add={add_special} parse={parse_special}"))

    def segments(self, parts, ids):
        self.bytes += struct.pack("<cBI", b"S", 0, len(parts))
        for data, parse_special in parts:
            self.bytes += struct.pack("<B", parse_special)
            self.text(data)
        self.expected.append((ids, f"segments {parts!r}"))

    def decode(self, ids, skip_special, text):
        self.bytes += struct.pack("<cBI", b"D", skip_special, len(ids))
        self.bytes += struct.pack(f"<{len(ids)}i", *ids)
        self.expected.append((text, f"decode {list(ids)[:60]} skip={skip_special}"))


def compare(driver, path, requests, report):
    """Number of answers that differ; describes the first few."""
    output = subprocess.run([driver, path], input=bytes(requests.bytes), check=True,
                            stdout=subprocess.PIPE).stdout
    mismatches, pos = 0, 0
    for expected, what in requests.expected:
        ok, count = struct.unpack_from("<BI", output, pos)
        pos += 5
        size = count if isinstance(expected, str) or not ok else 4 * count
        data = output[pos:pos + size]
        pos += size
        if not ok:
            answer = "error: " + data.decode()
        elif isinstance(expected, str):
            answer = data.decode()
        else:
            answer = list(struct.unpack(f"<{count}i", data))
        if answer != expected:
            mismatches += 1
            if report and mismatches <= 5:
                print(f"  {what}\n    here {answer!r:.400}\n    HF   {expected!r:.400}")
    if pos != len(output):
        raise SystemExit("the driver answered more than it was asked")
    return mismatches


def check(driver, name, path, texts, seed):
    rng = random.Random(seed)
    peer = tokenizers.Tokenizer.from_file(path)
    peer.no_truncation()
    peer.no_padding()
    decoded = [data.decode("utf-8", "replace") for data in texts]
    add_special = rng.random() < 0.5
    requests = Requests()
    sequences = []
    for parse_special in (False, True):
        peer.encode_special_tokens = not parse_special
        for data, encoding in zip(texts, peer.encode_batch_fast(
                decoded, add_special_tokens=add_special)):
            requests.encode(data, add_special, parse_special, encoding.ids)
            if parse_special:
                sequences.append(encoding.ids)
        add_special = not add_special

    # A conversation: special tokens in the trusted parts only, and nothing like them elsewhere.
    special = sorted(t.content for t in peer.get_added_tokens_decoder().values() if t.special)
    plain = [t for t in decoded if t and not any(s in t for s in special)
             and not any(c in t for c in "<|[")]
    conversations = []
    for _ in range(len(texts) // 10 if special and plain else 0):
        parts = []
        for _ in range(rng.randrange(1, 5)):
            parts.append((rng.choice(special) + rng.choice(["", "user\n", " "]), True))
            parts += [(rng.choice(plain), False)] * rng.randrange(0, 3)
        conversations.append(parts)
    joined = ["".join(t for t, _ in parts) for parts in conversations]
    for parts, encoding in zip(conversations,
                               peer.encode_batch_fast(joined, add_special_tokens=False)):
        requests.segments([(t.encode(), trusted) for t, trusted in parts], encoding.ids)

    # Ids at random: characters in pieces, special tokens, ids that do not exist.
    size = peer.get_vocab_size()
    pieces = sorted(i for t, i in peer.get_vocab().items() if len(t) == 1 or t.startswith("<0x"))
    for _ in range(len(texts) // 4):
        pool = rng.choice([pieces, range(size), range(size + 5)])
        sequences.append([rng.choice(pool) for _ in range(rng.randrange(1, 30))])
    # Asked to skip special tokens, Hugging Face keeps those whose text the normaliser changes.
    kept = any(peer.id_to_token(i) != t.content
               for i, t in peer.get_added_tokens_decoder().items() if t.special)
    for skip in (False,) if kept else (False, True):
        for ids, text in zip(sequences, peer.decode_batch(sequences, skip_special_tokens=skip)):
            requests.decode(ids, skip, text)

    mismatches = compare(driver, path, requests, report=True)
    print(f"{name}: {len(texts)} strings, {len(requests.expected)} comparisons, "
          f"{mismatches} mismatches", flush=True)
    return mismatches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver", required=True, help="the tokenizer_driver program")
    parser.add_argument("--tokenizer-json", action="append", default=[],
                        help="a real tokenizer.json to check on all strings; may be repeated")
    parser.add_argument("--strings", type=int, default=100000,
                        help="strings for each --tokenizer-json and for byte_fallback")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one, printed")
    parser.add_argument("--only", help="only the vocabularies whose name contains this")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"tokenizers {tokenizers.__version__}, seed {seed}", flush=True)
    if not options.tokenizer_json:
        print("no --tokenizer-json: only the vocabularies built here are checked")
    start = time.monotonic()

    texts = strings.all_strings(seed, options.strings)
    rng = random.Random(seed)
    fewer = rng.sample(texts, len(texts) // 20)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(path, path, texts) for path in options.tokenizer_json]
        for name, document in vocabularies.build().items():
            path = os.path.join(folder, name + ".json")
            with open(path, "w", encoding="utf-8") as file:
                json.dump(document, file, ensure_ascii=False)
            jobs.append((name, path, texts if name == "byte_fallback" else fewer))
        for name, path, strings_of_job in jobs:
            if options.only is None or options.only in name:
                failed += check(options.driver, name, path, strings_of_job, seed) != 0
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
