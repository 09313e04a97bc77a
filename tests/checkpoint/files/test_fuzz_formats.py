"""Row C06 of the reliability table: whatever the bytes, an error of ours or a table that holds."""

import re
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.checkpoint.files import fuzz
from tests.checkpoint.files.fuzz import FORMATS, check_table, make_case
from tests.checkpoint.files.malformed import encode
from tests.checkpoint.peak_memory import run_program
from tramontane.errors import CheckpointError

# Kinds of errors, seen with the seed below in 4,000 files; others need rarer mutations.
_MIN_KINDS = {"safetensors": 21, "gguf": 21, "torch": 40}
_REASON = re.compile(r"is not valid JSON: (?:'utf-8' codec can't )?(\w+ \w+)")


def _find_kind(error: CheckpointError) -> tuple[str, int, str]:
    """File and line at which it arose, leaving out helpers that only raise; what JSON it is not."""
    place, trace = ("", 0), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name != "fail":
            place = (Path(trace.tb_frame.f_code.co_filename).name, trace.tb_lineno)
        trace = trace.tb_next
    reason = _REASON.search(str(error))
    return (*place, reason[1] if reason else "")


def _fuzz(
    name: str, path: Path, *, count: int, seed: int
) -> tuple[Counter[tuple[str, int, str]], float]:
    """Read `count` mutated files: how often each error arose, and the longest time it took."""
    random, kinds, longest = Random(seed), Counter[tuple[str, int, str]](), 0.0
    for number in range(count):
        content = make_case(FORMATS[name], random)
        path.write_bytes(content)
        begin = time.perf_counter()
        try:
            check_table(FORMATS[name].read(path), len(content))
            kinds["accepted", 0, ""] += 1
        except CheckpointError as error:
            message = str(error)
            assert message.isprintable(), (number, message)
            assert str(path) in message, (number, message)
            assert len(message) < 1500, (number, message)
            kinds[_find_kind(error)] += 1
        except Exception as error:
            error.add_note(f"{name} with seed {seed}, file {number}: {content[:300]!r}")
            raise
        path.unlink()  # a new file is much faster than one that is written again
        longest = max(longest, time.perf_counter() - begin)
    return kinds, longest


@pytest.mark.parametrize("name", FORMATS)
def test_c06_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    """C06: in-process, seeded; the errors are of many kinds."""
    kinds, _ = _fuzz(name, tmp_path / "f", count=4000, seed=6)
    assert kinds["accepted", 0, ""] > 20, kinds
    assert len(kinds) >= _MIN_KINDS[name], kinds


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b",".join(b'"%d":{}' % number for number in range(10**6)) + b"}",
        b'{"w":[' + b"1," * 2_500_000 + b"1]}",
        b'{"w":' + b"[]" * 2_500_000 + b"}",
    ],
    ids=["a million tensors", "a list", "lists"],
)
def test_c31_punctuation_without_end_is_refused_before_it_is_parsed(
    tmp_path: Path, header: bytes
) -> None:
    """C31: each mark can take a hundred bytes of memory when it is parsed."""
    (tmp_path / "f").write_bytes(encode(header))
    with pytest.raises(CheckpointError, match=r"could take .* bytes of memory when it is parsed"):
        FORMATS["safetensors"].read(tmp_path / "f")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_c06_a_hundred_thousand_mutations(tmp_path: Path, name: str) -> None:
    """C06: each in at most a second; run with -s to see how often which line raised."""
    kinds, longest = _fuzz(name, tmp_path / "f", count=100_000, seed=60)
    print(name, len(kinds), longest, kinds)
    assert longest < 1
    assert len(kinds) >= _MIN_KINDS[name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FORMATS)
def test_c06_memory_stays_within_the_file_and_16_mib(tmp_path: Path, name: str, seed: int) -> None:
    """C06: 1,000 mutations in a process of their own."""
    growth = run_program(fuzz.__file__, str(tmp_path), name, str(seed))
    assert max(growth.values()) <= 16 * 1024
