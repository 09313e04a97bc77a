"""How far reading broken files drives the peak memory of a process, measured in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tramontane.errors import CheckpointError

_ROOT = Path(__file__).parents[2]


def print_growth(files: Mapping[str, bytes], read: Callable[[Path], object], folder: Path) -> None:
    """Read each file and print, as JSON, by how many KiB the peak grew beyond that file's size."""
    path, growth = folder / "broken", {}
    start = read_peak()
    for name, content in files.items():
        path.write_bytes(content)
        with suppress(CheckpointError):
            read(path)
        growth[name] = read_peak() - start - len(content) // 1024
    print(json.dumps(growth))


def read_peak() -> int:
    """VmHWM of this process in KiB. Unlike ru_maxrss it knows nothing of the parent's memory."""
    return read_memory("VmHWM")


def read_memory(kind: str) -> int:
    """Of this process in KiB: VmHWM the peak, RssAnon what now lies in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def run_program(file: str, *arguments: str) -> dict[str, int]:
    """What a program of the tests, which calls `print_growth`, prints."""
    done = subprocess.run(
        [sys.executable, file, *arguments],
        env={**os.environ, "PYTHONPATH": str(_ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    growth: dict[str, int] = json.loads(done.stdout)
    return growth
