"""Row C01 of the reliability table, and agreement with what torch.save writes."""

import builtins
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.files import malformed_torch
from tests.checkpoint.files.malformed import Malformed
from tests.checkpoint.files.malformed_torch import MALFORMED, Changes, archive, encode_zip
from tests.checkpoint.peak_memory import run_program
from tramontane.checkpoint.files import torch_file
from tramontane.checkpoint.files.torch_file import read_torch_table
from tramontane.checkpoint.files.torch_pickle import follow_pickle
from tramontane.errors import CheckpointError

_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _check_equal(path: Path, expected: dict[str, Tensor]) -> None:
    table = read_torch_table(path)
    assert list(table) == list(expected)
    for name, value in expected.items():
        read = table[name].read()
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert torch.equal(read, value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_reads_what_torch_saves(tmp_path: Path, dtype: torch.dtype, protocol: int) -> None:
    shapes = {"b": (3, 5), "a": (7,), "stack": (2, 3, 4), "scalar": (), "none": (0, 3), "1": (1, 9)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    torch.save(tensors, tmp_path / "f.pt", pickle_protocol=protocol)
    _check_equal(tmp_path / "f.pt", tensors)


def test_reads_the_state_dict_of_a_module(tmp_path: Path) -> None:
    """An OrderedDict with `_metadata` hung on it; parameters are detached by torch."""
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "f.pt")
    _check_equal(tmp_path / "f.pt", dict(module.state_dict()))


def test_reads_more_tensors_than_one_batch_of_items(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": torch.full((2,), float(i)) for i in range(2500)}
    torch.save(tensors, tmp_path / "f.pt")
    _check_equal(tmp_path / "f.pt", tensors)


def test_shared_storages_and_views_that_are_contiguous(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.bfloat16).view(6, 4)
    tensors = {
        "whole": base,
        "tied": base,
        "rows": base[2:4],
        "overlap": base[3:6],
        "one": base[1, 2],
    }
    tensors["column"] = torch.randn(5, 1).t()[:, :]  # strides (1, 1): in order all the same
    torch.save(tensors, tmp_path / "f.pt")
    _check_equal(tmp_path / "f.pt", tensors)
    table = read_torch_table(tmp_path / "f.pt")
    assert table["whole"].begin == table["tied"].begin == table["rows"].begin - 16


def test_shards_are_tables_of_their_own(tmp_path: Path) -> None:
    for shard in range(8):
        tensors = {f"layers.{shard}.w": torch.randn(4, 4), "norm": torch.ones(3)}
        torch.save(tensors, tmp_path / f"consolidated.{shard:02}.pth")
        _check_equal(tmp_path / f"consolidated.{shard:02}.pth", tensors)


@pytest.mark.parametrize(
    "value",
    [torch.ones(2, 3).t(), torch.ones(3).expand(2, 3), torch.ones(2, 4)[:, :2]],
    ids=["transposed", "expanded", "columns"],
)
def test_tensors_out_of_order_are_refused_by_name(tmp_path: Path, value: Tensor) -> None:
    torch.save({"ok": torch.ones(2), "odd": value}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=r"f\.pt: odd is not contiguous"):
        read_torch_table(tmp_path / "f.pt")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "extra is a int, not a tensor"),
        ("x", "extra is a str, not a tensor"),
        (None, "extra is a NoneType, not a tensor"),
        ((1, 2), "extra is a tuple, not a tensor"),
        ({"w": torch.ones(2)}, "extra is a dict, not a tensor"),
        ([1.5], r"\(EMPTY_LIST\) is refused"),
        (torch.ones(2, dtype=torch.int64), "torch.LongStorage is not one of the names"),
        (nn.Parameter(torch.ones(2)), "torch._utils._rebuild_parameter is not one of the names"),
        (nn.Linear(2, 2), "Linear is not one of the names"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_things_in_the_dict_are_refused(tmp_path: Path, value: Any, reason: str) -> None:
    torch.save({"w": torch.ones(2), "extra": value}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=reason):
        read_torch_table(tmp_path / "f.pt")


def test_the_old_format_of_torch_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"bare pickle .*get the safetensors release"):
        read_torch_table(tmp_path / "f.pt")


def test_values_of_any_alignment_are_read(tmp_path: Path) -> None:
    data = struct.pack("<2f", 1.5, -2.0)
    begins = set()
    for size in range(4):
        content = archive(
            malformed_torch.GOOD, data=data, changes=Changes(before=b"PK\3\4" + b"\0" * size)
        )
        (tmp_path / "f.pt").write_bytes(content)
        stored = read_torch_table(tmp_path / "f.pt")["w"]
        begins.add(stored.begin % 4)
        assert stored.read().tolist() == [1.5, -2.0]
    assert begins == {0, 1, 2, 3}


def test_zip64_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in archives beyond 4 GB: zipfile is told that all sizes and positions are too large."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", -1)
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as file:
        for name, content in (
            ("data.pkl", malformed_torch.GOOD),
            ("data/0", struct.pack("<2f", 3, 4)),
        ):
            with file.open(f"archive/{name}", "w", force_zip64=True) as member:
                member.write(content)
    assert b"PK\6\6" in (tmp_path / "f.pt").read_bytes()
    assert read_torch_table(tmp_path / "f.pt")["w"].read().tolist() == [3, 4]


