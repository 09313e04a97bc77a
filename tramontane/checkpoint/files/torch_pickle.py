"""The pickle inside of a torch.save archive, followed symbolically: nothing is imported or called.

A pickle is a program for a machine with a stack. This machine knows the opcodes that a plain state
dict is written with, and five names, for each of which it makes a description of its own. All else
is refused: the opcode or the name, its position, and what to do instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any, NoReturn

import torch

from tramontane.checkpoint.files.untrusted import MAX_BYTES, MAX_RANK, is_countable, shorten
from tramontane.errors import CheckpointError

REMEDY = (
    "tramontane runs nothing out of a file: get the safetensors release of these weights, or "
    "convert them to safetensors on a machine that you can lose"
)
_MAX_OPCODES = 2**20  # 32 a tensor: some 32,000 tensors
_BYTES_PER_OPCODE = 192  # of memory; to remember a value and to build a storage cost most
_MAX_STACK = 10_000  # torch.save sets a dict's entries in batches of 1,000
_MAX_LINE = 256
_PROTOCOLS = (2, 3, 4, 5)
_METADATA = "_metadata"  # what nn.Module.state_dict() hangs on its OrderedDict


@dataclass(frozen=True)
class Storage:
    """A persistent id: a run of `num_values` values in the member `data/<key>`."""

    dtype: torch.dtype
    key: str
    num_values: int


@dataclass(frozen=True)
class TensorView:
    """A tensor: a view of a storage. `offset` and `strides` count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OrderedDict(dict[str, Any]):
    """What stands for a collections.OrderedDict: made empty, then filled."""


@dataclass(frozen=True)
class _Name:
    """An allowed name: a storage of `dtype`, or something that REDUCE may be given."""

    name: str
    dtype: torch.dtype | None = None


_TENSOR, _DICT = _Name("torch._utils._rebuild_tensor_v2"), _Name("collections.OrderedDict")
_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
    ("collections", "OrderedDict"): _DICT,
    ("torch", "FloatStorage"): _Name("torch.FloatStorage", torch.float32),
    ("torch", "HalfStorage"): _Name("torch.HalfStorage", torch.float16),
    ("torch", "BFloat16Storage"): _Name("torch.BFloat16Storage", torch.bfloat16),
}


def follow_pickle(data: bytes, *, where: str, memory: int) -> Any:
    """What the pickle describes: dicts, tuples, strings, numbers, None, and `TensorView`s.

    Raises CheckpointError, beginning with `where`, on all that a plain state dict does not need,
    and on what could take more than `memory` bytes.
    """
    machine = _Machine(data, where, memory - len(data))
    machine.run()
    return machine.stack[0]


