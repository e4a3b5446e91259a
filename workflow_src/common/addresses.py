"""Network addresses: which of them stay on this machine, and which may be told a secret."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from workflow_src.common.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, without port) is this machine by definition."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(field: str, address: str, allow_plaintext: bool = False) -> None:
    """Raise UserError, which names `field`, where a key sent to an HTTP server at `address` would travel in clear."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{field}: {address!r} is not an address; write https://host/v1")
    if parts.username or parts.password:
        raise UserError(f"{field}: holds a name or password; put the key into its environment variable")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not allow_plaintext:
        raise UserError(f"{field}: {address!r} is unencrypted; use https:// or set allow_plaintext: true")
