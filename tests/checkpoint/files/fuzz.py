"""Mutations of small good files, by format: of their structure, or of their bytes.

Run as a program, it reads some thousand of them and prints what that did to the peak memory.
"""

import io
import json
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from tests.checkpoint.files import malformed, malformed_gguf, malformed_torch
from tests.checkpoint.peak_memory import print_growth
from tramontane.checkpoint.files.gguf_file import read_gguf
from tramontane.checkpoint.files.gguf_values import PACKINGS, PackedTensor
from tramontane.checkpoint.files.safetensors_file import read_table
from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.files.torch_file import read_torch_table

_INTS = [0, 1, 2, 3, 4, 7, 8, 12, 31, 32, 33, 64, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1,
         2**31, 2**32 - 1, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 32,
         2**64 - 1]  # fmt: skip
_NAMES = ["", "w", "v", "a\nb", "\x1b[31m", "\ud800", "\u2028", "n" * 255, "n" * 300, "n" * 70_000,
          "../w", "__metadata__", "a b", "\u00e9", "{x}", "%s"]  # fmt: skip


class Format(NamedTuple):
    """How to read a format, a good file of it, and how to build one with parts that are odd."""

    read: Callable[[Path], dict[str, StoredTensor]]
    good: bytes
    rebuild: Callable[[Random], bytes]


def make_case(file_format: Format, random: Random) -> bytes:
    """A mutated file: 60 % in its structure, 20 % in its bytes, 20 % in both."""
    choice = random.random()
    content = file_format.rebuild(random) if choice < 0.8 else file_format.good
    return content if choice < 0.6 else _mutate_bytes(content, random)


def check_table(table: dict[str, StoredTensor], num_bytes: int) -> None:
    """What was accepted must lie in the file and be readable; nothing else may be said of it."""
    for name, stored in table.items():
        assert stored.name == name
        assert 0 <= stored.begin <= stored.end <= num_bytes
        needed = math.prod(stored.shape) * stored.dtype.itemsize
        if isinstance(stored, PackedTensor):
            size, block = stored.packing.block_size, stored.packing.block_bytes
            needed = math.prod(stored.shape) // size * block
        assert stored.end - stored.begin == needed
        assert stored.read().shape == stored.shape


def _mutate_bytes(content: bytes, random: Random) -> bytes:
    out = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(out) + 1)
        kind = random.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = random.randrange(256)
        elif kind == 2:
            size = random.choice((1, 2, 4, 8))
            out[at : at + size] = (random.choice(_INTS) % 256**size).to_bytes(size, "little")
        elif kind == 3:
            del out[at : at + random.choice((1, 2, 4, 8, 50))]
        elif kind == 4:
            other = random.randrange(len(out) + 1)
            out[at:at] = out[other : other + random.randrange(1, 60)]
        else:
            del out[at:]
    return bytes(out)


def _odd_json(random: Random) -> Any:
    """A JSON value that has no business there; `@` are replaced in the text."""
    return random.choice([
        random.choice(_INTS), -random.choice(_INTS), 2**70, 1.5, float("nan"), 1e308, None, True,
        "", "F32", "F64", "x" * 3000, [], {}, [[]], [random.choice(_INTS)] * random.randrange(12),
        ["2"], [None, 0], {"a": {}}, "@deep@", "@deeper@", "@digits@", "@nested@",
    ])  # fmt: skip


def _rebuild_safetensors(random: Random) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shapes, position = {"w": [2, 3], "v": [4], "u": [], "t": [0, 5]}, 0
    for name, shape in shapes.items():
        dtype, size = random.choice([("F32", 4), ("F16", 2), ("BF16", 2)])
        end = position + math.prod(shape) * size
        header[name] = malformed.entry(position, end, dtype=dtype, shape=shape)
        position = end
    num_bytes, length = position, None
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(list(shapes))
        kind = random.randrange(9)
        entry = header.get(name)
        if kind == 0:
            header[name] = _odd_json(random)
        elif kind == 1 and isinstance(entry, dict):
            entry[random.choice(["dtype", "shape", "data_offsets", "more"])] = _odd_json(random)
        elif kind == 2 and isinstance(entry, dict) and entry:
            del entry[random.choice(list(entry))]
        elif kind == 3 and isinstance(entry, dict):
            begin = random.choice([0, 4, 8, 24, num_bytes, random.choice(_INTS)])
            entry["data_offsets"] = [begin, begin + random.choice([0, 8, 16, 24, 32])]
        elif kind == 4:
            header[random.choice(_NAMES)] = header.pop(name, None)
        elif kind == 5:
            header.pop(name, None)
        elif kind == 6:
            position = random.choice([0, num_bytes + 1, num_bytes - 1, num_bytes + 4096])
        elif kind == 7:
            length = random.choice(_INTS)
        elif isinstance(entry, dict):
            entry["shape"] = [random.choice(_INTS) for _ in range(random.randrange(10))]
    encoded = json.dumps(header).encode()
    depth = random.choice([100, 320, 480, 900, 980, 1000, 3000])
    for mark, value in {
        b'"@deep@"': b"[" * depth + b"]" * depth, b'"@deeper@"': b"[" * 50_000,
        b'"@digits@"': b"9" * random.choice([100, 4300, 5000]),
        b'"@nested@"': b'{"a":' * depth + b"1" + b"}" * depth,
    }.items():  # fmt: skip
        encoded = encoded.replace(mark, value)
    if random.random() < 0.05:
        encoded = encoded.replace(b'"v"', b'"w"')
    return malformed.encode(encoded, bytes(max(0, position)), length=length)


