"""Addresses of folders in buckets, and which of Snakemake's storage plugins reads and writes there."""

from __future__ import annotations

import importlib.util
from urllib.parse import urlsplit

from workflow_src.common.errors import UserError

PLUGINS = {"s3": "s3", "gs": "gcs"}  # scheme of an address → the plugin's name


def in_bucket(place: str) -> bool:
    """Whether `place` is the address of something in a bucket, rather than a folder here."""
    return urlsplit(place).scheme in PLUGINS


def check_bucket(path: str, address: str) -> None:
    """Raise UserError for an address that means nothing, or that no installed plugin knows; `path` names its key."""
    parts = urlsplit(address)
    if "@" in parts.netloc:
        raise UserError(f"{path}: has a user or a key in its address; give credentials to the plugin (README, Buckets)")
    if parts.scheme not in PLUGINS:
        raise UserError(
            f"{path}: {address!r} is not in a bucket; write {' or '.join(f'{s}://' for s in PLUGINS)}bucket/folder"
        )
    if not parts.netloc or not parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError(f"{path}: {address!r} does not name a folder in a bucket; write {parts.scheme}://bucket/folder")
    if set("{}*") & set(address) or ".." in parts.path.split("/"):
        raise UserError(
            f"{path}: {address!r} has one of {{ }} * .. in it, which Snakemake would take for something else"
        )
    plugin = f"snakemake-storage-plugin-{PLUGINS[parts.scheme]}"
    if importlib.util.find_spec(plugin.replace("-", "_")) is None:
        raise UserError(f"{path}: {parts.scheme}:// needs {plugin}; pip install -c constraints.txt {plugin}")
