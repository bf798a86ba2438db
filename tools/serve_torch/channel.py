"""The encrypted channel (net/noise.h, net/channel.h): Noise IK, and frames cut into records."""

import time
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseInvalidMessage

VERSION = 1
CIPHERS = {1: "AESGCM", 2: "ChaChaPoly"}
MESSAGE_1_SIZE = 96
TAG_SIZE = 16
MAX_PIECE = 65535 - TAG_SIZE - 1
RECORDS_PER_ENVELOPE = 4
MAX_ENVELOPE_BYTES = 512 * 1024

MORE, REKEY = 1, 2  # a record's flags


@dataclass
class RekeyLimits:
    """The record that reaches either limit is the last one under its key."""

    bytes: int = 64 << 30  # of plaintext
    seconds: float = 3600.0


class ChannelError(Exception):
    """Ends the connection. `name` is that of a gRPC status."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name
        self.message = message


def available_ciphers() -> list[int]:
    ciphers = list(CIPHERS)
    try:
        AESGCM(bytes(32)).encrypt(bytes(12), b"", None)
    except Exception:  # a build of OpenSSL without it
        ciphers.remove(1)
    return ciphers


def prologue(cipher: int) -> bytes:
    return b"Infemeral/SplitInference" + VERSION.to_bytes(4, "big") + cipher.to_bytes(4, "big")


class Responder:
    """The server's end of one handshake."""

    def __init__(self, cipher: int, secret_key: bytes):
        self._noise = NoiseConnection.from_name(
            f"Noise_IK_25519_{CIPHERS[cipher]}_SHA256".encode())
        self._noise.set_prologue(prologue(cipher))
        self._noise.set_as_responder()
        self._noise.set_keypair_from_private_bytes(Keypair.STATIC, secret_key)
        self._noise.start_handshake()

    def read_message(self, data: bytes) -> bytes:
        """Returns the client's static public key; UNAUTHENTICATED for another server's message."""
        state = self._noise.noise_protocol.handshake_state
        try:
            if len(data) != MESSAGE_1_SIZE:
                raise ValueError
            self._noise.read_message(data)
        except (ValueError, InvalidTag, NoiseInvalidMessage):  # ValueError: a point of low order
            raise ChannelError("UNAUTHENTICATED",
                               "the handshake was not made for this server's key") from None
        return bytes(state.rs.public_bytes)

    def write_message(self, rekey: RekeyLimits) -> tuple[bytes, "Opener", "Sealer"]:
        try:
            message = bytes(self._noise.write_message())
        except ValueError:
            raise ChannelError("UNAUTHENTICATED",
                               "the other end sent a public key that is no valid key") from None
        return message, Opener(self._noise), Sealer(self._noise, rekey)


class Sealer:
    def __init__(self, noise: NoiseConnection, limits: RekeyLimits):
        self._noise = noise
        self._limits = limits
        self._sealed, self._key_since = 0, time.monotonic()  # bytes under this key

    def _record(self, flags: int, piece: bytes) -> bytes:
        self._sealed += 1 + len(piece)
        now = time.monotonic()
        rekey = (self._sealed >= self._limits.bytes
                 or now - self._key_since >= self._limits.seconds)
        message = self._noise.encrypt(bytes([flags | (REKEY if rekey else 0)]) + piece)
        if rekey:
            self._noise.rekey_outbound_cipher()
            self._sealed, self._key_since = 0, now
        return len(message).to_bytes(2, "big") + message

    def seal(self, frame: bytes) -> list[bytes]:
        """The `data` of the envelopes that carry the frame, encrypted in this order."""
        envelopes, step = [], RECORDS_PER_ENVELOPE * MAX_PIECE
        for begin in range(0, len(frame), step):
            data = bytearray()
            for at in range(begin, min(begin + step, len(frame)), MAX_PIECE):
                flags = MORE if at + MAX_PIECE < len(frame) else 0
                data += self._record(flags, frame[at:at + MAX_PIECE])
            envelopes.append(bytes(data))
        return envelopes


class Opener:
    def __init__(self, noise: NoiseConnection):
        self._noise = noise
        self._pieces: list[bytes] = []  # of the frame that is not yet whole
        self._size = 0

    def open(self, data: bytes, max_frame: int) -> list[bytes]:
        """The frames that these records complete."""
        if not data:
            raise ChannelError("DATA_LOSS", "an envelope came without records")
        frames, at = [], 0
        while at < len(data):
            length = int.from_bytes(data[at:at + 2], "big") if len(data) - at >= 2 else 0
            if length <= TAG_SIZE or length > len(data) - at - 2:
                raise ChannelError("DATA_LOSS",
                                   "a record of the encrypted channel is cut or malformed")
            try:
                plain = self._noise.decrypt(data[at + 2:at + 2 + length])
            except NoiseInvalidMessage:
                raise ChannelError("DATA_LOSS", "a message of the encrypted channel is damaged, "
                                                "repeated or out of order") from None
            at += 2 + length
            flags = plain[0]
            if flags & ~(MORE | REKEY) or (flags & MORE and len(plain) != MAX_PIECE + 1):
                raise ChannelError("DATA_LOSS", "a record of the encrypted channel does not "
                                                "follow the protocol")
            if flags & REKEY:
                self._noise.rekey_inbound_cipher()
            self._size += len(plain) - 1
            if self._size > max_frame:
                raise ChannelError("RESOURCE_EXHAUSTED", f"a frame is larger than the {max_frame} "
                                                         "bytes that are allowed here")
            self._pieces.append(plain[1:])
            if not flags & MORE:
                frames.append(b"".join(self._pieces))
                self._pieces, self._size = [], 0
        return frames


def public_key_of(secret_key: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret_key).public_key().public_bytes_raw()
