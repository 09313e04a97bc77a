"""Writing a quantised folder: interrupted anywhere it goes on, and ends with the same bytes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.quantized_folder import INT4, save_quantized
from tests.tiny import make_config, make_model
from tramontane import atomic
from tramontane.checkpoint import quantized_writer
from tramontane.checkpoint.quantized_plan import FolderPlan
from tramontane.checkpoint.quantized_writer import QuantizedFolder
from tramontane.errors import CapacityError, CheckpointError, ConfigError, StorageError
from tramontane.quant.formats import QuantFormat, QuantRecipe

_ROOT = Path(__file__).parents[2]


class _Killed(BaseException):
    """As sudden as a signal: nothing catches it."""


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make() -> Any:
    return make_model(make_config(n_layers=1))


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    return read_all(save_quantized(make(), tmp_path / "whole"))


@pytest.mark.parametrize("bytes_per_sync", [1, 10_000, 2**30])
def test_interrupted_at_every_unit_it_ends_with_the_same_bytes(
    tmp_path: Path, expected: Any, bytes_per_sync: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit more each time; none that is finished is written again."""
    monkeypatch.setattr(quantized_writer, "_BYTES_PER_SYNC", bytes_per_sync)
    out, written = tmp_path / "out", []

    def stop_after_one(number: int) -> None:
        if written and written[-1][0] == "now":
            written[-1] = ("before", written[-1][1])
            raise KeyboardInterrupt
        written.append(("now", number))

    while not out.exists():
        try:
            save_quantized(make(), out, before_unit=stop_after_one)
        except KeyboardInterrupt:
            assert not out.exists()
    numbers = [number for _, number in written]
    assert numbers == list(range(len(numbers)))
    assert read_all(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


_FILL = """
import os, sys
from pathlib import Path
from tests.checkpoint.quantized_folder import save_quantized
from tests.checkpoint.test_quantized_writer import make
from tramontane.checkpoint import quantized_writer
quantized_writer._BYTES_PER_SYNC = 30_000
last = int(sys.argv[2])
save_quantized(make(), Path(sys.argv[1]), before_unit=lambda n: os._exit(9) if n == last else None)
"""


def test_killed_processes_lose_only_what_was_not_on_disk(tmp_path: Path, expected: Any) -> None:
    for last in (4, 31):
        done = subprocess.run(
            [sys.executable, "-c", _FILL, str(tmp_path / "out"), str(last)], cwd=_ROOT
        )
        assert done.returncode == 9
    log = tmp_path / f".out{quantized_writer._WORKING}" / "finished.jsonl"
    assert 10 < len(log.read_text().splitlines()) < 31
    assert read_all(save_quantized(make(), tmp_path / "out")) == expected


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path, expected: Any) -> None:
    def stop(number: int) -> None:
        if number == 9:
            raise _Killed

    with pytest.raises(_Killed):
        save_quantized(make(), tmp_path / "out", before_unit=stop)
    log = tmp_path / f".out{quantized_writer._WORKING}" / "finished.jsonl"
    assert len(log.read_text().splitlines()) == 9
    os.truncate(log, log.stat().st_size - 5)
    seen: list[int] = []
    save_quantized(make(), tmp_path / "out", before_unit=seen.append)
    assert seen[0] == 8
    assert read_all(tmp_path / "out") == expected


def test_killed_while_room_was_made_it_begins_again(
    tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(quantized_writer, "atomic_file", lambda path: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            save_quantized(make(), tmp_path / "out")
    assert read_all(save_quantized(make(), tmp_path / "out")) == expected


@pytest.mark.parametrize("has_links", [True, False])
def test_killed_while_the_folder_is_named_it_has_all_or_nothing(
    tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """With links nothing is done again; without them (some network drives) all of it."""
    if not has_links:
        error = OSError(errno.EPERM, "no links here")
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(error))

    def write_json(path: Path, values: Any) -> None:
        if path.name == "config.json":
            raise _Killed
        real_write_json(path, values)

    real_write_json = quantized_writer.write_json
    with monkeypatch.context() as patch:
        patch.setattr(quantized_writer, "write_json", write_json)
        with pytest.raises(_Killed):
            save_quantized(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    save_quantized(make(), tmp_path / "out", before_unit=seen.append)
    assert len(seen) == (1 if has_links else 35)  # one call is for the end
    assert read_all(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def stop_at(number: int) -> Any:
    def stop(current: int) -> None:
        if current == number:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(
    ("recipe", "origin", "said"),
    [
        (QuantRecipe.from_format(QuantFormat(8)), {}, "quantization_config"),
        (QuantRecipe.from_format(QuantFormat(4), head=True), {}, "quantization_config"),
        (INT4, {"files": {"model.safetensors": [10, 4]}}, "files"),
        (INT4, {"files": {"model.safetensors": [10, 3]}, "source": "/b"}, "source"),
    ],
)
def test_another_run_is_refused_by_what_differs(
    tmp_path: Path, recipe: QuantRecipe, origin: dict[str, Any], said: str
) -> None:
    first = {"files": {"model.safetensors": [10, 3]}, "source": "/a"}
    with pytest.raises(KeyboardInterrupt):
        save_quantized(make(), tmp_path / "out", origin=first, before_unit=stop_at(3))
    with pytest.raises(CheckpointError, match=f"holds an unfinished run with {said} .*: go on"):
        save_quantized(make(), tmp_path / "out", recipe, origin=first | origin)
    save_quantized(make(), tmp_path / "out", origin=first)


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    plan = FolderPlan(make_config(), INT4, torch.bfloat16, 10**9)
    with (
        QuantizedFolder(tmp_path / "out", plan, origin={}).open(),
        pytest.raises(CheckpointError, match="another process is quantising into"),
    ):
        save_quantized(make_model(), tmp_path / "out")


def test_a_disk_without_room_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_count_free_bytes", lambda folder: 2**24)
    with pytest.raises(CapacityError, match="bytes needed, 16,777,216 bytes free"):
        save_quantized(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_is_done(
    tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        if number == 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CapacityError, match="the disk is full"):
        save_quantized(make(), tmp_path / "out", before_unit=fail)
    seen: list[int] = []
    save_quantized(make(), tmp_path / "out", before_unit=seen.append)
    assert seen[0] == 6
    assert read_all(tmp_path / "out") == expected


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save_quantized(make(), tmp_path / "file" / "out")


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = make().bfloat16()
    model.norm.weight.data[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"norm\.weight has values that are not finite"):
        save_quantized(model, tmp_path / "out")


def test_rows_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts.w2: rows of 96 values .* group size, 64"):
        save_quantized(make(), tmp_path / "out", QuantRecipe.from_format(QuantFormat(4, 64)))
    assert list(tmp_path.iterdir()) == []


def test_the_log_has_an_error_for_each_packed_matrix(tmp_path: Path) -> None:
    def look(number: int) -> None:
        if number == 31:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_quantized(make(), tmp_path / "out", before_unit=look)
    log = tmp_path / f".out{quantized_writer._WORKING}" / "finished.jsonl"
    errors = {r["unit"]: r["error"] for r in map(json.loads, log.read_text().splitlines())}
    assert errors["norm.weight"] is None
    assert 0.05 < errors["layers.0.feed_forward.experts.w1[7]"] < 0.12
