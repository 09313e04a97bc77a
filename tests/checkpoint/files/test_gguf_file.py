"""Rows C05, C31 and C40 of the reliability table, and agreement with the gguf library."""

import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests.checkpoint.files import malformed_gguf
from tests.checkpoint.files.malformed import Malformed
from tests.checkpoint.files.malformed_gguf import MALFORMED, encode, key, tensor, text
from tests.checkpoint.peak_memory import run_program
from tramontane.checkpoint.files import gguf_values
from tramontane.checkpoint.files.gguf_file import read_gguf
from tramontane.checkpoint.files.gguf_values import OTHER_PACKINGS, PACKINGS, PackedTensor
from tramontane.errors import CheckpointError

_PACKED = [packing.name for packing in PACKINGS.values() if packing.block_size > 1]
_METADATA: dict[str, tuple[str, Any]] = {
    "an.uint8": ("add_uint8", 255), "an.int8": ("add_int8", -128),
    "an.uint16": ("add_uint16", 65535), "an.int16": ("add_int16", -32768),
    "an.uint32": ("add_uint32", 2**32 - 1), "an.int32": ("add_int32", -(2**31)),
    "an.uint64": ("add_uint64", 2**64 - 1), "an.int64": ("add_int64", -(2**63)),
    "a.float32": ("add_float32", 0.25), "a.float64": ("add_float64", 1e-5),
    "yes": ("add_bool", True), "no": ("add_bool", False),
    "a.string": ("add_string", "mistral \u00e9\u2581"), "no.string": ("add_string", "x"),
    "words": ("add_array", ["<s>", "", "\u2581the", "a" * 5000]),
    "numbers": ("add_array", [3, -7, 2**30]), "scores": ("add_array", [0.5, -1.25]),
    "flags": ("add_array", [True, False, True]),
}  # fmt: skip


