"""A GGUF in several files, as llama.cpp's gguf-split and the gguf library write them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import list_tensors, save_gguf, save_gguf_split
from tests.tiny import make_config, make_model
from tramontane.checkpoint.files import gguf_split
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.names import GGUF
from tramontane.checkpoint.summary import summarize
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer


def save_split(
    folder: Path, *, stem: str = "m", seed: int = 0, has_empty_first: bool = False
) -> list[Path]:
    """Three parts by the library, or one more that has metadata alone."""
    save_gguf_split(make_model(seed=seed), folder, stem=stem, has_empty_first=has_empty_first)
    return sorted(folder.glob(f"{stem}-*.gguf"))


def check_equal(loaded: Transformer, *, seed: int = 0) -> None:
    expected = make_model(seed=seed).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("has_empty_first", [False, True])
def test_a_folder_or_any_part_gives_the_whole(tmp_path: Path, has_empty_first: bool) -> None:
    parts = save_split(tmp_path, has_empty_first=has_empty_first)
    assert len(parts) == 3 + has_empty_first
    assert parts[0].name == f"m-00001-of-0000{len(parts)}.gguf"
    for path in (tmp_path, *parts):
        checkpoint = open_checkpoint(path)
        assert checkpoint.contents.files == tuple(parts)
        assert checkpoint.config == make_config()
        check_equal(load_model(path))
    summary = summarize(str(parts[0]))
    assert summary.problems == ()
    assert summary.found["weights"].startswith(f"{len(parts)} files, {parts[0].name} first")


def test_names_do_not_matter(tmp_path: Path) -> None:
    """What the files say of themselves does; other files beside them are left alone."""
    parts = save_split(tmp_path)
    for part, name in zip(parts, ("c", "a", "b"), strict=True):
        part.rename(tmp_path / name)
    check_equal(load_model(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    save_gguf(make_model(seed=1), tmp_path / "other").rename(tmp_path / "whole.gguf")
    check_equal(load_model(tmp_path / "a"))
    check_equal(load_model(tmp_path / "whole.gguf"), seed=1)


def test_two_models_in_one_folder_are_told_apart_by_their_names(tmp_path: Path) -> None:
    first = save_split(tmp_path, stem="one")
    second = save_split(tmp_path, stem="two", seed=1)
    with pytest.raises(CheckpointError, match=r"2 checkpoints \(one-00001.*, two-00001.*\); name"):
        open_checkpoint(tmp_path)
    check_equal(load_model(first[0]))
    check_equal(load_model(second[1]), seed=1)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_c08_missing_parts_are_named(tmp_path: Path, absent: int) -> None:
    parts = save_split(tmp_path)
    parts[absent].unlink()
    for path in (tmp_path, parts[absent - 1]):
        with pytest.raises(CheckpointError, match=rf"{tmp_path} lacks .*incomplete dow") as error:
            open_checkpoint(path)
        assert f"lacks {parts[absent].name};" in str(error.value)
    parts[absent - 1].rename(tmp_path / "x")
    parts[absent - 2].rename(tmp_path / "y")
    with pytest.raises(CheckpointError, match=rf"lacks part {absent + 1} of 3; incomplete"):
        open_checkpoint(tmp_path)


def _change(number: int) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(
        _pack("split.no", 0, width=2), _pack("split.no", number, width=2)
    )


def _pack(key: str, value: int, *, width: int) -> bytes:
    kind = {2: 2, 4: 5}[width]
    return key.encode() + kind.to_bytes(4, "little") + value.to_bytes(width, "little")


def test_parts_that_contradict_each_other(tmp_path: Path) -> None:
    parts = save_split(tmp_path)
    content = parts[0].read_bytes()
    parts[0].write_bytes(_change(1)(content))
    with pytest.raises(CheckpointError, match=r"are both part 2 of 3; keep one of them"):
        open_checkpoint(tmp_path)
    parts[0].write_bytes(_change(3)(content))
    with pytest.raises(CheckpointError, match=r"split.no is 3 and split.count 3; parts count from"):
        open_checkpoint(tmp_path)
    parts[0].write_bytes(content)
    total = _pack("split.tensors.count", len(list_tensors(make_model(), GGUF)), width=4)
    for part in parts:
        content = part.read_bytes()
        assert total in content
        part.write_bytes(content.replace(total, _pack("split.tensors.count", 99, width=4)))
    with pytest.raises(CheckpointError, match=r"split.tensors.count is 99, but the 3 parts have"):
        open_checkpoint(tmp_path)


def test_words_in_the_place_of_numbers(tmp_path: Path) -> None:
    file = gguf_split.GgufFile(3, {"split.count": "two"}, {})
    with pytest.raises(CheckpointError, match=r"split.no, .count and .tensors.count are \[0, 'two"):
        gguf_split.read_split(tmp_path, file)
