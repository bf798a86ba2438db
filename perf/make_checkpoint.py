#!/usr/bin/env python3
"""Writes a Llama checkpoint of random weights as a Hugging Face folder: a real size to measure at.

The default is the shape of Llama 3 8B (16 GB). The text that such a model makes means nothing, but
every matrix has a real size and every activation a sane one, so times and memory are those of a
real model. Its logits are flatter than a trained model's.

Weights are written piece by piece, so that host memory stays below 1 GB whatever the size (a GPU's
runtime comes on top). The same seed gives the same numbers on the same kind of device; a GPU and a
CPU draw different ones.

Needs PyTorch and numpy.
"""

import argparse
import json
import math
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# name -> PyTorch's and safetensors' name, and bytes of an element
DTYPES = {
    "float16": (torch.float16, "F16", 2),
    "bfloat16": (torch.bfloat16, "BF16", 2),
    "float32": (torch.float32, "F32", 4),
}
PIECE = 1 << 25  # elements drawn at a time: 128 MiB in float32
STD = 0.02  # Llama's own initializer_range
GAIN_STD = 0.1
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
MIN_VOCAB = 256 + 2


class CheckpointError(Exception):
    """A failure that the user is told about in one sentence."""


def plan(args: argparse.Namespace) -> list[tuple[str, list[int], float, float]]:
    """All tensors as (name, shape, mean, standard deviation), in the order of the files."""
    hidden, inner = args.hidden_size, args.intermediate_size
    q, kv = args.heads * args.head_dim, args.kv_heads * args.head_dim
    # As in GPT-2: 2 * layers matrices write to the residual stream, whose variance is their sum.
    writer_std = STD / math.sqrt(2 * args.layers)
    tensors = [("model.embed_tokens.weight", [args.vocab_size, hidden], 0.0, STD)]
    for layer in range(args.layers):
        prefix = f"model.layers.{layer}."
        tensors += [
            (prefix + "input_layernorm.weight", [hidden], 1.0, GAIN_STD),
            (prefix + "self_attn.q_proj.weight", [q, hidden], 0.0, STD),
            (prefix + "self_attn.k_proj.weight", [kv, hidden], 0.0, STD),
            (prefix + "self_attn.v_proj.weight", [kv, hidden], 0.0, STD),
            (prefix + "self_attn.o_proj.weight", [hidden, q], 0.0, writer_std),
            (prefix + "post_attention_layernorm.weight", [hidden], 1.0, GAIN_STD),
            (prefix + "mlp.gate_proj.weight", [inner, hidden], 0.0, STD),
            (prefix + "mlp.up_proj.weight", [inner, hidden], 0.0, STD),
            (prefix + "mlp.down_proj.weight", [hidden, inner], 0.0, writer_std),
        ]
    tensors.append(("model.norm.weight", [hidden], 1.0, GAIN_STD))
    if not args.tied:
        tensors.append(("lm_head.weight", [args.vocab_size, hidden], 0.0, STD))
    return tensors


def split_into_shards(tensors: list, element_size: int, limit: int) -> list[list]:
    """Fills shards in order. A tensor larger than the limit has a shard of its own."""
    shards, size = [[]], 0
    for tensor in tensors:
        n_bytes = math.prod(tensor[1]) * element_size
        if shards[-1] and size + n_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n_bytes
    return shards


def write_shard(path: Path, tensors: list, dtype_name: str, generator: torch.Generator,
                before_piece: Callable[[], None] = lambda: None) -> None:
    """A safetensors file: the header's length, the header as JSON, the tensors without gaps."""
    dtype, format_name, element_size = DTYPES[dtype_name]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _, _ in tensors:
        end = offset + math.prod(shape) * element_size
        header[name] = {"dtype": format_name, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for _, shape, mean, std in tensors:
            left = math.prod(shape)
            while left > 0:
                n = min(left, PIECE)
                left -= n
                before_piece()
                values = torch.randn(n, generator=generator, device=generator.device)
                values = values.mul_(std).add_(mean).to(dtype)
                # numpy has no bfloat16, and bytes are what is wanted.
                file.write(values.cpu().view(torch.uint8).numpy().data)


def model_config(args: argparse.Namespace) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "hidden_size": args.hidden_size,
        "initializer_range": STD,
        "intermediate_size": args.intermediate_size,
        "max_position_embeddings": args.max_context,
        "mlp_bias": False,
        "num_attention_heads": args.heads,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": args.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tied,
        "torch_dtype": args.dtype,
        "use_cache": True,
        "vocab_size": args.vocab_size,
    }


