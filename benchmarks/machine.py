"""What every table of figures needs: the machine, its limits measured now, and a plain printer."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

_REPOSITORY = Path(__file__).parents[1]
_INTERESTING_FLAGS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")


def describe_machine(*packages: str) -> str:
    """One line: processor, instruction sets, threads, versions, commit."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    parts = [
        f"{len(names) or '?'} x {names[0] if names else platform.processor()}",
        " ".join(flag for flag in _INTERESTING_FLAGS if flag in flags),
        f"{torch.get_num_threads()} threads",
        f"Python {platform.python_version()}",
        *(f"{package} {version(package)}" for package in ("torch", *packages)),
        f"commit {_read_commit()}",
    ]
    return ", ".join(part for part in parts if part)


def _read_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def read_peak_memory() -> int:
    """The most bytes that this process has occupied (VmHWM of Linux; it knows no parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure_matmul_rate(
    rows: int, inner: int, columns: int, *, dtype: torch.dtype = torch.bfloat16
) -> float:
    """FLOP/s of torch's product of random (rows, inner) and (inner, columns), median of 15."""
    a = torch.randn(rows, inner).to(dtype)
    b = torch.randn(columns, inner).to(dtype).t()
    out = torch.empty(rows, columns, dtype=dtype)
    return 2 * rows * inner * columns / measure_seconds(lambda: torch.mm(a, b, out=out), repeats=15)


def measure_read_rate(*, megabytes: int = 512) -> float:
    """Bytes per second of summing an array far larger than the cache, median of 5."""
    data = torch.ones(megabytes * 2**20 // 4)
    return data.numel() * 4 / measure_seconds(lambda: data.sum(), repeats=5)


def measure_seconds(run: Callable[[], object], *, repeats: int, warmup: int = 2) -> float:
    """Median wall time of `run`."""
    for _ in range(warmup):
        run()
    return statistics.median(_time(run) for _ in range(repeats))


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, as docs/benchmarks.md holds it."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")
