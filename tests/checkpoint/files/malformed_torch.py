"""Broken and hostile torch.save archives, by what is wrong with them; as a program, reads them all.

Zips and pickles are put together by hand, so that each part of them can be another.
"""

import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.checkpoint.files.malformed import Malformed
from tests.checkpoint.peak_memory import print_growth
from tramontane.checkpoint.files.torch_file import read_torch_table

_LOCAL = ("signature", "version", "flags", "method", "time", "date", "crc", "packed", "size",
          "name_size", "extra_size")  # fmt: skip
_ENTRY = ("signature", "by", "version", "flags", "method", "time", "date", "crc", "packed",
          "size", "name_size", "extra_size", "comment_size", "disk", "inner", "outer",
          "offset")  # fmt: skip
_END = ("signature", "disk", "start_disk", "here", "count", "length", "begin", "comment_size")
_FULL = 2**32 - 1  # of a size: it is in the zip64 part


class Changes(NamedTuple):
    """Fields of a zip that are to be other than they should, for members by their number."""

    local: Mapping[int, Mapping[str, int]] = {}
    entry: Mapping[int, Mapping[str, int]] = {}
    end: Mapping[str, int] = {}
    local_names: Mapping[int, bytes] = {}
    extra: bytes = b""  # of all entries
    before: bytes = b""
    after: bytes = b""


def encode_zip(
    members: Sequence[tuple[str | bytes, bytes]], changes: Changes | None = None
) -> bytes:
    """An archive of stored members."""
    changes = changes or Changes()
    out, directory = bytearray(changes.before), bytearray()
    for number, (name, content) in enumerate(members):
        name = name.encode() if isinstance(name, str) else name
        fields = {"packed": len(content), "size": len(content), "name_size": len(name)}
        entry = fields | {"offset": len(out), "extra_size": len(changes.extra)}
        local_name = changes.local_names.get(number, name)
        fields["name_size"] = len(local_name)
        out += _pack("<4s5H3IHH", _LOCAL, b"PK\3\4", fields | {**changes.local.get(number, {})})
        out += local_name + content
        entry |= changes.entry.get(number, {})
        directory += _pack("<4s6H3I5HII", _ENTRY, b"PK\1\2", entry) + name + changes.extra
    end = {"here": len(members), "count": len(members), "length": len(directory), "begin": len(out)}
    packed_end = _pack("<4s4HIIH", _END, b"PK\5\6", end | {**changes.end})
    return bytes(out + directory + packed_end) + changes.after


