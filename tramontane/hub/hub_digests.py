"""The checksums that a hub gives: in its cache a file's name, in a plain folder a note beside it.

The ETag of a file on the hub is the SHA-256 of its bytes (large files) or its git blob's SHA-1.
"""

import os
import re
from pathlib import Path

from tramontane.hub.manifest import Digest
from tramontane.hub.paths import is_snapshot

_NOTES = Path(".cache", "huggingface", "download")  # huggingface_hub writes it under local_dir
_SUFFIX = ".metadata"


def read_hub_digests(folder: Path) -> dict[str, Digest]:
    """File -> checksum of what the hub said of each file; empty where nothing came from a hub."""
    found = _read_blob_names(folder) if is_snapshot(folder) else _read_notes(folder)
    return {name: digest for name, digest in found.items() if digest is not None}


def _read_blob_names(folder: Path) -> dict[str, Digest | None]:
    """snapshots/COMMIT/FILE is a link to ../../blobs/ETAG; only its first step counts."""
    return {
        path.relative_to(folder).as_posix(): _parse_etag(Path(os.readlink(path)).name)
        for path in folder.rglob("*")
        if path.is_symlink()
    }


def _read_notes(folder: Path) -> dict[str, Digest | None]:
    """FILE.metadata has three lines: commit, ETag, time."""
    notes = folder / _NOTES
    digests = {}
    for path in notes.rglob(f"*{_SUFFIX}"):
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(4096).splitlines()
        name = path.relative_to(notes).as_posix().removesuffix(_SUFFIX)
        digests[name] = _parse_etag(lines[1].strip()) if len(lines) > 1 else None
    return digests


def _parse_etag(text: str) -> Digest | None:
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return Digest("sha256", text)
    return Digest("git-sha1", text) if re.fullmatch(r"[0-9a-f]{40}", text) else None
