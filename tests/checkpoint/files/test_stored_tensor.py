"""Tensors of one file as one view, if they lie evenly spaced."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tramontane.checkpoint.files.stored_tensor import StoredTensor, view_stack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "f"
    path.write_bytes(bytes(range(251)) * 40)
    return path


def place(path: Path, begins: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> list[
    StoredTensor
]:  # fmt: skip
    size = torch.Size(shape).numel() * dtype.itemsize
    return [StoredTensor(f"t{b}", path, dtype, shape, b, b + size) for b in begins]


@given(
    begin=st.integers(0, 70),
    step=st.integers(0, 200),
    count=st.integers(1, 9),
    shape=st.sampled_from([(3, 4), (1, 1), (5,), (2, 3, 2)]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_view_has_the_values_of_each(
    file: Path, begin: int, step: int, count: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Wherever they lie; there is none if they overlap or begin where the dtype cannot."""
    size = torch.Size(shape).numel() * dtype.itemsize
    tensors = place(file, [begin + i * step for i in range(count)], shape, dtype)
    view = view_stack(tensors)
    is_apart = count == 1 or (step >= size and step % dtype.itemsize == 0)
    assert (view is not None) == (is_apart and begin % dtype.itemsize == 0)
    if view is None:
        return
    expected = torch.stack([tensor.read() for tensor in tensors])
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16  # NaN differs from itself
    assert torch.equal(view.contiguous().view(bits), expected.view(bits))
    assert view[0].is_contiguous()
    assert view.is_contiguous() == (count == 1 or step == size)


@pytest.mark.parametrize("begins", [[0, 64, 192], [128, 64, 0], [0, 0], [0, 64, 128, 191]])
def test_uneven_distances_have_none(file: Path, begins: list[int]) -> None:
    assert view_stack(place(file, begins, (4,), torch.bfloat16)) is None


def test_two_files_have_none(file: Path) -> None:
    first, second = place(file, [0, 64], (4,), torch.float32)
    other = StoredTensor("b", file.with_name("g"), torch.float32, (4,), second.begin, second.end)
    assert view_stack([first, second]) is not None
    assert view_stack([first, other]) is None


def test_writing_to_a_view_leaves_the_file(file: Path) -> None:
    before = file.read_bytes()
    view = view_stack(place(file, [0, 64, 128], (4,), torch.float32))
    assert view is not None
    view.zero_()
    assert not view.any()
    assert file.read_bytes() == before


def test_tensors_without_values_have_none(file: Path) -> None:
    assert view_stack(place(file, [0, 0], (0, 4), torch.float32)) is None
