"""Talks to noise_driver with an implementation of Noise that nobody here wrote.

usage: noise_peer.py PATH_OF_NOISE_DRIVER

The peer is the PyPI package noiseprotocol on top of cryptography. Both roles, both ciphers, fresh
keys, messages of every interesting size in both directions, and a damaged one at the end. Then
frames as docs/protocol.md cuts them into records, thousands of them, while both ends replace their
keys again and again.
"""

import os
import random
import subprocess
import sys

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from noise.connection import Keypair, NoiseConnection

CIPHERS = {1: "AESGCM", 2: "ChaChaPoly"}
SIZES = [0, 1, 15, 16, 17, 1000, 65518, 65519]
VERSION = 1
MAX_PIECE = 65518
MORE, REKEY = 1, 2  # a record's flags
FRAMES = 1000


def prologue(cipher):
    """As docs/protocol.md says, and not as the C++ code does."""
    return b"Infemeral/SplitInference" + VERSION.to_bytes(4, "big") + cipher.to_bytes(4, "big")


class Driver:
    def __init__(self, path):
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, *words):
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().decode().strip()
        if answer.startswith("error"):
            return answer
        return b"" if answer == "-" else bytes.fromhex(answer)

    def send(self, command, data):
        return self.ask(command, data.hex() or "-")


def key_pair():
    key = X25519PrivateKey.generate()
    raw = serialization.Encoding.Raw
    secret = key.private_bytes(raw, serialization.PrivateFormat.Raw, serialization.NoEncryption())
    return secret, key.public_key().public_bytes(raw, serialization.PublicFormat.Raw)


def connect(driver, cipher, driver_starts):
    """Two ends in front of their handshake, or None where the cipher is missing."""
    ours, our_public = key_pair()
    theirs, their_public = key_pair()
    peer = NoiseConnection.from_name(f"Noise_IK_25519_{CIPHERS[cipher]}_SHA256".encode())
    peer.set_prologue(prologue(cipher))
    peer.set_keypair_from_private_bytes(Keypair.STATIC, ours)
    if driver_starts:
        peer.set_as_responder()
        started = driver.ask("initiator", cipher, theirs.hex(), our_public.hex())
    else:
        peer.set_as_initiator()
        peer.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, their_public)
        started = driver.ask("responder", cipher, theirs.hex())
    if started == "error 12":
        print(f"skipped {CIPHERS[cipher]}: this processor has no instructions for it")
        return None
    assert started == b"", started
    peer.start_handshake()
    return peer


def shake_hands(driver, peer, driver_starts):
    first, second = os.urandom(20), b""
    if driver_starts:
        assert peer.read_message(driver.send("write", first)) == first
        assert driver.send("read", bytes(peer.write_message(second))) == second
    else:
        assert driver.send("read", bytes(peer.write_message(first))) == first
        assert peer.read_message(driver.send("write", second)) == second
    assert peer.handshake_finished
    assert driver.ask("hash") == peer.get_handshake_hash()


def messages(driver, peer):
    """Returns the number of exchanges."""
    for size in SIZES:
        text = os.urandom(size)
        assert peer.decrypt(driver.send("write", text)) == text
        assert driver.send("read", bytes(peer.encrypt(text))) == text
    damaged = bytearray(peer.encrypt(b"text"))
    damaged[0] ^= 1
    assert driver.send("read", bytes(damaged)) == "error 15"
    return 2 * len(SIZES) + 1


class Records:
    """The peer's end of docs/protocol.md's records."""

    def __init__(self, peer):
        self.peer = peer
        self.keys_sent = self.keys_seen = 0

    def seal(self, frame):
        data = b""
        for at in range(0, len(frame), MAX_PIECE):
            flags = MORE if at + MAX_PIECE < len(frame) else 0
            if random.random() < 0.2:
                flags |= REKEY
            message = self.peer.encrypt(bytes([flags]) + frame[at:at + MAX_PIECE])
            data += len(message).to_bytes(2, "big") + message
            if flags & REKEY:
                self.peer.rekey_outbound_cipher()
                self.keys_sent += 1
        return data

    def open(self, data):
        frame = b""
        while data:
            size = int.from_bytes(data[:2], "big")
            plain = self.peer.decrypt(data[2:2 + size])
            data = data[2 + size:]
            frame += plain[1:]
            assert bool(plain[0] & MORE) == bool(data) and plain[0] <= MORE | REKEY, plain[0]
            if plain[0] & REKEY:
                self.peer.rekey_inbound_cipher()
                self.keys_seen += 1
        return frame


def frames(driver, peer):
    """Returns the number of frames each way and of the keys that both ends replaced."""
    records = Records(peer)
    assert driver.ask("records", 5000) == b""
    for i in range(FRAMES):
        size = random.randint(3 * MAX_PIECE, 4 * MAX_PIECE) if i % 250 == 0 else 1 + i % 777
        frame = os.urandom(size)
        assert records.open(driver.send("seal", frame)) == frame
        assert driver.send("open", records.seal(frame)) == frame
    assert records.keys_seen >= 4 * 3 + FRAMES // 25, records.keys_seen
    assert records.keys_sent > 0
    # After one more key, what went before is refused.
    last = bytes(peer.encrypt(bytes([REKEY]) + b"last"))
    last = len(last).to_bytes(2, "big") + last
    peer.rekey_outbound_cipher()
    assert driver.send("open", last) == b"last"
    assert driver.send("open", last) == "error 15"
    return FRAMES, records.keys_seen, records.keys_sent


def main():
    driver = Driver(sys.argv[1])
    for cipher in CIPHERS:
        for driver_starts in (True, False):
            role = f"{CIPHERS[cipher]}, C++ as {'initiator' if driver_starts else 'responder'}"
            peer = connect(driver, cipher, driver_starts)
            if peer is None:
                continue
            shake_hands(driver, peer, driver_starts)
            print(f"{role}: {messages(driver, peer)} messages agree")
            peer = connect(driver, cipher, driver_starts)
            shake_hands(driver, peer, driver_starts)
            count, seen, sent = frames(driver, peer)
            print(f"{role}: {count} frames each way agree, over {seen} keys of C++ and {sent} of "
                  "the peer")


if __name__ == "__main__":
    main()
