"""Torrents made here, by other means than those that read them: BEP 3, 47 and 52."""

import hashlib
from typing import Any

BLOCK = 16384


def bencode(value: Any) -> bytes:
    match value:
        case int():
            return f"i{value}e".encode()
        case str():
            return bencode(value.encode())
        case bytes():
            return str(len(value)).encode() + b":" + value
        case list():
            return b"l" + b"".join(bencode(item) for item in value) + b"e"
        case dict():
            pairs = sorted(
                (key if isinstance(key, bytes) else key.encode(), item)
                for key, item in value.items()
            )
            return b"d" + b"".join(bencode(key) + bencode(item) for key, item in pairs) + b"e"
    raise TypeError(value)


def make_v1(files: dict[str, bytes], *, name: str = "model", piece: int = BLOCK) -> dict[str, Any]:
    info = {
        "name": name,
        "piece length": piece,
        "files": [{"length": len(c), "path": path.split("/")} for path, c in files.items()],
        "pieces": hash_pieces(b"".join(files.values()), piece),
    }
    return {"announce": "http://localhost/", "info": info}


def make_single(content: bytes, *, name: str = "model.gguf", piece: int = BLOCK) -> dict[str, Any]:
    pieces = hash_pieces(content, piece)
    info = {"name": name, "piece length": piece, "length": len(content), "pieces": pieces}
    return {"info": info}


def make_v2(files: dict[str, bytes], *, name: str = "model", piece: int = BLOCK) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    layers: dict[bytes, bytes] = {}
    for path, content in files.items():
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node[""] = {"length": len(content)}
        if content:
            leaves = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
            hashes = [hashlib.sha256(leaf).digest() for leaf in leaves]
            node[""]["pieces root"] = hash_tree(hashes, ceil_power(len(hashes)))
            per_piece = piece // BLOCK
            if len(content) > piece:
                layers[node[""]["pieces root"]] = b"".join(
                    hash_tree(hashes[at : at + per_piece], per_piece)
                    for at in range(0, len(hashes), per_piece)
                )
    info = {"name": name, "piece length": piece, "meta version": 2, "file tree": tree}
    return {"info": info, "piece layers": layers}


def make_hybrid(
    files: dict[str, bytes], *, name: str = "model", piece: int = BLOCK
) -> dict[str, Any]:
    """Version 2, and version 1 with each file but the last padded to whole pieces."""
    torrent = make_v2(files, name=name, piece=piece)
    entries, joined = [], b""
    for number, (path, content) in enumerate(files.items()):
        entries.append({"length": len(content), "path": path.split("/")})
        joined += content
        missing = -len(joined) % piece
        if missing and number < len(files) - 1:
            entries.append({"length": missing, "path": [".pad", str(missing)], "attr": "p"})
            joined += bytes(missing)
    torrent["info"] |= {"files": entries, "pieces": hash_pieces(joined, piece)}
    return torrent


def hash_pieces(content: bytes, piece: int) -> bytes:
    parts = [content[at : at + piece] for at in range(0, len(content), piece)]
    return b"".join(hashlib.sha1(part).digest() for part in parts)


def hash_tree(hashes: list[bytes], width: int) -> bytes:
    """From the root down: the left half, the right half; an absent leaf is zeros."""
    if width == 1:
        return hashes[0] if hashes else bytes(32)
    left, right = hashes[: width // 2], hashes[width // 2 :]
    return hashlib.sha256(hash_tree(left, width // 2) + hash_tree(right, width // 2)).digest()


def ceil_power(count: int) -> int:
    width = 1
    while width < count:
        width *= 2
    return width
