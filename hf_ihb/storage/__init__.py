"""Folders that are there whole or not at all, and are verified before they are read."""

from hf_ihb.storage.lock import folder_lock
from hf_ihb.storage.manifest import MANIFEST_FILE, Sealing, publish, read_manifest, verify, write_manifest

__all__ = ["MANIFEST_FILE", "Sealing", "folder_lock", "publish", "read_manifest", "verify", "write_manifest"]