class _Machine:
    """The stack machine. Marks are kept apart, so that no opcode can take one for a value."""

    def __init__(self, data: bytes, where: str, memory: int) -> None:
        self.data, self.where = data, where
        self.memory, self.charged = memory, 0  # bytes that may be taken, and are at most
        self.position = self.start = 0  # the next byte, and where the present opcode began
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def run(self) -> None:
        """Follow opcodes until STOP, which has to come last and to leave one value."""
        data, stack, num_bytes = self.data, self.stack, len(self.data)
        for _ in range(_MAX_OPCODES):
            self.start = position = self.position
            if position >= num_bytes:
                self.fail("the pickle ends without STOP; incomplete download?")
            opcode = data[position]
            self.position = position + 1
            if opcode == _STOP:
                self._check_end()
                return
            act = _ACTIONS.get(opcode)
            if act is None:
                self.fail(f"opcode {opcode:#04x} ({_REFUSED.get(opcode, 'unknown')}) is refused")
            self.charge(_BYTES_PER_OPCODE)
            act(self)
            if len(stack) > _MAX_STACK or len(self.marks) > _MAX_STACK:
                self.fail(f"more than {_MAX_STACK:,} values wait on the stack")
        self.fail(f"more than {_MAX_OPCODES:,} opcodes")

    def fail(self, fault: str) -> NoReturn:
        """Raise CheckpointError, saying where."""
        raise CheckpointError(f"{self.where}, byte {self.start:,}: {fault}; {REMEDY}")

    def charge(self, num_bytes: int) -> None:
        """Count memory before it is taken."""
        self.charged += num_bytes
        if self.charged > self.memory:
            self.fail(f"more than {self.memory:,} bytes of memory could be taken, beyond any model")

    def _check_end(self) -> None:
        if len(self.stack) != 1 or self.marks or self.position != len(self.data):
            self.fail(
                f"the pickle stops with {len(self.stack)} values, {len(self.marks)} marks and "
                f"{len(self.data) - self.position:,} bytes left, instead of one value alone"
            )

    def pop(self, count: int) -> list[Any]:
        """The topmost `count` values, which must lie above the last mark."""
        height = len(self.stack) - count
        if height < (self.marks[-1] if self.marks else 0):
            self.fail(f"{count} values are needed, fewer are on the stack")
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def pop_to_mark(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        if not self.marks:
            self.fail("a mark is needed, but there is none")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def look(self) -> Any:
        """The topmost value, which stays."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("a value is needed, but none is on the stack")
        return self.stack[-1]

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        begin, self.position = self.position, self.position + count
        if self.position > len(self.data):
            self.fail(f"{count:,} bytes are needed, {len(self.data) - begin:,} are left")
        return self.data[begin : self.position]

    def take_number(self, layout: Struct) -> int:
        """The next bytes as a number."""
        begin, self.position = self.position, self.position + layout.size
        if self.position > len(self.data):
            self.fail("the pickle ends inside of a number; incomplete download?")
        number: int = layout.unpack_from(self.data, begin)[0]
        return number

    def take_line(self) -> str:
        """The next line, as GLOBAL has them."""
        end = self.data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            self.fail("the name of a constructor has no end")
        line = self.take(end - self.position).decode("latin-1")
        self.position += 1
        return line

    def take_text(self, num_bytes: int) -> str:
        """The next bytes as UTF-8."""
        self.charge(5 * min(num_bytes, len(self.data)))  # bytes, and characters of up to four
        try:
            return self.take(num_bytes).decode()
        except UnicodeDecodeError as error:
            self.fail(f"a string is not valid UTF-8 ({error.reason})")

    def push_name(self, module: Any, name: Any) -> None:
        """GLOBAL and STACK_GLOBAL: what stands for an allowed name."""
        known = _NAMES.get((module, name)) if type(module) is type(name) is str else None
        if known is None:
            self.fail(
                f"{_show(module)}.{_show(name)} is not one of the names that a state dict of fp32, "
                "fp16 or bf16 needs"
            )
        self.stack.append(known)

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top."""
        target = self.look()
        if not isinstance(target, dict) or len(items) % 2:
            self.fail(f"{len(items)} keys and values for a {_describe(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                self.fail(f"a key is a {_describe(key)} instead of a string")
            if key in target:
                self.fail(f"the key {shorten(key)} is there twice")
            target[key] = value

    def reduce(self) -> None:
        """REDUCE: a call, of which only the arguments are looked at."""
        function, arguments = self.pop(2)
        if function is _DICT and arguments == ():
            self.stack.append(OrderedDict())
        elif function is _TENSOR:
            self.stack.append(self._describe_tensor(arguments))
        else:
            self.fail(
                f"a call of a {_describe(function)} with {_describe(arguments)} is not part of a "
                "plain state dict"
            )

    def _describe_tensor(self, arguments: Any) -> TensorView:
        """The arguments: storage, offset, shape, strides, requires_grad, and hooks: none."""
        nothing: tuple[Any, ...] = (None,) * 6
        is_whole = type(arguments) is tuple and len(arguments) == len(nothing)
        storage, offset, shape, strides, needs_grad, hooks = arguments if is_whole else nothing
        if type(storage) is not Storage or type(needs_grad) is not bool or hooks != OrderedDict():
            self.fail("a tensor is built from other things than a storage, and without hooks")
        self._check_sizes((offset,), "offset of a tensor")
        for sizes, what in ((shape, "shape of a tensor"), (strides, "strides of a tensor")):
            self._check_sizes(sizes, what)
        if not is_countable(shape):
            self.fail(f"the shape of a tensor is {shorten(shape)}, beyond any file")
        if len(shape) != len(strides):
            self.fail(f"a tensor of shape {shorten(shape)} has the strides {shorten(strides)}")
        return TensorView(storage, offset, shape, strides)

    def resolve_storage(self) -> None:
        """BINPERSID: ("storage", type, key, location, number of values)."""
        (key,) = self.pop(1)
        nothing: tuple[Any, ...] = (None,) * 4
        is_storage = type(key) is tuple and len(key) == 5 and key[0] == "storage"
        kind, name, location, num_values = key[1:] if is_storage else nothing
        if type(kind) is not _Name or kind.dtype is None or not type(name) is type(location) is str:
            self.fail("a persistent id is not one of a storage")
        self._check_sizes((num_values,), "number of values in a storage")
        self.stack.append(Storage(kind.dtype, name, num_values))

    def build(self) -> None:
        """BUILD: the attributes of an OrderedDict; state_dict() has _metadata, which is dropped."""
        (state,) = self.pop(1)
        target = self.look()
        if type(target) is not OrderedDict or type(state) is not dict or [*state] != [_METADATA]:
            self.fail(
                f"attributes are set on a {_describe(target)}: not part of a plain state dict"
            )

    def _check_sizes(self, sizes: Any, what: str) -> None:
        is_short = type(sizes) is tuple and len(sizes) <= MAX_RANK
        if not is_short or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in sizes):
            self.fail(f"the {what} is {shorten(sizes)}: not numbers that a file can have")


def _show(word: Any) -> str:
    """A part of a name as it stands, if it is one."""
    is_plain = type(word) is str and word.isprintable() and len(word) <= 80
    return word if is_plain else shorten(word)


def _describe(value: Any) -> str:
    return value.name if isinstance(value, _Name) else type(value).__name__


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _push_number(layout: Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take_number(layout))


def _push_text(layout: Struct) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.take_text(m.take_number(layout)))


