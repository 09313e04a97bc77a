"""`tramontane verify`: whether a model's files are, byte for byte, what they should be."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tramontane.hub.report import Report


def verify(
    model: str,
    /,
    *,
    manifest: Path | None = None,
    torrent: Path | None = None,
    write: Path | None = None,
) -> None:
    """Check every byte of a model against checksums, and name the file that differs.

    Without --manifest and --torrent, a model from the hub is checked against the hub's checksums,
    and another folder against SHA256SUMS, sha256sum.txt, checklist.chk, manifest.json or *.sha256
    in it. The exit code is 0 only if every listed file is there and as it should be.
    Example: tramontane verify mixtral-8x7b-32kseqlen --torrent mixtral.torrent

    Parameters
    ----------
    model
        A folder, a file, or the id of a fetched model.
    manifest
        A list of checksums: the lines of sha256sum (SHA-1 and MD5 also), or JSON {file: checksum}.
    torrent
        A .torrent file, of version 1, 2 or both.
    write
        Check nothing; write the SHA-256 of each file in the folder to this file.
    """
    from tramontane.cli.byte_bar import show_byte_bar
    from tramontane.errors import CheckpointError, ConfigError
    from tramontane.hub.cache import resolve_model
    from tramontane.hub.torrent import read_torrent
    from tramontane.hub.torrent_check import verify_torrent
    from tramontane.hub.verify import verify_model, write_manifest

    if sum(option is not None for option in (manifest, torrent, write)) > 1:
        raise ConfigError("--manifest, --torrent and --write exclude one another; give one")
    path = resolve_model(model)
    with show_byte_bar(model) as on_bytes:
        if write is not None:
            digests = write_manifest(path, write, on_bytes=on_bytes)
            print(f"{write}: SHA-256 of {len(digests)} files")
            return
        if torrent is None:
            report = verify_model(path, manifest=manifest, on_bytes=on_bytes)
        else:
            content = read_torrent(torrent)
            report = verify_torrent(path, content, source=str(torrent), on_bytes=on_bytes)
            print(f"torrent {content.name!r}, info hash {content.info_hash}")
    _print_report(report)
    if not report.is_ok:
        raise CheckpointError(f"{_summarize(report)}; {_find_remedy(report, model, path)}")


def _print_report(report: "Report") -> None:
    from tramontane.hub.paths import show_name

    for file in report.files:
        detail = f": {file.detail}" if file.detail else ""
        print(f"{file.status:<11} {show_name(file.path)}{detail}")
    for name in report.not_covered:
        print(f"{'not covered':<11} {show_name(name)}")
    print(f"{report.count('ok')} of {len(report.files)} files ok by {report.source}")


def _summarize(report: "Report") -> str:
    from tramontane.hub.paths import show_name

    bad = [f"{show_name(f.path)} ({f.status})" for f in report.files if f.status != "ok"]
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"not as {report.source} says: {', '.join(bad[:5])}{more}"


def _find_remedy(report: "Report", model: str, path: Path) -> str:
    """In a hub's cache it is the file that the link leads to that has to go."""
    from tramontane.hub.cache import split_model_id
    from tramontane.hub.paths import is_snapshot

    if split_model_id(model) is None or not is_snapshot(path):
        return "fetch these files again"
    bad = [(path / f.path).resolve() for f in report.files if f.status != "ok"]
    there = [str(place) for place in bad if place.exists()]
    removal = f"remove {' '.join(there)}, then " if there else ""
    return f"{removal}run: tramontane pull {model}"
