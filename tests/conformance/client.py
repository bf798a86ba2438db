"""A client of docs/protocol.md for tests: it can follow the protocol and it can break it. Written
from that page, not from either server; the Noise channel is the PyPI package noiseprotocol."""

import os
import queue
import subprocess
import sys
from pathlib import Path

import grpc
import lz4.block
import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from noise.connection import Keypair, NoiseConnection

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
pb = grpc.protos("proto/split_inference.proto")

METHOD = "/infemeral.v1.SplitInference/Session"
CIPHERS = {1: b"AESGCM", 2: b"ChaChaPoly"}
DTYPES = {"f32": 1, "f16": 2, "i8": 3}
NONE, LAST, ALL = 0, 1, 2
TIMEOUT = 60


class Ended(Exception):
    """The server ended the stream; `code` is a grpc.StatusCode."""

    def __init__(self, code, details):
        super().__init__(f"{code}: {details}")
        self.code = code


class Refused(Exception):
    """An Error frame."""

    def __init__(self, error):
        super().__init__(error.message)
        self.code, self.message = error.code, error.message


# ---- rows on the wire, from the table in docs/protocol.md ----


def encode(dtype, rows):
    if dtype == "f32":
        return rows.astype("<f4").tobytes()
    if dtype == "f16":
        return np.clip(rows, -65504, 65504).astype("<f2").tobytes()
    out = b""
    for row in rows:
        blocks = [row[i:i + 64] for i in range(0, len(row), 64)]
        scales = np.array([np.abs(b).max() / 127 for b in blocks]).astype("<f2")
        values = [np.rint(b / s if s > 0 else 0 * b).clip(-127, 127)
                  for b, s in zip(blocks, scales.astype(np.float64))]
        out += scales.tobytes() + np.concatenate(values).astype(np.int8).tobytes()
    return out


def decode(dtype, data, rows, cols):
    if dtype == "f32":
        return np.frombuffer(data, "<f4").reshape(rows, cols)
    if dtype == "f16":
        return np.frombuffer(data, "<f2").reshape(rows, cols).astype(np.float32)
    blocks = (cols + 63) // 64
    out = np.empty((rows, cols), np.float32)
    for i in range(rows):
        row = data[i * (2 * blocks + cols):(i + 1) * (2 * blocks + cols)]
        scales = np.frombuffer(row[:2 * blocks], "<f2").astype(np.float32)
        values = np.frombuffer(row[2 * blocks:], np.int8).astype(np.float32)
        out[i] = values * np.repeat(scales, 64)[:cols]
    return out


def new_key():
    key = X25519PrivateKey.generate()
    raw = serialization.Encoding.Raw
    return (key.private_bytes(raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()),
            key.public_key().public_bytes(raw, serialization.PublicFormat.Raw))


def new_key_file(tools, path):
    subprocess.run([tools / "engine_keygen", "--output", path], check=True, capture_output=True)
    return path


# ---- a stream, with nothing in it yet ----


class Stream:
    def __init__(self, address, options=()):
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1), *options])
        self._outgoing = queue.Queue()
        # Bytes, so that a test can send what is no message.
        call = self.channel.stream_stream(METHOD)
        self.call = call(iter(self._outgoing.get, None), timeout=TIMEOUT, wait_for_ready=True)

    def write(self, envelope):
        self._outgoing.put(envelope if isinstance(envelope, bytes)
                           else envelope.SerializeToString())

    def done_writing(self):
        self._outgoing.put(None)

    def read(self):
        try:
            return pb.Envelope.FromString(next(self.call))
        except StopIteration:
            raise Ended(grpc.StatusCode.OK, "") from None
        except grpc.RpcError as error:
            raise Ended(error.code(), error.details()) from None

    def ending(self):
        """The status' code, after whatever still comes."""
        try:
            while True:
                self.read()
        except Ended as end:
            return end.code
        finally:
            self.close()

    def close(self):
        self.done_writing()
        self.call.cancel()
        self.channel.close()


# ---- a client ----


