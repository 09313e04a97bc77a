"""The hash trees of version 2 torrents (BEP 52): SHA-256 over leaves of 16 KiB."""

import hashlib

BLOCK_BYTES = 16 * 2**10
HASH_BYTES = 32


def compute_root(hashes: list[bytes], *, width: int, padding: bytes = bytes(HASH_BYTES)) -> bytes:
    """The root of a tree with `width` leaves, a power of two; those not given are `padding`."""
    assert hashes, "a tree needs a leaf"
    assert len(hashes) <= width, (len(hashes), width)
    while width > 1:
        if len(hashes) % 2:
            hashes = [*hashes, padding]
        pairs = zip(hashes[::2], hashes[1::2], strict=True)
        hashes = [hashlib.sha256(left + right).digest() for left, right in pairs]
        padding = hashlib.sha256(padding + padding).digest()
        width //= 2
    return hashes[0]


def compute_padding(width: int) -> bytes:
    """The root of a tree of `width` leaves that are all absent."""
    return compute_root([bytes(HASH_BYTES)], width=width)


def round_up_to_power_of_two(count: int) -> int:
    """3 -> 4, 4 -> 4, 1 -> 1."""
    return 1 << (count - 1).bit_length()
