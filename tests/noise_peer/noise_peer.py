"""Talks to noise_driver with an implementation of Noise that nobody here wrote.

usage: noise_peer.py PATH_OF_NOISE_DRIVER

The peer is the PyPI package noiseprotocol on top of cryptography. Both roles, both ciphers, fresh
keys, messages of every interesting size in both directions, and a damaged one at the end.
"""

import os
import subprocess
import sys

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from noise.connection import Keypair, NoiseConnection

CIPHERS = {1: "AESGCM", 2: "ChaChaPoly"}
SIZES = [0, 1, 15, 16, 17, 1000, 65518, 65519]
VERSION = 1


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


def converse(driver, cipher, driver_starts):
    """A whole conversation; returns the number of checks made."""
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
        return 0
    assert started == b"", started
    peer.start_handshake()

    first, second = os.urandom(20), b""
    if driver_starts:
        assert peer.read_message(driver.send("write", first)) == first
        assert driver.send("read", bytes(peer.write_message(second))) == second
    else:
        assert driver.send("read", bytes(peer.write_message(first))) == first
        assert peer.read_message(driver.send("write", second)) == second
    assert peer.handshake_finished
    assert driver.ask("hash") == peer.get_handshake_hash()

    checks = 3
    for size in SIZES:
        text = os.urandom(size)
        assert peer.decrypt(driver.send("write", text)) == text
        assert driver.send("read", bytes(peer.encrypt(text))) == text
        checks += 2
    damaged = bytearray(peer.encrypt(b"text"))
    damaged[0] ^= 1
    assert driver.send("read", bytes(damaged)) == "error 15"
    return checks + 1


def main():
    driver = Driver(sys.argv[1])
    for cipher in CIPHERS:
        for driver_starts in (True, False):
            checks = converse(driver, cipher, driver_starts)
            role = "initiator" if driver_starts else "responder"
            print(f"{CIPHERS[cipher]}, C++ as {role}: {checks} exchanges agree")


if __name__ == "__main__":
    main()
