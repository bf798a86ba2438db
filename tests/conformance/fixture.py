"""A prepared tiny model, keys, and servers of it: what every case of conformance.py starts from."""

import base64
import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from client import Client, random_seed


def key_bytes(path):
    return base64.urlsafe_b64decode(path.read_text().strip().split(":")[1] + "=")


class Server:
    """A running server; ends with the `with` block."""

    def __init__(self, command, log):
        self.log = log
        environment = {k: v for k, v in os.environ.items() if not k.startswith("INFEMERAL_")}
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file,
                                            stdin=subprocess.DEVNULL, text=True, env=environment)
        line = self.process.stdout.readline()
        match = re.fullmatch(r"listening on (\S+:\d+), public key (infemeral-public:\S{43})\n",
                             line)
        if match is None:
            self.process.kill()
            raise SystemExit(f"the server did not start: {line}{Path(log).read_text()}")
        self.address, self.public_text = match[1], match[2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Fixture:
    def __init__(self, args, folder):
        self.tools, self.folder = Path(args.tools).absolute(), Path(folder)
        # Servers start in several folders.
        self.server_command = [str(Path(word).absolute()) if "/" in word and Path(word).exists() else word
                               for word in shlex.split(args.server_command)]
        self.replaces_keys = args.replaces_keys
        self.seed = args.seed if args.seed is not None else random_seed()
        self.random = np.random.default_rng(self.seed)
        self.run(Path(args.make_tiny_model).absolute(), "model")
        self.tool("engine_prep", "--quiet", "--model", "model", "--output", "prepared",
                  "--body-dtype", "f32")
        for name in ("client", "other", "stranger", "server"):
            self.tool("engine_keygen", "--output", f"{name}.key")
        manifest = json.loads((self.folder / "prepared/body/infemeral.json").read_text())
        config = json.loads((self.folder / "prepared/body/config.json").read_text())
        self.hidden_size = config["hidden_size"]
        self.max_context = config["max_position_embeddings"]
        self.body = (bytes.fromhex(manifest["model_fingerprint"]),
                     bytes.fromhex(manifest["cloak_commitment"]), self.hidden_size)
        self.servers = 0

    def run(self, *command, check=True):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("INFEMERAL_")}
        result = subprocess.run(list(map(str, command)), cwd=self.folder, capture_output=True,
                                stdin=subprocess.DEVNULL, env=environment, timeout=300)
        if check and result.returncode != 0:
            raise AssertionError(f"exit {result.returncode}: {command}: {result.stderr.decode()}")
        return result

    def tool(self, name, *arguments, **more):
        return self.run(self.tools / name, *arguments, **more)

    def secret(self, name):
        return key_bytes(self.folder / f"{name}.key")

    def public(self, name):
        return key_bytes(self.folder / f"{name}.key.pub")

    def command(self, *flags, program=None, clients=("client",), listen="127.0.0.1:0"):
        command = program or self.server_command
        allow = [part for name in clients for part in ("--allow", self.folder / f"{name}.key.pub")]
        return [*map(str, [*command, "--model", self.folder / "prepared/body", "--listen", listen,
                           "--identity", self.folder / "server.key", *allow, *flags])]

    def server(self, *flags, **more):
        self.servers += 1
        return Server(self.command(*flags, **more), self.folder / f"server{self.servers}.log")

    def reference(self):
        return self.server(program=[self.tools / "engine_serve"])

    def client(self, server, name="client", **more):
        return Client(server.address, self.secret(name), self.public("server"), self.body, **more)

    def rows(self, n):
        return self.random.standard_normal((n, self.hidden_size)).astype(np.float32)


def close_to(ours, theirs, share=1e-4):
    """Rows against rows of another implementation in float32.

    A sum of n float32 products is off by at most n * 2^-24 of the sum of their sizes. The longest
    sums here have 96 terms, 14 of them follow each other in 2 layers, and the norms of what they
    add up are a few times those of the result: 1e-4 of a row's norm leaves room, and a wrong
    position, head or mask changes a row by about its whole norm.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = np.linalg.norm(ours.astype(np.float64) - theirs, axis=1)
    size = np.linalg.norm(theirs.astype(np.float64), axis=1)
    assert (error <= share * size).all(), f"rows differ by {(error / size).max():g} of their norm"


def soon(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def temporary_folder():
    return tempfile.TemporaryDirectory(prefix="infemeral-conformance-")