def _rebuild_gguf(random: Random) -> bytes:
    g = malformed_gguf
    keys = [
        ["general.alignment", g.U32, struct.pack("<I", 32)],
        ["general.name", g.STRING, g.text("tiny")],
        ["flag", g.BOOL, b"\1"],
        ["words", g.ARRAY, struct.pack("<IQ", g.STRING, 3) + b"".join(map(g.text, ("a", "", "b")))],
        ["scores", g.ARRAY, struct.pack("<IQ", g.F32, 2) + bytes(8)],
    ]
    tensors: list[dict[str, Any]] = [
        {"name": "w", "dims": [4, 2], "kind": 0, "offset": 0},
        {"name": "v", "dims": [32, 3], "kind": 2, "offset": 32},
        {"name": "u", "dims": [256], "kind": 14, "offset": 96},
    ]
    size, parts = 320, {}
    for _ in range(random.choice((1, 1, 2, 3))):
        key, tensor, kind = random.choice(keys), random.choice(tensors), random.randrange(11)
        odd = random.choice(_INTS)
        if kind == 0:
            key[1] = random.choice([*range(14), odd % 2**32])
        elif kind == 1:
            key[2] = _mutate_bytes(key[2], random)
        elif kind == 2:
            key[0] = _odd_name(random)
        elif kind == 3:
            keys.append(list(key))
        elif kind == 4:
            keys[0][2] = struct.pack("<I", random.choice([0, 1, 2, 3, 8, 24, 64, odd % 2**32]))
        elif kind == 5:
            tensor["kind"] = random.choice([*PACKINGS, *range(42), odd % 2**32])
        elif kind == 6:
            tensor["dims"] = [random.choice([*_INTS, 256, 512]) for _ in range(random.randrange(6))]
        elif kind == 7:
            tensor["offset"] = random.choice([0, 32, 64, 96, 128, 320, odd])
        elif kind == 8:
            tensor[random.choice(["rank", "name"])] = random.choice(
                [odd % 2**32, _odd_name(random)]
            )
        elif kind == 9:
            parts[random.choice(["num_keys", "num_tensors"])] = random.choice([0, 2, 4, odd])
        else:
            size = random.choice([0, 31, 64, 305, 306, 307, 4096])
        if random.random() < 0.1:
            tensors.append(dict(tensor))
    for tensor in tensors:  # a rank is a number, a name is bytes
        tensor["rank"] = tensor["rank"] if type(tensor.get("rank")) is int else None
        tensor["name"] = tensor["name"] if type(tensor["name"]) is not int else "x"
    packed_keys = [g.key(name, kind, value) for name, kind, value in keys]
    packed = [g.tensor(t["name"], t["dims"], kind=t["kind"], offset=t["offset"], rank=t["rank"])
              for t in tensors]  # fmt: skip
    version = random.choice([2, 3, 3, 3, 3, 3, 3, 3, 3, 1, 3 << 24])
    return g.encode(packed_keys, packed, bytes(size), version=version, **parts)


def _odd_name(random: Random) -> bytes:
    return random.choice(_NAMES).encode("utf-8", "surrogatepass")


def _split_pickle(pickle: bytes) -> list[bytes]:
    """The opcodes of a pickle, each with its argument."""
    begins = [at for _, _, at in pickletools.genops(pickle) if at is not None]
    return [pickle[a:b] for a, b in zip(begins, [*begins[1:], len(pickle)], strict=True)]