def _pack(layout: str, names: Sequence[str], signature: bytes, fields: Mapping[str, int]) -> bytes:
    return struct.pack(layout, signature, *(fields.get(name, 0) for name in names[1:]))


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """LONG1."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"
END = b"."


def storage(
    *,
    kind: bytes = FLOATS,
    key: bytes = text("0"),
    count: bytes = number(2),
    tag: bytes = text("storage"),
) -> bytes:
    """A persistent id; by default the two fp32 values of data/0."""
    return b"(" + tag + kind + key + text("cpu") + count + b"tQ"


def tensor(
    stored: bytes | None = None,
    *,
    offset: bytes = number(0),
    shape: bytes = number(2) + b"\x85",
    strides: bytes = number(1) + b"\x85",
    needs_grad: bytes = b"\x89",
    hooks: bytes = HOOKS,
    function: bytes = REBUILD,
) -> bytes:
    """A call that rebuilds a tensor."""
    stored = storage() if stored is None else stored
    return function + b"(" + stored + offset + shape + strides + needs_grad + hooks + b"tR"


def state(*items: bytes) -> bytes:
    """A whole pickle: a dict of keys and values in turn."""
    return b"\x80\x02}(" + b"".join(items) + b"u" + END


def archive(
    pickle: bytes, *, data: bytes = b"\0" * 8, changes: Changes | None = None, **notes: bytes
) -> bytes:
    """What torch.save writes: one storage, and `notes` beside it."""
    members = [("a/data.pkl", pickle), ("a/data/0", data)]
    return encode_zip(members + [(f"a/{name}", note) for name, note in notes.items()], changes)


def _w(value: bytes) -> bytes:
    return archive(state(text("w"), value))


def _run(opcodes: bytes) -> bytes:
    return archive(b"\x80\x02" + opcodes)


def _zip(**changes: object) -> bytes:
    return archive(state(text("w"), tensor()), changes=Changes(**changes))  # type: ignore[arg-type]


GOOD = state(text("w"), tensor())
_SYSTEM = b"cos\nsystem\n"
_CALL = text("touch canary") + b"\x85R"
_PAIR = number(2) + number(2) + b"\x86"

HOSTILE: dict[str, Malformed] = {
    "os.system": Malformed(_run(_SYSTEM + _CALL + END), "byte 2: os.system is not one of the"),
    "posix.system in a dict": Malformed(
        _w(b"cposix\nsystem\n" + _CALL), "posix.system is not one of the names"
    ),
    "builtins.exec": Malformed(_w(b"cbuiltins\nexec\n" + _CALL), "builtins.exec is not one"),
    "builtins.eval beside a tensor": Malformed(
        archive(state(text("v"), tensor(), text("w"), b"c__builtin__\neval\n" + _CALL)),
        "__builtin__.eval is not one",
    ),
    "STACK_GLOBAL": Malformed(
        _run(text("os") + text("system") + b"\x93" + _CALL + END), "os.system is not one"
    ),
    "STACK_GLOBAL with a dotted name": Malformed(
        _run(text("torch") + text("_utils._rebuild_tensor_v2") + b"\x93."), "is not one of"
    ),
    "STACK_GLOBAL through the memo": Malformed(
        _run(text("system") + b"q\0" + text("os") + b"h\0\x93" + _CALL + END), "os.system is not"
    ),
    "STACK_GLOBAL of no strings": Malformed(_run(b")}\x93."), "is not one of the names"),
    "torch.load": Malformed(_w(b"ctorch\nload\n" + _CALL), "torch.load is not one"),
    "torch.storage._load_from_bytes": Malformed(
        _w(b"ctorch.storage\n_load_from_bytes\n" + _CALL), "torch.storage._load_from_bytes is not"
    ),
    "name with an escape": Malformed(_w(b"co\x1b[0ms\nsystem\n"), "'o\\x1b[0ms'.system is not one"),
    "name without end": Malformed(_w(b"c" + b"a" * 5000), "the name of a constructor has no end"),
    "a function in place of the hooks": Malformed(
        _w(tensor(hooks=_SYSTEM)), "os.system is not one of the names"
    ),
    "a call in place of the storage": Malformed(_w(tensor(_SYSTEM + _CALL)), "os.system is not"),
    "a call as the shape": Malformed(_w(tensor(shape=_SYSTEM + _CALL)), "os.system is not"),
    "a call in a persistent id": Malformed(
        _w(tensor(storage(kind=_SYSTEM))), "os.system is not one of the names"
    ),
    "INST": Malformed(_run(b"(" + text("touch canary") + b"ios\nsystem\n."), "0x69 (INST) is ref"),
    "OBJ": Malformed(_run(b"(" + FLOATS + b"o."), "opcode 0x6f (OBJ) is refused"),
    "NEWOBJ": Malformed(_run(FLOATS + b")\x81."), "opcode 0x81 (NEWOBJ) is refused"),
    "NEWOBJ_EX": Malformed(_run(FLOATS + b")}\x92."), "opcode 0x92 (NEWOBJ_EX) is refused"),
    "EXT1": Malformed(_run(b"\x82\x01."), "opcode 0x82 (EXT1) is refused"),
    "PERSID": Malformed(_run(b"Pstorage\n."), "opcode 0x50 (PERSID) is refused"),
    "unknown opcode": Malformed(_run(b"\xff."), "opcode 0xff (unknown) is refused"),
    "a float": Malformed(_w(b"G" + b"\0" * 8), "opcode 0x47 (BINFLOAT) is refused"),
    "a list": Malformed(_w(b"]"), "opcode 0x5d (EMPTY_LIST) is refused"),
    "call of a storage type": Malformed(_w(FLOATS + b")R"), "a call of a torch.FloatStorage with"),
    "call of a string": Malformed(_w(text("os.system") + b")R"), "a call of a str with tuple"),
    "call of a called dict": Malformed(_w(HOOKS + b")R"), "a call of a OrderedDict with tuple"),
    "OrderedDict of something": Malformed(
        _w(b"ccollections\nOrderedDict\n" + text("a") + b"\x85R"), "a call of a collections.Ordered"
    ),
    "attributes of a dict": Malformed(_run(b"}}b."), "attributes are set on a dict"),
    "attributes of a tensor": Malformed(_w(tensor() + b"}b"), "attributes are set on a TensorView"),
    "attributes of a name": Malformed(_w(REBUILD + b"}b"), "attributes are set on a torch._utils."),
    "other attributes": Malformed(
        _run(HOOKS + b"}" + text("__class__") + FLOATS + b"sb."), "attributes are set on a Ordered"
    ),
    "persistent id of a string": Malformed(_w(text("0") + b"Q"), "a persistent id is not one of"),
    "persistent id of a dict": Malformed(_w(b"}Q"), "a persistent id is not one of a storage"),
    "persistent id of four": Malformed(
        _w(b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"tQ"), "a persistent id"
    ),
    "persistent id of a module": Malformed(_w(tensor(storage(tag=text("module")))), "a persistent"),
    "storage of a string": Malformed(_w(tensor(storage(kind=text("x")))), "a persistent id is not"),
    "storage of a function": Malformed(_w(tensor(storage(kind=REBUILD))), "a persistent id is not"),
    "storage of whole numbers": Malformed(
        _w(tensor(storage(kind=b"ctorch\nLongStorage\n"))), "torch.LongStorage is not one of"
    ),
    "storage with a number as its key": Malformed(_w(tensor(storage(key=number(0)))), "a persist"),
    "memo of nothing": Malformed(_run(b"h\7."), "the memo has no value 7"),
    "memo of a mark": Malformed(_run(b"(q\0."), "a value is needed, but none is on the stack"),
    "memo beyond any": Malformed(_run(b"j\xff\xff\xff\xff."), "the memo has no value 4,294,967"),
    "a dict in itself": Malformed(
        _run(b"}q\0" + text("w") + b"h\0s."), "w is a dict, not a tensor; save the model's"
    ),
    "a mark taken as a value": Malformed(_run(b"}(Q."), "1 values are needed, fewer are on"),
    "tuple without mark": Malformed(_run(b"}t."), "a mark is needed, but there is none"),
    "TUPLE3 of two": Malformed(_run(b"NN\x87."), "3 values are needed, fewer are on the stack"),
    "odd number of items": Malformed(archive(state(text("w"))), "1 keys and values for a dict"),
    "items for a tuple": Malformed(_run(b")(" + text("w") + b"Nu."), "2 keys and values for a tup"),
    "key is a number": Malformed(archive(state(number(1), tensor())), "a key is a int instead of"),
    "key is a dict": Malformed(archive(state(b"}", tensor())), "a key is a dict instead of"),
    "the same key twice": Malformed(
        archive(state(text("w"), tensor(), text("w"), tensor())), "the key 'w' is there twice"
    ),
    "no STOP": Malformed(_run(b"}"), "the pickle ends without STOP; incomplete download?"),
    "two values": Malformed(_run(b"}}."), "the pickle stops with 2 values, 0 marks"),
    "a mark is left": Malformed(_run(b"}(."), "the pickle stops with 1 values, 1 marks"),
    "bytes after STOP": Malformed(_run(b"}." + _SYSTEM), "and 11 bytes left, instead of one value"),
    "protocol 1": Malformed(archive(b"\x80\x01}."), "protocol 1 is declared"),
    "protocol 9": Malformed(archive(b"\x80\x09}."), "protocol 9 is declared"),
    "protocol in the middle": Malformed(_run(b"}\x80\x02."), "byte 3: protocol 2 is declared"),
    "frame too long": Malformed(_run(b"\x95" + b"\xff" * 8 + b"}."), "a frame of 18,446,744,073,"),
    "string too long": Malformed(_run(b"X\xff\xff\xff\xff."), "4,294,967,295 bytes are needed, 1"),
    "string is not UTF-8": Malformed(_run(b"X\1\0\0\0\xff."), "a string is not valid UTF-8"),
    "half a number": Malformed(_run(b"J\0"), "the pickle ends inside of a number"),
    "stack without end": Malformed(_run(b"}" * 20_000), "more than 10,000 values wait on the"),
    "marks without end": Malformed(_run(b"(" * 20_000), "more than 10,000 values wait"),
    "not a dict": Malformed(_run(tensor() + END), "holds a TensorView, not a state dict"),
    "number for a tensor": Malformed(_w(number(3)), "w is a int, not a tensor"),
    "a nested dict": Malformed(_w(b"}" + text("v") + tensor() + b"s"), "w is a dict, not a tensor"),
    "a parameter": Malformed(
        _w(b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88" + HOOKS + b"tR"),
        "torch._utils._rebuild_parameter is not one of the names",
    ),
    "a tensor with hooks": Malformed(
        _w(tensor(hooks=HOOKS + text("a") + b"Ns")), "a tensor is built from other things"
    ),
    "a tensor without storage": Malformed(_w(tensor(b"N")), "a tensor is built from other things"),
    "a tensor of four arguments": Malformed(
        _w(REBUILD + b"(" + storage() + number(0) + _PAIR + b"\x89tR"), "a tensor is built from"
    ),
    "negative offset": Malformed(_w(tensor(offset=number(-1))), "offset of a tensor is [-1]"),
    "boolean offset": Malformed(_w(tensor(offset=b"\x88")), "the offset of a tensor is [True]"),
    "offset beyond the storage": Malformed(
        _w(tensor(offset=number(1))), "w: shape [2] at offset 1 needs more than the 2 values"
    ),
    "offset 2^70": Malformed(_w(tensor(offset=number(2**70))), "the offset of a tensor is [11805"),
    "shape is a number": Malformed(_w(tensor(shape=number(2))), "the shape of a tensor is 2:"),
    "shape of strings": Malformed(_w(tensor(shape=text("2") + b"\x85")), "of a tensor is ['2']"),
    "wrapping shape": Malformed(
        _w(tensor(shape=number(2**33) * 2 + b"\x86", strides=number(2**33) + number(1) + b"\x86")),
        "the shape of a tensor is [8589934592, 8589934592], beyond any file",
    ),
    "shape of none, but no less": Malformed(
        _w(tensor(shape=number(2**40) * 2 + number(0) + b"\x87", strides=number(1) * 3 + b"\x87")),
        "the shape of a tensor is [1099511627776, 1099511627776, 0], beyond any file",
    ),
    "rank 1,000": Malformed(
        _w(tensor(shape=b"(" + number(1) * 1000 + b"t")), "the shape of a tensor is [1, 1, 1, 1"
    ),
    "strides of another rank": Malformed(
        _w(tensor(strides=_PAIR)), "a tensor of shape [2] has the strides [2, 2]"
    ),
    "expanded": Malformed(
        _w(tensor(strides=number(0) + b"\x85")), "w is not contiguous (shape [2], strides [0])"
    ),
    "storage that is not there": Malformed(
        _w(tensor(storage(key=text("1")))), "w: its storage '1' is not in the archive"
    ),
    "storage outside of its folder": Malformed(
        _w(tensor(storage(key=text("../data.pkl")))), "its storage '../data.pkl' is not in"
    ),
    "storage larger than its member": Malformed(
        _w(tensor(storage(count=number(3)))), "w: its storage should have 3 values of 4 bytes, but"
    ),
    "storage of 2^60 values": Malformed(
        _w(tensor(storage(count=number(2**60)))), "should have 1,152,921,504,606,846,976 values"
    ),
    "storage of -1 values": Malformed(
        _w(tensor(storage(count=number(-1)))), "the number of values in a storage is [-1]"
    ),
}  # fmt: skip

ZIPS: dict[str, Malformed] = {
    "empty file": Malformed(b"", "has 0 bytes; incomplete download?"),
    "a bare pickle": Malformed(GOOD, "but a bare pickle (torch.save before 1.6"),
    "a tar archive": Malformed(b"data\0".ljust(257, b"\0") + b"ustar\0", "but a tar archive"),
    "a pointer of Git LFS": Malformed(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "anything else": Malformed(b"hello, world", "but unknown (starts with 'hello, w')"),
    "cut by one byte": Malformed(archive(GOOD)[:-1], "does not end with the directory of a zip"),
    "cut in half": Malformed(archive(GOOD)[:200], "does not end with the directory of a zip"),
    "four bytes": Malformed(b"PK\3\4", "does not end with the directory of a zip archive"),
    "trailing bytes": Malformed(_zip(after=b"\0"), "does not end with the directory of a zip"),
    "a comment": Malformed(_zip(end={"comment_size": 4}, after=b"abcd"), "does not end with"),
    "bytes before the directory's place": Malformed(
        _zip(end={"begin": 0}), "the directory of the archive is said to take bytes 0 to"
    ),
    "directory too long": Malformed(_zip(end={"length": 2**32 - 2}), "is said to take bytes"),
    "too many entries": Malformed(_zip(end={"count": 9, "here": 9}), "9 members in a directory"),
    "too few entries": Malformed(_zip(end={"count": 1, "here": 1}), "bytes of the archive's"),
    "several disks": Malformed(_zip(end={"disk": 1}), "is one part of an archive of several"),
    "other count here": Malformed(_zip(end={"here": 1}), "is one part of an archive of several"),
    "encrypted": Malformed(_zip(entry={1: {"flags": 1}}), "member 1 of 2 is encrypted"),
    "compressed": Malformed(_zip(entry={1: {"method": 8}}), "is compressed (method 8)"),
    "compressed, in its own header": Malformed(
        _zip(local={1: {"method": 8}}), "a/data/0: its own header contradicts the directory"
    ),
    "unknown flags": Malformed(_zip(entry={0: {"flags": 1 << 13}}), "has the flags 0x2000"),
    "packed size differs": Malformed(_zip(entry={1: {"packed": 4}}), "of 8 bytes takes 4 on disk"),
    "size differs in its own header": Malformed(
        _zip(local={1: {"packed": 12, "size": 12}}), "has 8 bytes in the directory of the archive, "
    ),
    "name differs in its own header": Malformed(
        _zip(local_names={1: b"a/data/9"}), "a/data/0: its own header contradicts"
    ),
    "name is not UTF-8": Malformed(encode_zip([(b"a/\xff", b"")]), "name of a member is not valid"),
    "name with an escape": Malformed(encode_zip([("a/\x1b", b"")]), "the name of a member is 'a/"),
    "the same name twice": Malformed(
        encode_zip([("a/data.pkl", GOOD), ("a/data/0", b"\0" * 8), ("a/data/0", b"\1" * 8)]),
        "a/data/0 is there twice",
    ),
    "overlap": Malformed(  # the first member holds the local header of the second
        encode_zip(
            [("a/data.pkl", GOOD + encode_zip([("a/data/0", b"\0" * 8)])), ("a/data/0", b"")],
            Changes(entry={1: {"offset": 40 + len(GOOD), "packed": 8, "size": 8}}),
        ),
        "a/data/0 overlaps a/data.pkl",
    ),
    "offset past the end": Malformed(_zip(entry={1: {"offset": 2**31}}), "a/data/0 is not at byte"),
    "offset into another member": Malformed(_zip(entry={1: {"offset": 7}}), "a/data/0 is not at"),
    "member past the directory": Malformed(
        _zip(entry={1: {"packed": 99, "size": 99}}, local={1: {"packed": 99, "size": 99}}),
        "past the ",
    ),
    "zip64 without its part": Malformed(
        _zip(entry={1: {"packed": _FULL, "size": _FULL}}), "member 1 of 2 has no zip64 sizes"
    ),
    "zip64 with huge sizes": Malformed(
        _zip(extra=struct.pack("<HHQQ", 1, 16, 2**64 - 1, 2**64 - 1),
             entry={1: {"packed": _FULL, "size": _FULL}}),
        "has 18,446,744,073,709,551,615 bytes in the directory of the archive, 8 in",
    ),
    "zip64 end that is not there": Malformed(
        archive(GOOD)[:-22] + struct.pack("<4sIQI", b"PK\6\7", 0, 2**63, 1) + archive(GOOD)[-22:],
        "no zip64 directory at byte 9,223,372,036,854,775,808",
    ),
    "zip64 end that contradicts": Malformed(
        archive(GOOD)[:-22]
        + struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 9, 9, 9, 9)
        + struct.pack("<4sIQI", b"PK\6\7", 0, len(archive(GOOD)) - 22, 1) + archive(GOOD)[-22:],
        "the two ends of the archive contradict each other",
    ),
    "no members": Malformed(b"PK\3\4" + encode_zip([], Changes(end={"begin": 4})), "has 0 members"),
    "no description": Malformed(encode_zip([("a/data/0", b"")]), "has 0 members <folder>/data.pkl"),
    "two descriptions": Malformed(
        encode_zip([("a/data.pkl", GOOD), ("b/data.pkl", GOOD)]), "has 2 members <folder>/data.pkl"
    ),
    "a program": Malformed(
        encode_zip([("a/data.pkl", GOOD), ("a/code/__torch__.py", b"")]), "is a TorchScript archive"
    ),
    "big-endian": Malformed(archive(GOOD, byteorder=b"big"), "byteorder is 'big'; only little"),
    "endless byteorder": Malformed(archive(GOOD, byteorder=b"l" * 99), "a/byteorder has 99 bytes"),
    "version 99": Malformed(archive(GOOD, version=b"99\n"), "the version of the archive is '99'"),
    "version of words": Malformed(archive(GOOD, version=b"-1"), "version of the archive is '-1'"),
    "empty description": Malformed(archive(b""), "byte 0: the pickle ends without STOP"),
}  # fmt: skip
MALFORMED = HOSTILE | ZIPS


if __name__ == "__main__":
    contents = {name: case.content for name, case in MALFORMED.items()}
    print_growth(contents, read_torch_table, Path(sys.argv[1]))
