"""What a check of files found: one line for each file that should be there."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "wrong size", "differs", "unreadable", "unknown"]


@dataclass(frozen=True)
class FileReport:
    """One file; `detail` says which bytes, how many, or what was expected."""

    path: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All files that `source` names, and those in the folder that it does not."""

    source: str
    files: tuple[FileReport, ...]
    not_covered: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether every file that should be there is, and is what it should be."""
        return bool(self.files) and all(file.status == "ok" for file in self.files)

    def count(self, status: Status) -> int:
        """How many files have this status."""
        return sum(file.status == status for file in self.files)


def make_report(
    source: str,
    files: Iterable[FileReport],
    *,
    present: Iterable[str],
    ignore: Collection[str] = (),
) -> Report:
    """A report sorted by path; what is `present` without a line of its own is not covered."""
    reports = tuple(sorted(files, key=lambda file: file.path))
    covered = {file.path for file in reports} | set(ignore)
    return Report(source, reports, tuple(name for name in present if name not in covered))