def _save(protocol: int) -> bytes:
    """What torch.save writes for a few tensors."""
    module = torch.nn.Linear(2, 3)
    state = module.state_dict()
    state["half"] = torch.ones(2, 2, dtype=torch.float16)
    state["brain"] = state["half"].to(torch.bfloat16)[1:]
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def _list_members(archive: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return [(info.filename, file.read(info)) for info in file.infolist()]


_SAVED = [_list_members(_save(protocol)) for protocol in (2, 4)]
_OPCODES = [_split_pickle(members[0][1]) for members in _SAVED]
_STRANGE = [
    *(bytes([code]) for code in range(256)), *_OPCODES[0], *_OPCODES[1], b"cos\nsystem\n",
    b"ctorch\nLongStorage\n", b"h\0", b"h\7", b"q\0", b"j\xff\xff\xff\xff", b"X\xff\xff\xff\xff",
    malformed_torch.text("x"), malformed_torch.text("storage"), malformed_torch.storage(),
    malformed_torch.tensor(), malformed_torch.HOOKS, b"\x80\x09", b"\x95" + b"\xff" * 8,
]  # fmt: skip


def _mutate_opcodes(opcodes: list[bytes], random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at, kind = random.randrange(len(opcodes)), random.randrange(6)
        if kind == 0:
            opcodes[at] = random.choice(_STRANGE)
        elif kind == 1:
            opcodes.insert(at, random.choice(_STRANGE))
        elif kind == 2:
            del opcodes[at]
        elif kind == 3:
            other = random.randrange(len(opcodes))
            opcodes[at], opcodes[other] = opcodes[other], opcodes[at]
        else:
            numbers = [i for i, code in enumerate(opcodes) if code[:1] in (b"K", b"M", b"J")]
            if numbers:
                value = random.choice([-1, -(2**40), *_INTS, 2**70])
                opcodes[random.choice(numbers)] = malformed_torch.number(value)
    return b"".join(opcodes)


def _rebuild_torch(random: Random) -> bytes:
    which = random.randrange(len(_SAVED))
    members, changes = list(_SAVED[which]), {}
    if random.random() < 0.6:
        members[0] = (members[0][0], _mutate_opcodes(list(_OPCODES[which]), random))
        return malformed_torch.encode_zip(members)
    for _ in range(random.choice((1, 1, 2))):
        at, kind = random.randrange(len(members)), random.randrange(6)
        name, content = members[at]
        odd = random.choice(_INTS)
        if kind == 0:
            members[at] = (
                random.choice([_odd_name(random)[: 2**16 - 1], b"archive/data/0"]),
                content,
            )
        elif kind == 1:
            members[at] = (name, random.choice([b"", content[:-1], content + b"\0", b"big"]))
        elif kind == 2:
            field = random.choice(
                ["signature", "flags", "method", "packed", "size", "disk", "offset"]
            )
            limit = 2**32 if field in ("packed", "size", "offset") else 2**16
            changes["entry"] = {at: {field: odd % limit}}
        elif kind == 3:
            field = random.choice(["flags", "method", "packed", "size"])
            changes["local"] = {at: {field: odd % (2**32 if field[-1] in "de" else 2**16)}}
        elif kind == 4:
            field = random.choice(["disk", "here", "count", "length", "begin"])
            changes["end"] = {field: odd % (2**32 if field in ("length", "begin") else 2**16)}
        else:
            wide = struct.pack("<HHQQQ", 1, 24, *random.choices(_INTS, k=3))
            full = random.sample(["packed", "size", "offset"], random.randrange(1, 4))
            changes |= {"extra": wide, "entry": {at: dict.fromkeys(full, 2**32 - 1)}}
    for sides in (changes.get("local", {}), changes.get("entry", {})):
        for fields in sides.values():
            if "method" in fields:
                fields["method"] %= 2**16
    return malformed_torch.encode_zip(members, malformed_torch.Changes(**changes))


FORMATS = {
    "safetensors": Format(
        read_table,
        malformed.encode({"w": malformed.entry(0, 8), "v": malformed.entry(8, 16)}, bytes(16)),
        _rebuild_safetensors,
    ),
    "gguf": Format(lambda path: read_gguf(path).tensors, _rebuild_gguf(Random(0)), _rebuild_gguf),
    "torch": Format(read_torch_table, _save(2), _rebuild_torch),
}


if __name__ == "__main__":
    random = Random(int(sys.argv[3]))
    file_format = FORMATS[sys.argv[2]]
    cases = {str(i): make_case(file_format, random) for i in range(1000)}
    print_growth(cases, file_format.read, Path(sys.argv[1]))
