"""Contenders of a benchmark, each in a process of its own, and the folder of their models."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from contenders import CONTENDERS


class Worker:
    """A contender in its own process, which answers one line with one."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.figures: dict[str, list[float]] = {}
        command = [
            sys.executable,
            str(Path(__file__).with_name("contenders.py")),
            name,
            str(folder),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._read()

    def measure(self, case: str) -> None:
        """Add one figure, in tokens per second."""
        assert self._process.stdin is not None
        print(case, file=self._process.stdin, flush=True)
        self.figures.setdefault(case, []).append(self._read()["rate"])

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended; its message is above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> int:
        """End the process; the most bytes it has occupied."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = int(self._read()["peak"])
        self._process.wait()
        return peak

    def median(self, case: str) -> float:
        """Tokens per second."""
        return statistics.median(self.figures[case])


@contextmanager
def find_folder(folder: Path | None) -> Iterator[Path]:
    """`folder`, or one that is gone afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def choose_contenders(wanted: list[str] | None, default: list[str] | None = None) -> list[str]:
    """The contenders that can run here."""
    names = wanted or default or list(CONTENDERS)
    if find_spec("llama_cpp") is None and any(name.startswith("llama.cpp") for name in names):
        print("llama-cpp-python is not installed: without llama.cpp", file=sys.stderr)
        names = [name for name in names if not name.startswith("llama.cpp")]
    return names
