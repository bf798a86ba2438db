"""Key files (net/identity.h): one line of text, 32 bytes in URL-safe base64 behind a word."""

import base64
import hmac
import os
import re
import stat
from pathlib import Path

from .body import LoadError

PUBLIC_PREFIX = "infemeral-public:"
SECRET_PREFIX = "infemeral-secret:"
MAX_KEY_FILE = 256
BLANKS = " \t\r\n"


def _decode(text: str) -> bytes | None:
    if re.fullmatch(r"[A-Za-z0-9_-]{43}", text) is None:
        return None
    key = base64.urlsafe_b64decode(text + "=")
    # The last character has two bits that say nothing; as libsodium, only zeros are taken.
    return key if format_key("", key) == text else None


def format_key(prefix: str, key: bytes) -> str:
    return prefix + base64.urlsafe_b64encode(key).decode().rstrip("=")


def format_public_key(key: bytes) -> str:
    return format_key(PUBLIC_PREFIX, key)


def load_secret_key(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise LoadError(f"cannot open the secret key file {path}: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise LoadError(f"{path} is not a key file")
        data = file.read(MAX_KEY_FILE)
    text = data.decode("latin-1").strip(BLANKS)
    if text.startswith(PUBLIC_PREFIX):
        raise LoadError(f"{path} holds a public key; give the secret key file beside it")
    if info.st_mode & 0o077:
        raise LoadError(f"the secret key file {path} can be read by others "
                        f"(mode {stat.S_IMODE(info.st_mode):04o}); run: chmod 600 {path}")
    key = _decode(text[len(SECRET_PREFIX):]) if text.startswith(SECRET_PREFIX) else None
    if len(data) == MAX_KEY_FILE or key is None:
        raise LoadError(f"{path} is not a secret key file; engine_keygen makes one")
    return key


def parse_public_key(text: str) -> bytes:
    """LoadError otherwise, which never repeats the text: it may be a secret key."""
    text = text.strip(BLANKS)
    if text.startswith(SECRET_PREFIX):
        raise LoadError("this is a secret key; give the public one, from the file that ends in "
                        ".pub")
    key = _decode(text[len(PUBLIC_PREFIX):]) if text.startswith(PUBLIC_PREFIX) else None
    if key is None:
        raise LoadError("not a public key; it is one line of the form "
                        "infemeral-public:<43 characters>")
    return key


def load_public_keys(path: str) -> list[bytes]:
    try:
        lines = Path(path).read_bytes().decode("latin-1").split("\n")
    except OSError as error:
        raise LoadError(
            f"cannot open the list of public keys {path}: {error.strerror}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            keys.append(parse_public_key(words[0]))
        except LoadError as error:
            raise LoadError(f"{path}:{number}: {error}") from None
    if not keys:
        raise LoadError(f"{path} holds no public key")
    return keys


def allowed_clients(values: list[str]) -> list[bytes]:
    """Of --allow: public keys, or files of them."""
    keys = []
    for value in values:
        # A key with a mistake in it is no file's name: a secret one would stand in the message.
        if value.strip(BLANKS).startswith((PUBLIC_PREFIX, SECRET_PREFIX)):
            keys.append(parse_public_key(value))
        else:
            keys += load_public_keys(value)
    return keys


def contains_key(keys: list[bytes], key: bytes) -> bool:
    """In a time that depends on the length of the list alone."""
    found = False
    for candidate in keys:
        found |= hmac.compare_digest(candidate, key)
    return found