def _push_tuple(count: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(tuple(machine.pop(count)))


def _put(layout: Struct) -> Callable[[_Machine], None]:
    def remember(machine: _Machine) -> None:
        machine.memo[machine.take_number(layout)] = machine.look()

    return remember


def _get(layout: Struct) -> Callable[[_Machine], None]:
    def recall(machine: _Machine) -> None:
        number = machine.take_number(layout)
        if number not in machine.memo:
            machine.fail(f"the memo has no value {number:,}")
        machine.stack.append(machine.memo[number])

    return recall


def _begin(machine: _Machine) -> None:
    """PROTO, which stands first."""
    protocol = machine.take_number(_U8)
    if machine.start or protocol not in _PROTOCOLS:
        machine.fail(f"protocol {protocol} is declared; {_PROTOCOLS} are known, at the start alone")


def _frame(machine: _Machine) -> None:
    """FRAME, from protocol 4 on: the number of bytes that follow."""
    num_bytes, num_left = machine.take_number(_U64), len(machine.data) - machine.position
    if num_bytes > num_left:
        machine.fail(f"a frame of {num_bytes:,} bytes, of which {num_left:,} are there")


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.look()


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


def _global(machine: _Machine) -> None:
    machine.push_name(machine.take_line(), machine.take_line())


def _long(machine: _Machine) -> None:
    encoded = machine.take(machine.take_number(_U8))
    machine.stack.append(int.from_bytes(encoded, "little", signed=True))


_U8, _U16, _U32, _I32, _U64 = map(Struct, ("<B", "<H", "<I", "<i", "<Q"))
_STOP = ord(".")
_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _begin,  # PROTO
    0x95: _frame,  # FRAME
    ord("}"): lambda machine: machine.stack.append({}),  # EMPTY_DICT
    ord(")"): _push(()),  # EMPTY_TUPLE
    ord("N"): _push(None),  # NONE
    0x88: _push(True),  # NEWTRUE
    0x89: _push(False),  # NEWFALSE
    ord("K"): _push_number(_U8),  # BININT1
    ord("M"): _push_number(_U16),  # BININT2
    ord("J"): _push_number(_I32),  # BININT
    0x8A: _long,  # LONG1
    ord("X"): _push_text(_U32),  # BINUNICODE
    0x8C: _push_text(_U8),  # SHORT_BINUNICODE
    ord("q"): _put(_U8),  # BINPUT
    ord("r"): _put(_U32),  # LONG_BINPUT
    0x94: _memoize,  # MEMOIZE
    ord("h"): _get(_U8),  # BINGET
    ord("j"): _get(_U32),  # LONG_BINGET
    ord("("): _mark,  # MARK
    ord("t"): lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),  # TUPLE
    0x85: _push_tuple(1),  # TUPLE1
    0x86: _push_tuple(2),  # TUPLE2
    0x87: _push_tuple(3),  # TUPLE3
    ord("c"): _global,  # GLOBAL
    0x93: lambda machine: machine.push_name(*machine.pop(2)),  # STACK_GLOBAL
    ord("Q"): _Machine.resolve_storage,  # BINPERSID
    ord("R"): _Machine.reduce,  # REDUCE
    ord("s"): lambda machine: machine.set_items(machine.pop(2)),  # SETITEM
    ord("u"): lambda machine: machine.set_items(machine.pop_to_mark()),  # SETITEMS
    ord("b"): _Machine.build,  # BUILD
}
# The other opcodes of protocols 0 to 5, for messages.
_REFUSED = {
    ord("0"): "POP", ord("1"): "POP_MARK", ord("2"): "DUP", ord("F"): "FLOAT", ord("I"): "INT",
    ord("L"): "LONG", ord("P"): "PERSID", ord("S"): "STRING", ord("T"): "BINSTRING",
    ord("U"): "SHORT_BINSTRING", ord("V"): "UNICODE", ord("a"): "APPEND", ord("d"): "DICT",
    ord("e"): "APPENDS", ord("g"): "GET", ord("i"): "INST", ord("l"): "LIST", ord("o"): "OBJ",
    ord("p"): "PUT", ord("]"): "EMPTY_LIST", ord("G"): "BINFLOAT", ord("B"): "BINBYTES",
    ord("C"): "SHORT_BINBYTES", 0x81: "NEWOBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
    0x8B: "LONG4", 0x8D: "BINUNICODE8", 0x8E: "BINBYTES8", 0x8F: "EMPTY_SET", 0x90: "ADDITEMS",
    0x91: "FROZENSET", 0x92: "NEWOBJ_EX", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}  # fmt: skip
