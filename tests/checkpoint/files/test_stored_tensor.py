"""Tensors of one file as one view, if they lie evenly spaced."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tramontane.checkpoint.files.stored_tensor import StackViewer, StoredTensor

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
    view = StackViewer().view(tensors)
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
    assert StackViewer().view(place(file, begins, (4,), torch.bfloat16)) is None


def test_two_files_have_none(file: Path) -> None:
    first, second = place(file, [0, 64], (4,), torch.float32)
    other = StoredTensor("b", file.with_name("g"), torch.float32, (4,), second.begin, second.end)
    assert StackViewer().view([first, second]) is not None
    assert StackViewer().view([first, other]) is None


def test_writing_to_a_view_leaves_the_file(file: Path) -> None:
    before = file.read_bytes()
    view = StackViewer().view(place(file, [0, 64, 128], (4,), torch.float32))
    assert view is not None
    view.zero_()
    assert not view.any()
    assert file.read_bytes() == before


@given(
    size=st.integers(1, 6),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    gap=st.integers(0, 3),
    data=st.data(),
)
def test_many_stacks_of_one_viewer(
    file: Path, size: int, counts: list[int], gap: int, data: st.DataObject
) -> None:
    """Whatever was viewed before, and whichever map has it, each has its own values."""
    viewer = StackViewer()
    for count in counts:
        dtype = data.draw(st.sampled_from(DTYPES))
        begin = data.draw(st.integers(0, 60)) * dtype.itemsize
        step = (size + gap) * dtype.itemsize
        tensors = place(file, [begin + i * step for i in range(count)], (size,), dtype)
        view = viewer.view(tensors)
        assert view is not None
        expected = torch.stack([tensor.read() for tensor in tensors])
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        assert torch.equal(view.contiguous().view(bits), expected.view(bits))


def test_stacks_that_lie_between_one_another_share_a_map(file: Path) -> None:
    viewer = StackViewer()
    begins = [[b, b + 48, b + 96] for b in (0, 16, 32)]
    stacks = [viewer.view(place(file, each, (4,), torch.float32)) for each in begins]
    storages = {stack.untyped_storage().data_ptr() for stack in stacks if stack is not None}
    assert len(storages) == 1
    assert None not in stacks


def test_a_stack_at_the_end_of_its_file(file: Path) -> None:
    """The file has nothing behind the last one: no stack lies between."""
    end = file.stat().st_size
    tensors = place(file, [end - 96, end - 56, end - 16], (4,), torch.float32)
    view = StackViewer().view(tensors)
    assert view is not None
    assert torch.equal(view[2].view(torch.int32), tensors[2].read().view(torch.int32))


def test_tensors_without_values_have_none(file: Path) -> None:
    assert StackViewer().view(place(file, [0, 0], (0, 4), torch.float32)) is None
