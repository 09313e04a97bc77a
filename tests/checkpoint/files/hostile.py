"""Files that are small and would be large once they are read; a program that measures what they do.

Of each kind there are some that must be refused, and some that are as large as is just accepted.
Run as a program with a folder, it reads the files in it, each by the reader of its suffix, and
prints as JSON by how many KiB the peak of memory grew beyond their sizes.
"""

import ctypes
import json
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.checkpoint.files import malformed, malformed_gguf, malformed_torch
from tests.checkpoint.peak_memory import read_peak
from tramontane.bounded_json import parse_json
from tramontane.checkpoint.files.gguf_file import read_gguf
from tramontane.checkpoint.files.json_file import read_json
from tramontane.checkpoint.files.safetensors_file import read_table
from tramontane.checkpoint.files.torch_file import read_torch_table
from tramontane.errors import CheckpointError

MILLION = 10**6
VOCABULARY_MEMORY = 2**30
_EMOJI = "\U0001f600".encode()


def _parse_vocabulary(path: Path) -> object:
    return parse_json(path.read_bytes(), where=str(path), memory=VOCABULARY_MEMORY)


READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": read_table,
    "json": read_json,
    "gguf": read_gguf,
    "pt": read_torch_table,
    "vocabulary": _parse_vocabulary,
}


def _json(body: bytes) -> bytes:
    return b'{"weight_map":' + body + b"}"


def _metadata(body: bytes) -> bytes:
    return malformed.encode(b'{"__metadata__":' + body + b"}")


def _strings(content: bytes, count: int) -> bytes:
    """A GGUF with an array of equal strings."""
    return malformed_gguf.encode(
        [malformed_gguf.array("words", malformed_gguf.STRING, malformed_gguf.text(content) * count,
                              count)],
    )  # fmt: skip


def _tensors(count: int) -> bytes:
    """A GGUF with tensors of one fp16 value each."""
    align = malformed_gguf.key("general.alignment", malformed_gguf.U32, 2)
    entries = [malformed_gguf.tensor(f"{i:x}", (1,), kind=1, offset=2 * i) for i in range(count)]
    return malformed_gguf.encode([align], entries, b"\0" * 2 * count, alignment=2)


def _remember(count: int) -> bytes:
    """A pickle that remembers an empty dict again and again."""
    return malformed_torch.archive(b"\x80\x02}" + b"\x94" * count + b".")


REFUSED: dict[str, Callable[[], bytes]] = {
    "metadata of lists.safetensors": lambda: _metadata(b"[" + b"[]," * MILLION + b"[]]"),
    "empty entries.safetensors": lambda: malformed.encode(
        b"{" + b",".join(b'"%x":{}' % i for i in range(650_000)) + b"}"
    ),
    "emoji.safetensors": lambda: _metadata(b'{"a":"' + b"x" * 20 * MILLION + _EMOJI + b'"}'),
    "escaped emoji.safetensors": lambda: _metadata(
        b'{"a":"' + b"x" * 20 * MILLION + b'\\ud83d\\ude00"}'
    ),
    "lists.json": lambda: _json(b"[" + b"[]," * 2 * MILLION + b"[]]"),
    "lists of lists.json": lambda: _json(b"[" + b"[[]]," * MILLION + b"[]]"),
    "numbers.json": lambda: _json(b"[" + b"1.5," * 3 * MILLION + b"1]"),
    "emoji.json": lambda: _json(b'"' + b"x" * 12 * MILLION + _EMOJI + b'"'),
    "keys.json": lambda: b"{" + b",".join(b'"%x":1' % i for i in range(MILLION)) + b"}",
    "too large.json": lambda: _json(b'"' + b"x" * 17 * MILLION + b'"'),
    "short words.gguf": lambda: _strings(b"ab", 16 * 10**5),
    "emoji.gguf": lambda: malformed_gguf.encode(
        [malformed_gguf.key("a", malformed_gguf.STRING,
                            malformed_gguf.text(b"x" * 20 * MILLION + _EMOJI))]
    ),
    "tensors.gguf": lambda: _tensors(100_000),
    "memo.pt": lambda: _remember(10**6),
    "text.pt": lambda: malformed_torch.archive(
        malformed_torch.state(b"X" + struct.pack("<I", 20 * MILLION + 4)
                              + b"x" * 20 * MILLION + _EMOJI, malformed_torch.tensor())
    ),
}  # fmt: skip
ACCEPTED: dict[str, tuple[Callable[[int], bytes], int]] = {  # and the most there could be
    "lists.json": (lambda n: _json(b"[" + b"[[]]," * n + b"[]]"), MILLION),
    "keys.json": (lambda n: b"{" + b",".join(b'"%x":1.5' % i for i in range(n)) + b"}", MILLION),
    "words.json": (lambda n: _json(b"[" + '"\u0394\u0394",'.encode() * n + b"1]"), MILLION),
    "index.json": (
        lambda n: _json(json.dumps(
            {f"model.layers.{i}.mlp.weight": "model-00001-of-00002.safetensors" for i in range(n)}
        ).encode()),
        100_000,
    ),
    "empty tensors.safetensors": (
        lambda n: malformed.encode({f"{i:x}": malformed.entry(0, 0, shape=[0]) for i in range(n)}),
        100_000,
    ),
    "short words.gguf": (lambda n: _strings(b"ab", n), MILLION),
    "emojis.gguf": (lambda n: _strings(_EMOJI, n), MILLION),
    "tensors.gguf": (_tensors, 100_000),
    "memo.pt": (_remember, MILLION),
}  # fmt: skip


def build_largest(name: str, path: Path) -> bytes:
    """The largest file of a kind that is not refused for what it takes."""
    make, most = ACCEPTED[name]
    low, high = 1, most
    while low + most // 500 < high:
        middle = (low + high) // 2
        path.write_bytes(make(middle))
        try:
            READERS[name.rpartition(".")[2]](path)
        except CheckpointError as error:
            if "memory" in str(error):
                high = middle
                continue
        low = middle
    return make(low)


def build_vocabulary(num_tokens: int, num_merges: int) -> bytes:
    """What a tokenizer.json of a large byte-level BPE holds, its merges as today's are written."""
    tokens = [f"\u0120{i:06x}" for i in range(num_tokens)]
    merges = [[f"\u0120{i:03x}", f"{i % 4096:03x}"] for i in range(num_merges)]
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    return json.dumps({"version": "1.0", "model": model}, ensure_ascii=False, indent=1).encode()


def measure(read: Callable[[Path], object], path: Path) -> int:
    """By how many KiB reading lets the peak of this process grow beyond the file's size."""
    read(path.with_name("good." + path.suffix[1:]))  # imports, and what is made once
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    start = read_peak()
    with suppress(CheckpointError):
        read(path)
    return read_peak() - start - path.stat().st_size // 1024


def write_good_files(folder: Path) -> None:
    """A small file of each kind."""
    content: dict[str, Any] = {
        "safetensors": malformed.encode({"w": malformed.entry(0, 8)}, b"\0" * 8),
        "json": b'{"a": 1}',
        "gguf": malformed_gguf.encode([], [malformed_gguf.tensor("w")]),
        "pt": malformed_torch.archive(malformed_torch.GOOD),
        "vocabulary": b'{"a": 1}',
    }
    for suffix, good in content.items():
        (folder / f"good.{suffix}").write_bytes(good)


if __name__ == "__main__":
    paths = [p for p in sorted(Path(sys.argv[1]).iterdir()) if not p.name.startswith("good.")]
    print(json.dumps({p.name: measure(READERS[p.suffix[1:]], p) for p in paths}))
