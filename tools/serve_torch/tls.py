"""TLS underneath the Noise channel (net/tls.h), for proxies and service meshes that ask for it."""

from datetime import datetime, timezone
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .body import LoadError


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise LoadError(f"cannot open {file}: {error.strerror}") from None


def _certificates(file: str) -> tuple[bytes, x509.Certificate]:
    """The file and the first certificate in it."""
    data = _read(file)
    try:
        return data, x509.load_pem_x509_certificates(data)[0]
    except ValueError:
        raise LoadError(f"{file} holds no certificate in PEM") from None


def server_credentials(cert: str, key: str, client_ca: str) -> grpc.ServerCredentials | None:
    """None, and no TLS, without files."""
    if not (cert or key or client_ca):
        return None
    if not cert or not key:
        raise LoadError("TLS needs both --tls-cert and --tls-key")
    chain, certificate = _certificates(cert)
    key_data = _read(key)
    if certificate.not_valid_after_utc <= datetime.now(timezone.utc):
        raise LoadError(f"the certificate in {cert} has expired; renew it")
    try:
        private_key = load_pem_private_key(key_data, None)
    except (TypeError, ValueError):  # TypeError: there is a passphrase
        raise LoadError(f"{key} holds no private key in PEM that can be read without a "
                        "passphrase") from None
    if private_key.public_key() != certificate.public_key():
        raise LoadError(f"{key} is not the key of the certificate in {cert}")
    ca = _certificates(client_ca)[0] if client_ca else None
    return grpc.ssl_server_credentials([(key_data, chain)], root_certificates=ca,
                                       require_client_auth=ca is not None)
