"""Facts about the machine, read from /proc and /sys where they exist; None where they do not."""

import os
import platform
import resource
import sys
from pathlib import Path

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_NO_LIMIT = 2**60  # cgroup v1 writes a huge number for "none"


def read_peak_memory() -> int:
    """The most bytes of memory that this process has occupied so far."""
    high_water_mark = _parse_kib(_read_colon_table(Path("/proc/self/status")).get("VmHWM"))
    if high_water_mark is not None:
        return high_water_mark
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def read_memory() -> dict[str, int | None]:
    """Bytes of memory in all, free for use now, and the limit of the control group (container)."""
    table = _read_colon_table(Path("/proc/meminfo"))
    return {
        "total_bytes": _parse_kib(table.get("MemTotal")),
        "available_bytes": _parse_kib(table.get("MemAvailable")),
        "limit_bytes": _read_cgroup_limit(),
    }


def read_cpu_model() -> str:
    """The processor's name for itself."""
    table = _read_colon_table(Path("/proc/cpuinfo"))
    return table.get("model name") or platform.processor() or platform.machine()


def read_cpu_flags() -> frozenset[str] | None:
    """Instruction sets in the words of /proc/cpuinfo, or None if the system has no such file."""
    table = _read_colon_table(Path("/proc/cpuinfo"))
    flags = table.get("flags", table.get("Features"))  # x86, ARM
    return None if flags is None else frozenset(flags.split())


def count_usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def format_bytes(count: int) -> str:
    """2**30 -> "1.0 GiB"; 2**20 -> "1 MiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _read_colon_table(path: Path) -> dict[str, str]:
    """Lines "name : value"; of a name that occurs often (one block per core) the first counts."""
    table: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon:
                table.setdefault(name.strip(), value.strip())
    return table


def _parse_kib(value: str | None) -> int | None:
    """The bytes of a value such as "16384 kB"."""
    return None if value is None else int(value.split()[0]) * 1024


def _read_cgroup_limit() -> int | None:
    for path in _CGROUP_LIMITS:
        text = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
        if text.isdigit() and int(text) < _NO_LIMIT:
            return int(text)
    return None
