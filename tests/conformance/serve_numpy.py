#!/usr/bin/env python3
"""tools/serve_torch with a body in numpy instead of PyTorch: everything but the layers themselves
is the program's own. It is how the conformance suite runs where PyTorch is too large to install.

Its keys are replaced after few bytes, so that every case goes on over many of them.

The layers are Llama's, plainly: float32, one session and one row after the other, default RoPE. A
product's last bits depend on how many rows it has; so a row has the same ones in every step.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from serve_torch.body import (WANTED_ALL, WANTED_LAST, Body, BodyInfo, BodyStep,  # noqa: E402
                              LoadError, StepError, check_positions, read_manifest)
from serve_torch.channel import RekeyLimits  # noqa: E402
from serve_torch.cli import main  # noqa: E402


class Session:
    def __init__(self, layers: int, kv_heads: int, head_dim: int):
        self.kv_len = 0
        self.keys = [np.empty((0, kv_heads, head_dim), np.float32) for _ in range(layers)]
        self.values = [np.empty((0, kv_heads, head_dim), np.float32) for _ in range(layers)]


class NumpyBody(Body):
    def __init__(self, folder: Path, max_context: int):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"cannot read the model's configuration: {error}") from None
        if config["model_type"] != "llama" or config.get("rope_scaling"):
            raise LoadError("the numpy body runs Llama with the default RoPE only")
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.eps = config["rms_norm_eps"]
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.weights = {name.removeprefix("model."): value.astype(np.float32)
                        for file in sorted(folder.glob("*.safetensors"))
                        for name, value in load_file(file).items()}
        limit = config["max_position_embeddings"]
        if max_context > limit:
            raise LoadError(f"a context of {max_context} positions was asked for; the model in "
                            f"{folder} has {limit}")
        fingerprint, commitment = read_manifest(folder)
        self.info = BodyInfo(f"llama {self.layers} layers f32 in numpy", config["hidden_size"],
                             max_context or limit,
                             2 * 4 * self.layers * self.kv_heads * self.head_dim,
                             fingerprint, commitment)

    def new_session(self) -> Session:
        return Session(self.layers, self.kv_heads, self.head_dim)

    def release(self, session: Session) -> None:
        for cache in session.keys + session.values:
            cache.fill(0)

    def run(self, steps: list[BodyStep]) -> None:
        for step in steps:
            try:
                check_positions(step, step.session.kv_len, self.info.max_context)
            except StepError as error:
                step.error = error
                continue
            rows = np.concatenate([self.forward(step.session, step.start_pos + i, row[None])
                                   for i, row in enumerate(step.states)])
            kept = {WANTED_ALL: rows, WANTED_LAST: rows[-1:]}
            step.out = kept.get(step.wanted, rows[:0])

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        bias = self.weights.get(name + ".bias")
        y = x @ self.weights[name + ".weight"].T
        return y if bias is None else y + bias

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weights[name]

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """RoPE over [rows, heads, head_dim]."""
        half = self.head_dim // 2
        angles = positions[:, None] * self.theta ** (-np.arange(half) / half)
        cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def forward(self, session: Session, start: int, x: np.ndarray) -> np.ndarray:
        rows, group = len(x), self.heads // self.kv_heads
        positions = np.arange(start, start + rows)
        hidden = np.where(np.arange(start + rows) <= positions[:, None], 0, -np.inf)
        for i in range(self.layers):
            layer = f"layers.{i}."
            h = self.norm(layer + "input_layernorm.weight", x)
            q, k, v = (self.linear(f"{layer}self_attn.{name}_proj", h).reshape(rows, -1,
                                                                               self.head_dim)
                       for name in "qkv")
            session.keys[i] = np.concatenate([session.keys[i][:start], self.rotate(k, positions)])
            session.values[i] = np.concatenate([session.values[i][:start], v])
            q = self.rotate(q, positions) / np.sqrt(self.head_dim)
            keys = np.repeat(session.keys[i], group, axis=1)
            values = np.repeat(session.values[i], group, axis=1)
            scores = np.einsum("qhd,khd->hqk", q, keys) + hidden
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", weights, values).reshape(rows, -1)
            x = x + self.linear(layer + "self_attn.o_proj", mixed.astype(np.float32))
            h = self.norm(layer + "post_attention_layernorm.weight", x)
            gate = self.linear(layer + "mlp.gate_proj", h)
            gate = gate / (1 + np.exp(-gate)) * self.linear(layer + "mlp.up_proj", h)
            x = x + self.linear(layer + "mlp.down_proj", gate)
        session.kv_len = start + rows
        return self.norm("norm.weight", x).astype(np.float32)


def load(options: argparse.Namespace, _) -> NumpyBody:
    return NumpyBody(Path(options.model), options.max_context)


if __name__ == "__main__":
    sys.exit(main(load=load, rekey=RekeyLimits(bytes=50_000)))
