"""TLS contexts for the front: certificate and key from files, and client certificates if asked for."""

from __future__ import annotations

import ssl
from pathlib import Path

from onecard.errors import UsageError


def tls_context(certificate: Path, key: Path | None = None, client_ca: Path | None = None) -> ssl.SSLContext:
    """Make the context of a server.

    Args:
        certificate: a PEM file with the certificate and those between it and the root.
        key: a PEM file with its key; None if it stands in the same file. It must not ask for a password.
        client_ca: a PEM file with the authorities that sign clients' certificates; with it, a client without one is
            refused.

    Returns:
        A context of TLS 1.2 or newer that speaks HTTP/1.1.

    Raises:
        UsageError: a file is missing, or does not hold what it should.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The TLS files {certificate}{f', {key}' if key else ''} cannot be used: {error}.",
            "Give a PEM certificate with its key, which must match and have no password.",
        ) from error
    return context


def _no_password() -> str:
    raise ValueError("the key asks for a password")
