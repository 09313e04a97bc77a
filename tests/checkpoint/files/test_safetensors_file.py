"""Row C04 of the reliability table, and agreement with the safetensors library."""

import json
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from tests.checkpoint.files import malformed
from tests.checkpoint.files.malformed import MALFORMED, encode, entry
from tests.checkpoint.peak_memory import run_program
from tramontane.bounded_json import parse_json
from tramontane.checkpoint.files.safetensors_file import read_table, write_tensors
from tramontane.errors import CheckpointError

_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def write(path: Path, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(path, shapes, lambda name: tensors[name].to(dtype), dtype=dtype)


def _make_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"b": (3, 5), "a": (7,), "stack": (2, 3, 4), "scalar": ()}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", _DTYPES)
def test_reads_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = _make_tensors(dtype)
    safetensors.torch.save_file(tensors, tmp_path / "f")
    table = read_table(tmp_path / "f")
    assert table.keys() == tensors.keys()
    assert all(torch.equal(table[name].read(), value) for name, value in tensors.items())


@pytest.mark.parametrize("dtype", _DTYPES)
def test_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = _make_tensors(torch.float32)
    tensors["transposed"] = tensors["b"].t()  # not contiguous
    write(tmp_path / "f", tensors, dtype=dtype)
    read = safetensors.torch.load_file(tmp_path / "f")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value.to(dtype)) for name, value in tensors.items())


def test_writing_to_a_mapped_tensor_leaves_the_file_and_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "f", {"a": torch.ones(4), "b": torch.ones(4)}, dtype=torch.float32)
    before = (tmp_path / "f").read_bytes()
    table = read_table(tmp_path / "f")
    a, b = table["a"].read(), table["b"].read()
    a.zero_()
    assert (tmp_path / "f").read_bytes() == before
    assert torch.equal(b, torch.ones(4))


def test_a_file_whose_data_is_not_aligned_is_copied(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    header = json.dumps({"w": entry(0, 8)}).encode()
    header += b" " * ((1 - len(header)) % 4)  # the data begins at 1 modulo 4
    (tmp_path / "f").write_bytes(encode(header, values.numpy().tobytes()))
    stored = read_table(tmp_path / "f")["w"]
    assert stored.begin % 4 == 1
    assert torch.equal(stored.read(), values)


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_c04_malformed_file_is_refused_with_its_reason(
    tmp_path: Path, case: malformed.Malformed
) -> None:
    """C04: the error names file, tensor and reason, in few words."""
    path = tmp_path / "broken.safetensors"
    path.write_bytes(case.content)
    with pytest.raises(CheckpointError) as error:
        read_table(path)
    assert str(path) in str(error.value)
    assert case.reason in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_c04_malformed_file_takes_no_memory_beyond_its_size(tmp_path: Path) -> None:
    """C04: the peak of a process grows by at most the file's size and 16 MiB."""
    growth = run_program(malformed.__file__, str(tmp_path))
    assert growth.keys() == MALFORMED.keys()
    assert max(growth.values()) <= 16 * 1024, growth


@pytest.mark.parametrize("short_by", [1, 8, 4096])
def test_c08_short_file_says_how_many_bytes_are_missing(tmp_path: Path, short_by: int) -> None:
    write(tmp_path / "f", {"w": torch.ones(64, 64)}, dtype=torch.float32)
    with (tmp_path / "f").open("r+b") as file:
        file.truncate((tmp_path / "f").stat().st_size - short_by)
    with pytest.raises(CheckpointError, match=f"w ends at .* {short_by:,} bytes are missing"):
        read_table(tmp_path / "f")


def test_json_names_what_is_there_twice() -> None:
    with pytest.raises(CheckpointError, match="x is not valid JSON: 'a' is there twice"):
        parse_json(b'{"a": 1, "a": 2}', where="x")