def byte_alphabet() -> list[str]:
    """The visible character by which GPT-2's byte-level BPE writes each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    names = {byte: chr(byte) for byte in visible}
    names.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [names[byte] for byte in range(256)]


def tokenizer_files(args: argparse.Namespace) -> tuple[dict, dict]:
    """A byte-level BPE without merges: a token of a prompt is a byte of it. Every other id has a
    text of its own: a random model chooses those too, and then equal texts mean equal tokens."""
    tokens = byte_alphabet() + [BOS, EOS]
    tokens += [f"<|filler_{i}|>" for i in range(len(tokens), args.vocab_size)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    special = {i: {"content": tokens[i], **flags} for i in (256, 257)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): token for i, token in special.items()},
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": args.max_context,
    }
    return tokenizer, settings


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, args: argparse.Namespace) -> int:
    """Returns the bytes of weights."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(args.seed)
    element_size = DTYPES[args.dtype][2]
    tensors = plan(args)
    shards = split_into_shards(tensors, element_size, int(args.shard_gb * 1e9))
    weight_map, start = {}, time.perf_counter()
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        write_shard(folder / name, shard, args.dtype, generator)
        weight_map.update({tensor[0]: name for tensor in shard})
        print(f"{name} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
    total = sum(math.prod(tensor[1]) for tensor in tensors) * element_size
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", model_config(args))
    write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    tokenizer, settings = tokenizer_files(args)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    return total


def check(args: argparse.Namespace) -> None:
    if args.vocab_size < MIN_VOCAB:
        raise CheckpointError(f"--vocab-size must be at least {MIN_VOCAB}: bytes, begin, end")
    if args.heads % args.kv_heads != 0:
        raise CheckpointError("--kv-heads must divide --heads")
    if args.head_dim % 2 != 0:
        raise CheckpointError("--head-dim must be even")
    if args.output.exists():
        raise CheckpointError(f"{args.output} exists: remove it or choose another --output")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("PyTorch finds no GPU: use --device cpu")


def make(args: argparse.Namespace) -> str:
    check(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted run leaves no folder that looks whole.
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".checkpoint.") as scratch:
        staged = Path(scratch) / args.output.name
        staged.mkdir()
        total = write_folder(staged, args)
        os.rename(staged, args.output)
    return f"{args.output}: {total / 1e9:.2f} GB of {args.dtype} weights, seed {args.seed}"


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a Llama checkpoint of random weights as a Hugging Face folder; the "
                    "default sizes are those of Llama 3 8B.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="new folder to write", default=argparse.SUPPRESS)
    for name, value, text in (("--hidden-size", 4096, "width of the residual stream"),
                              ("--layers", 32, "transformer layers"),
                              ("--heads", 32, "attention heads"),
                              ("--kv-heads", 8, "key and value heads"),
                              ("--head-dim", 128, "width of a head"),
                              ("--intermediate-size", 14336, "width of the MLP"),
                              ("--vocab-size", 128256, "tokens"),
                              ("--max-context", 8192, "positions")):
        parser.add_argument(name, type=positive, default=value, metavar="N", help=text)
    parser.add_argument("--rope-theta", type=float, default=500000.0, metavar="X",
                        help="base of the rotary embedding")
    parser.add_argument("--tied", action="store_true", help="lm_head is the embedding table")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16",
                        help="of the weights")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB",
                        help="size of a safetensors file")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the random numbers")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="where the numbers are drawn; auto takes a GPU when there is one")
    try:
        print(make(parser.parse_args()))
    except (CheckpointError, OSError) as error:
        print(f"make_checkpoint.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
