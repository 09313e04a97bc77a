"""Facts about the machine, read from /proc and /sys where they exist; None where they do not."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_NO_LIMIT = 2**60  # cgroup v1 writes a huge number for "none"


def read_peak_memory() -> int:
    """The most bytes of memory that this process has occupied so far."""
    high_water_mark = _parse_kib(_read_colon_table(Path("/proc/self/status")).get("VmHWM"))
    if high_water_mark is not None:
        return high_water_mark
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def read_memory() -> dict[str, int | None]:
    """Bytes of memory in all, free for use now, and the limit of the control group (container).

    `free_bytes` are what this process may still take: of what is available, within the limit.
    """
    table = _read_colon_table(Path("/proc/meminfo"))
    available = _parse_kib(table.get("MemAvailable"))
    limits = read_group_limits()
    left = [limit - used for limit, used in limits]
    return {
        "total_bytes": _parse_kib(table.get("MemTotal")),
        "available_bytes": available,
        "limit_bytes": min((limit for limit, _ in limits), default=None),
        "free_bytes": None if available is None else max(0, min([available, *left])),
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


def read_group_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, bytes in use) of each control group around this process that has a limit.

    Groups lie in groups, and the narrowest decides. In use is what cannot be taken back: the page
    cache can. /proc and /sys are looked for in `root`.
    """
    found = []
    for folder, kind in _list_groups(root):
        limit = _read_text(folder / kind.limit_file)
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            lines = (line.split() for line in _read_text(folder / "memory.stat").splitlines())
            used = [int(count) for name, count in lines if name == kind.used]
            found.append((int(limit), sum(used)))
    return found


class _GroupKind(NamedTuple):
    """Where one version of control groups says what."""

    base: str
    limit_file: str
    used: str  # a line of memory.stat


_GROUP_KINDS = {  # by the controllers in /proc/self/cgroup
    "": _GroupKind("sys/fs/cgroup", "memory.max", "anon"),  # version 2
    "memory": _GroupKind("sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"),
}


def _list_groups(root: Path) -> Iterator[tuple[Path, _GroupKind]]:
    """The folders of this process's groups, from the innermost to the one that holds all."""
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if (kind := _GROUP_KINDS.get(controllers)) is not None:
            path = Path(name.strip("/"))
            yield from ((root / kind.base / part, kind) for part in (path, *path.parents))


def _read_text(path: Path) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # absent, or of a group that this process may not see
        return ""