class Client(Stream):
    """After the handshake."""

    def __init__(self, address, secret, server_public, body, cipher=2, options=()):
        super().__init__(address, options)
        self.body = body  # (fingerprint, commitment, hidden size)
        self.hello = self.first_message(secret, server_public, cipher)
        self.write(self.hello)
        try:
            answer = self.read()
            self.noise.read_message(answer.data)
        except Exception:
            self.close()
            raise
        assert len(answer.data) == 48, f"message 2 has {len(answer.data)} bytes"
        self._frames, self._pieces, self.request = [], b"", 0
        self.replace_key = lambda: False  # whether the next record is the last under its key
        self.keys_seen = 0  # that the server replaced
        self.frame_size = 0  # of the last frame that came

    def first_message(self, secret, server_public, cipher, payload=b""):
        self.noise = NoiseConnection.from_name(b"Noise_IK_25519_" + CIPHERS[cipher] + b"_SHA256")
        self.noise.set_prologue(b"Infemeral/SplitInference" + bytes([0, 0, 0, 1, 0, 0, 0, cipher]))
        self.noise.set_as_initiator()
        self.noise.set_keypair_from_private_bytes(Keypair.STATIC, secret)
        self.noise.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, server_public)
        self.noise.start_handshake()
        data = bytes(self.noise.write_message(payload))
        return pb.Envelope(hello=pb.Hello(version=1, cipher=cipher), data=data)

    # Records and frames.

    def record(self, plaintext):
        message = self.noise.encrypt(plaintext)
        if plaintext and plaintext[0] & 2:
            self.noise.rekey_outbound_cipher()
        return len(message).to_bytes(2, "big") + message

    def records(self, frame):
        data = frame if isinstance(frame, bytes) else frame.SerializeToString()
        pieces = [data[i:i + 65518] for i in range(0, len(data), 65518)] or [b""]
        return [self.record(bytes([(i + 1 < len(pieces)) | 2 * self.replace_key()]) + piece)
                for i, piece in enumerate(pieces)]

    def send(self, frame):
        for record in self.records(frame):
            self.write(pb.Envelope(data=record))

    def receive(self):
        while not self._frames:
            data = self.read().data
            assert data, "the server sent an empty envelope"
            while data:
                size = int.from_bytes(data[:2], "big")
                plain = self.noise.decrypt(data[2:2 + size])
                data = data[2 + size:]
                self._pieces += plain[1:]
                if plain[0] & 2:
                    self.noise.rekey_inbound_cipher()
                    self.keys_seen += 1
                if plain[0] in (0, 2):
                    self.frame_size = len(self._pieces)
                    self._frames.append(pb.Frame.FromString(self._pieces))
                    self._pieces = b""
                else:
                    assert plain[0] in (1, 3) and len(plain) == 65519, "a piece that is not full"
        return self._frames.pop(0)

    def frame(self, **kind):
        self.request += 1
        return pb.Frame(version=1, request=self.request, **kind)

    def ask(self, frame):
        self.send(frame)
        answer = self.receive()
        assert answer.version == 1 and answer.request == frame.request, answer
        if answer.WhichOneof("kind") == "error":
            raise Refused(answer.error)
        return answer

    # Requests.

    def open_frame(self, fingerprint=None, commitment=None, hidden_size=None, pad=False):
        ours = self.body
        return self.frame(open=pb.Open(
            model_fingerprint=ours[0] if fingerprint is None else fingerprint,
            cloak_commitment=ours[1] if commitment is None else commitment,
            hidden_size=ours[2] if hidden_size is None else hidden_size, pad=pad))

    def open(self):
        opened = self.ask(self.open_frame()).opened
        assert opened.session != 0 and opened.hidden_size == self.body[2]
        return opened

    def step_frame(self, session, start, rows, wanted=ALL, dtype="f32", data=None, lz4_block=False,
                   count=None):
        raw = encode(dtype, rows) if data is None else data
        if lz4_block and data is None:
            raw = lz4.block.compress(raw, store_size=False)
        tensor = pb.Tensor(dtype=DTYPES[dtype], compression=int(lz4_block), data=raw)
        return self.frame(step=pb.Step(session=session, start_pos=start, wanted=wanted,
                                       rows=len(rows) if count is None else count, tensor=tensor))

    def output(self, frame, dtype="f32"):
        """The rows of an Output, checked against its own numbers."""
        output = frame.output
        assert np.isfinite(output.compute_ms) and output.compute_ms >= 0
        assert output.HasField("tensor") == (output.rows > 0)
        cols = self.body[2]
        if output.rows == 0:
            return np.empty((0, cols), np.float32)
        assert output.tensor.dtype == DTYPES[dtype], "another dtype than the step's"
        data = output.tensor.data
        if output.tensor.compression == 1:
            size = output.rows * len(encode(dtype, np.zeros((1, cols))))
            assert size > 4096
            data = lz4.block.decompress(data, uncompressed_size=size)
        return decode(dtype, data, output.rows, cols)

    def step(self, session, start, rows, wanted=ALL, dtype="f32", **more):
        answer = self.ask(self.step_frame(session, start, rows, wanted, dtype, **more))
        assert answer.output.kv_len == start + len(rows), answer.output.kv_len
        out = self.output(answer, dtype)
        assert len(out) == {NONE: 0, LAST: 1, ALL: len(rows)}[wanted]
        return out


def random_seed():
    return int.from_bytes(os.urandom(4), "big")