def _write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]], **settings: Any) -> None:
    """A file with all kinds of metadata, by the gguf library."""
    writer = gguf.GGUFWriter(path, "llama", **settings)
    for name, (method, value) in _METADATA.items():
        getattr(writer, method)(name, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _make_packed(name: str, num_rows: int, num_blocks: int) -> np.ndarray:
    """Rows of random blocks; bytes that make scales of huge or no number are there too."""
    size = next(packing.block_bytes for packing in PACKINGS.values() if packing.name == name)
    random = np.random.default_rng(size)
    return random.integers(0, 256, (num_rows, num_blocks * size), dtype=np.uint8)


def test_metadata_of_every_type_is_what_the_library_wrote(tmp_path: Path) -> None:
    _write(tmp_path / "f", {})
    file = read_gguf(tmp_path / "f")
    assert file.version == 3
    assert file.tensors == {}
    found = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in file.metadata.items()
    }
    assert found == {name: v for name, (_, v) in _METADATA.items()} | {
        "general.architecture": "llama"
    }
    assert file.metadata["flags"].dtype == np.bool_
    assert [type(found[name]) for name in ("yes", "an.uint8", "a.float32")] == [bool, int, float]


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_plain_tensors_have_values_and_shape_of_what_was_written(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    values = torch.randn(shape)
    _write(
        tmp_path / "f",
        {
            "f32": (values.numpy(), Kind.F32),
            "f16": (values.half().numpy(), Kind.F16),
            "bf16": (values.bfloat16().view(torch.uint8).numpy(), Kind.BF16),
        },
    )
    tensors = read_gguf(tmp_path / "f").tensors
    assert [t.encoding for t in tensors.values()] == ["F32", "F16", "BF16"]
    assert all(t.shape == shape for t in tensors.values())
    assert torch.equal(tensors["f32"].read(), values)
    assert torch.equal(tensors["f16"].read(), values.half())
    assert torch.equal(tensors["bf16"].read(), values.bfloat16())


@pytest.mark.parametrize("name", _PACKED)
def test_packed_tensors_are_bit_equal_to_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Q10: 1,000 random blocks, unpacked a few rows at a time; NaN and infinities as they come."""
    packed = _make_packed(name, 50, 20)
    _write(tmp_path / "f", {"w": (packed.reshape(5, 10, -1), Kind[name])})
    stored = read_gguf(tmp_path / "f").tensors["w"]
    assert isinstance(stored, PackedTensor)
    block_size = gguf.GGML_QUANT_SIZES[Kind[name]][0]
    assert (stored.encoding, stored.dtype) == (name, torch.float32)
    assert stored.shape == (5, 10, 20 * block_size)
    monkeypatch.setattr(gguf_values, "_MAX_STEP", 7 * 20 * block_size)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, Kind[name])
    assert stored.read().numpy().tobytes() == expected.tobytes()


def test_packed_tensor_of_one_dimension(tmp_path: Path) -> None:
    packed = _make_packed("Q8_0", 1, 4)
    _write(tmp_path / "f", {"w": (packed[0], Kind.Q8_0)})
    values = read_gguf(tmp_path / "f").tensors["w"].read()
    assert values.shape == (128,)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed[0], Kind.Q8_0)
    assert values.numpy().tobytes() == expected.tobytes()


def test_sizes_of_blocks_are_those_of_the_library() -> None:
    for number, packing in PACKINGS.items():
        assert Kind(number).name == packing.name
        assert gguf.GGML_QUANT_SIZES[Kind(number)] == packing[1:]
    assert {kind.value: kind.name for kind in Kind if kind.value not in PACKINGS} == OTHER_PACKINGS


def test_without_the_library_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "f", {"w": (_make_packed("Q4_0", 2, 2), Kind.Q4_0)})
    stored = read_gguf(tmp_path / "f").tensors["w"]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"w \(Q4_0\).*pip install 'tramontane\[gguf\]'"):
        stored.read()


def test_c40_versions_2_and_3_and_unknown_keys_are_read(tmp_path: Path) -> None:
    """C40."""
    data = struct.pack("<2f", 1.5, -2.0)
    for version in (2, 3):
        keys = [key("nobody.knows.this", malformed_gguf.U16, 7)]
        content = encode(keys, [tensor("w")], data, version=version)
        (tmp_path / "f").write_bytes(content)
        file = read_gguf(tmp_path / "f")
        assert (file.version, file.metadata) == (version, {"nobody.knows.this": 7})
        assert file.tensors["w"].read().tolist() == [1.5, -2.0]


def test_alignment_of_the_file_is_followed(tmp_path: Path) -> None:
    values = torch.randn(3, 5)
    writer = gguf.GGUFWriter(tmp_path / "f", "llama")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf(tmp_path / "f").tensors
    assert all(torch.equal(stored.read(), values) for stored in tensors.values())
    assert all(stored.begin % 256 == 0 for stored in tensors.values())


def test_big_endian_file_of_the_library_is_refused(tmp_path: Path) -> None:
    values = (np.ones(4, dtype=np.float32), Kind.F32)
    _write(tmp_path / "f", {"w": values}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="is big-endian"):
        read_gguf(tmp_path / "f")


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_c05_malformed_file_is_refused_with_its_reason(tmp_path: Path, case: Malformed) -> None:
    """C05: the error names file, key or tensor, and reason, in few words."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(case.content)
    with pytest.raises(CheckpointError) as error:
        read_gguf(path)
    assert str(path) in str(error.value)
    assert case.reason in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_c05_malformed_file_takes_no_memory_beyond_its_size(tmp_path: Path) -> None:
    """C05: the peak of a process grows by at most the file's size and 16 MiB."""
    growth = run_program(malformed_gguf.__file__, str(tmp_path))
    assert growth.keys() == MALFORMED.keys()
    assert max(growth.values()) <= 16 * 1024, growth


def test_c31_a_million_tensors_are_refused_by_their_count(tmp_path: Path) -> None:
    """C31."""
    entries = [tensor("w", offset=32 * index) for index in range(1000)] * 1000
    (tmp_path / "f").write_bytes(encode([], entries))
    with pytest.raises(CheckpointError, match="table of tensors has 1,000,000 entries; at most"):
        read_gguf(tmp_path / "f")


def test_c31_a_header_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    """C31: a key of a length that the file has, but no model; the hole takes no disk."""
    with (tmp_path / "f").open("wb") as file:
        file.write(encode([text("k", length=2**27)], data=b"", num_keys=1))
        file.truncate(2**28)
    with pytest.raises(CheckpointError, match="a header of more than 100,000,000 bytes is no mod"):
        read_gguf(tmp_path / "f")