@pytest.mark.slow
def test_archive_beyond_4_gb(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2**31 + 64, dtype=torch.float16), "b": torch.arange(5.0)}
    torch.save(tensors, tmp_path / "f.pt")
    table = read_torch_table(tmp_path / "f.pt")
    assert table["a"].end - table["a"].begin == 2**32 + 128
    assert table["b"].begin > 2**32
    assert torch.equal(table["b"].read(), tensors["b"])


class _Canary:
    """Unpickling it makes a file."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (self.argument,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("nesting", ["alone", "in a dict", "among tensors"])
@pytest.mark.parametrize(
    ("function", "code"),
    [
        (os.system, "touch {}"), (os.mkdir, "{}"), (exec, "open({!r}, 'w')"),
        (eval, "open({!r}, 'w')"), (builtins.__import__, "{}"), (builtins.open, "{}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_c01_canary_never_sings(
    tmp_path: Path, function: Callable[..., Any], code: str, nesting: str, protocol: int
) -> None:
    """C01: nothing is unpickled; the message names the file and says what to do instead."""
    canary, path = tmp_path / "canary", tmp_path / "f.bin"
    bird = _Canary(function, code.format(str(canary)))
    values = {"alone": bird, "in a dict": {"w": bird}}
    value = values.get(nesting, {"a": torch.ones(2), "w": bird, "z": torch.ones(2)})
    torch.save(value, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"is not one of the names.*safetensors") as error:
        read_torch_table(path)
    assert str(path) in str(error.value)
    assert not canary.exists()


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_c01_malformed_file_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Malformed
) -> None:
    """C01: the error names file, opcode, name or member, and reason; no canary appears."""
    path = tmp_path / "broken.pt"
    path.write_bytes(case.content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        read_torch_table(path)
    assert str(path) in str(error.value)
    assert case.reason in str(error.value)
    assert len(str(error.value)) < 600
    assert os.listdir(tmp_path) == ["broken.pt"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_malformed_file_takes_no_memory_beyond_its_size(tmp_path: Path) -> None:
    growth = run_program(malformed_torch.__file__, str(tmp_path))
    assert growth.keys() == MALFORMED.keys()
    assert max(growth.values()) <= 16 * 1024, {k: v for k, v in growth.items() if v > 8 * 1024}


def test_c31_a_program_without_end_is_refused(tmp_path: Path) -> None:
    """C31: tuples in tuples, each of one byte; in a large file, too, for which more is read."""
    endless = b"\x80\x02N" + b"\x85" * 2**21 + b"."
    (tmp_path / "f").write_bytes(archive(endless))
    with pytest.raises(CheckpointError, match=r"bytes of memory could be taken, beyond any model"):
        read_torch_table(tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"byte 1,048,576: more than 1,048,576 opcodes"):
        follow_pickle(endless, where="f", memory=2**40)


def test_c31_a_description_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C31."""
    monkeypatch.setattr(torch_file, "_MAX_PICKLE_BYTES", 50)
    (tmp_path / "f").write_bytes(archive(malformed_torch.GOOD))
    with pytest.raises(CheckpointError, match=r"a/data.pkl has 139 bytes; no model needs more"):
        read_torch_table(tmp_path / "f")


def test_c31_too_many_members_are_refused_by_their_count(tmp_path: Path) -> None:
    """C31: entries are not even looked at."""
    entries = b"\0" * 46 * 200_000
    end = struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    end_64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 200_000, 200_000, len(entries), 4
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 4 + len(entries), 1)
    (tmp_path / "f").write_bytes(b"PK\3\4" + entries + end_64 + locator + end)
    with pytest.raises(CheckpointError, match="200,000 members in a directory of 9,200,000 bytes"):
        read_torch_table(tmp_path / "f")


def test_members_that_nobody_needs_are_left_alone(tmp_path: Path) -> None:
    members = [("a/data.pkl", malformed_torch.GOOD), ("a/data/0", b"\0" * 8), ("a/.data/id", b"1")]
    (tmp_path / "f").write_bytes(encode_zip(members))
    assert list(read_torch_table(tmp_path / "f")) == ["w"]
