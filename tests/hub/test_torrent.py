"""Torrents of version 1, 2 and both: the file and the piece that differ are named (S-37)."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.torrents import BLOCK, bencode, make_hybrid, make_single, make_v1, make_v2
from tramontane.cli.main import run_command
from tramontane.errors import CheckpointError
from tramontane.hub.bencode import MAX_DEPTH, encode_bencode, parse_bencode
from tramontane.hub.report import Report
from tramontane.hub.torrent import read_torrent
from tramontane.hub.torrent_check import verify_torrent

_RANDOM = random.Random(7)
FILES = {
    "consolidated.00.pth": _RANDOM.randbytes(100_000),
    "empty.txt": b"",
    "params.json": _RANDOM.randbytes(700),
    "sub/tokenizer.model": _RANDOM.randbytes(BLOCK),
    "zz.last": _RANDOM.randbytes(3 * BLOCK + 1),
}
BUILDERS = {"v1": make_v1, "v2": make_v2, "hybrid": make_hybrid}
Builder = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


def save(tmp_path: Path, torrent: dict[str, Any] | bytes) -> Path:
    path = tmp_path / "x.torrent"
    path.write_bytes(torrent if isinstance(torrent, bytes) else bencode(torrent))
    return path


def check(tmp_path: Path, torrent: dict[str, Any], model: Path) -> Report:
    path = save(tmp_path, torrent)
    return verify_torrent(model, read_torrent(path), source=str(path))


def find_status(report: Report) -> dict[str, str]:
    return {file.path: file.status for file in report.files if file.status != "ok"}


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("piece", [BLOCK, 4 * BLOCK, 64 * BLOCK])
def test_good_files_are_ok_from_either_folder(
    build: Builder, piece: int, folder: Path, tmp_path: Path
) -> None:
    (folder / "notes.txt").write_text("mine")
    for place in (folder, tmp_path):
        report = check(tmp_path, build(FILES, piece=piece), place)
        assert report.is_ok, report
        assert {file.path for file in report.files} == set(FILES)
        assert report.not_covered == ("notes.txt",)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize(
    ("name", "position"),
    [("consolidated.00.pth", 0), ("consolidated.00.pth", 40_000), ("zz.last", 3 * BLOCK)],
)
def test_one_flipped_bit_names_its_file_and_piece(
    build: Builder, name: str, position: int, folder: Path, tmp_path: Path
) -> None:
    flip_bit(folder / name, position)
    report = check(tmp_path, build(FILES), folder)
    status = find_status(report)
    assert status.pop(name) == "differs"
    assert not status or build is make_v1  # only its pieces reach into the next file
    (detail,) = (file.detail for file in report.files if file.path == name)
    if build is make_v1:
        start = sum(len(FILES[n]) for n in list(FILES)[: list(FILES).index(name)])
        assert f"SHA-1 piece {(start + position) // BLOCK}" in detail
    else:
        first = position // BLOCK * BLOCK
        last = min(first + BLOCK, len(FILES[name])) - 1
        assert f"bytes {first:,}-{last:,} (SHA-256 piece {position // BLOCK})" in detail
        assert ("SHA-1" in detail) == (build is make_hybrid)


def test_a_piece_of_several_files_accuses_them_all(folder: Path, tmp_path: Path) -> None:
    flip_bit(folder / "params.json", 0)
    report = check(tmp_path, make_v1(FILES), folder)
    shared = {"consolidated.00.pth", "params.json", "sub/tokenizer.model"}
    assert find_status(report) == dict.fromkeys(shared, "differs")
    assert all("shared with" in file.detail for file in report.files if file.path in shared)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_missing_short_and_long_files(build: Builder, folder: Path, tmp_path: Path) -> None:
    (folder / "params.json").unlink()
    (folder / "zz.last").write_bytes(FILES["zz.last"][:-1])
    (folder / "empty.txt").write_bytes(b"not empty")
    report = check(tmp_path, build(FILES), folder)
    status = find_status(report)
    neighbours = {"consolidated.00.pth": "unknown", "sub/tokenizer.model": "unknown"}
    expected = {"params.json": "missing", "zz.last": "wrong size", "empty.txt": "wrong size"}
    assert status == expected | (neighbours if build is make_v1 else {})
    (detail,) = (file.detail for file in report.files if file.path == "zz.last")
    assert "49,152 bytes, should be 49,153" in detail


def test_a_single_file(tmp_path: Path) -> None:
    content = FILES["zz.last"]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(content)
    version_2 = make_v2({"model.gguf": content}, name="model.gguf")
    for torrent in (make_single(content), version_2):
        for place in (path, tmp_path, renamed):
            assert check(tmp_path, torrent, place).is_ok
    flip_bit(path, 1)
    assert find_status(check(tmp_path, make_single(content), path)) == {"model.gguf": "differs"}
    with pytest.raises(CheckpointError, match="holds the folder 'model'"):
        check(tmp_path, make_v1(FILES), path)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(FILES["params.json"])
    (folder / "params.json").unlink()
    (folder / "params.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the folder"):
        check(tmp_path, make_v2(FILES), folder)


def test_info_hashes_are_those_of_magnet_links(tmp_path: Path) -> None:
    info = bencode(make_hybrid(FILES)["info"])
    expected = f"{hashlib.sha1(info).hexdigest()} and {hashlib.sha256(info).hexdigest()}"
    assert read_torrent(save(tmp_path, make_hybrid(FILES))).info_hash == expected


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torrent = save(tmp_path, make_v2(FILES))
    assert run_command(["verify", str(folder), "--torrent", str(torrent)]) == 0
    flip_bit(folder / "sub" / "tokenizer.model", 5)
    capsys.readouterr()
    assert run_command(["verify", str(folder), "--torrent", str(torrent)]) == 1
    captured = capsys.readouterr()
    assert "differs     sub/tokenizer.model: bytes 0-16,383 (SHA-256 piece 0)" in captured.out
    assert "sub/tokenizer.model (differs)" in captured.err


def change_v1(**info: Any) -> dict[str, Any]:
    torrent = make_v1(FILES)
    torrent["info"] |= info
    return torrent


def name_file(*parts: Any) -> dict[str, Any]:
    return change_v1(files=[{"length": 5, "path": list(parts)}], pieces=bytes(20))


def change_v2(**info: Any) -> dict[str, Any]:
    torrent = make_v2(FILES)
    torrent["info"] |= info
    return torrent


def without(torrent: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in torrent.items() if k != key}


def break_layer() -> dict[str, Any]:
    torrent = make_v2(FILES)
    layers = torrent["piece layers"]
    root = next(iter(layers))
    layers[root] = bytes(32) + layers[root][32:]
    return torrent


def disagree() -> dict[str, Any]:
    torrent = make_hybrid(FILES)
    torrent["info"]["files"][0]["path"] = ["other"]
    return torrent


MALFORMED: dict[str, dict[str, Any] | bytes] = {
    "empty": b"",
    "not bencode": b"<html>",
    "cut off": bencode(make_v1(FILES))[:-1],
    "bytes behind the end": bencode(make_v1(FILES)) + b"e",
    "nested too deep": b"l" * 1_000_000,
    "a million values": b"l" + b"le" * 1_000_001 + b"e",
    "huge string": b"d4:info99999999999999999:x",
    "huge number": b"i" + b"9" * 5000 + b"e",
    "negative zero": b"d1:ai-0ee",
    "leading zero": b"d1:ai01ee",
    "no digits": b"d1:aiee",
    "negative string": b"d-1:ai1ee",
    "unsorted keys": b"d1:bi1e1:ai1ee",
    "same key twice": b"d1:ai1e1:ai1ee",
    "a key that is a number": b"di1ei1ee",
    "not a dictionary": b"i1e",
    "no info": {"announce": "x"},
    "no name": {"info": without(make_v1(FILES)["info"], "name")},
    "name leads out": change_v1(name=".."),
    "name is absolute": change_v1(name="/etc"),
    "piece length 0": change_v1(**{"piece length": 0}),
    "piece length negative": change_v1(**{"piece length": -BLOCK}),
    "piece length huge": change_v1(**{"piece length": 2**62}),
    "pieces missing": {"info": without(make_v1(FILES)["info"], "pieces")},
    "one piece too few": change_v1(pieces=make_v1(FILES)["info"]["pieces"][:-20]),
    "half a hash": change_v1(pieces=make_v1(FILES)["info"]["pieces"][:-1]),
    "no files": change_v1(files=[], pieces=b""),
    "a file and a folder": change_v1(length=5),
    "negative length": change_v1(files=[{"length": -1, "path": ["a"]}], pieces=b""),
    "same file twice": change_v1(files=[{"length": 5, "path": ["a"]}] * 2, pieces=bytes(20)),
    "path up": name_file("..", "a"),
    "path absolute": name_file("/etc/passwd"),
    "path with a drive": name_file("C:", "a"),
    "path with backslashes": name_file("..\\a"),
    "path with an empty part": name_file("a", "", "b"),
    "path without parts": name_file(),
    "path not UTF-8": name_file(b"\xff"),
    "path with a control character": name_file("a\x1b[2J"),
    "path of numbers": name_file(1),
    "a symbolic link": change_v1(
        files=[{"attr": "l", "length": 0, "path": ["a"], "symlink path": ["etc"]}], pieces=b""
    ),
    "padding first": change_v1(
        files=[{"attr": "p", "length": 5, "path": [".pad", "5"]}], pieces=bytes(20)
    ),
    "padding without end": change_v1(
        files=[{"length": 5, "path": ["a"]}, {"attr": "p", "length": 2**62, "path": ["p"]}]
    ),
    "meta version 3": change_v2(**{"meta version": 3}),
    "v2 piece length no power of two": change_v2(**{"piece length": BLOCK + 1}),
    "v2 piece length below a block": change_v2(**{"piece length": BLOCK // 2}),
    "v2 without a tree": {"info": without(make_v2(FILES)["info"], "file tree")},
    "v2 tree leads out": change_v2(**{"file tree": {"..": {"a": {"": {"length": 0}}}}}),
    "v2 file and folder": change_v2(
        **{"file tree": {"a": {"": {"length": 0}, "b": {"": {"length": 0}}}}}
    ),
    "v2 file without a name": change_v2(**{"file tree": {"": {"length": 0}}}),
    "v2 root too short": change_v2(
        **{"file tree": {"a": {"": {"length": 5, "pieces root": b"x"}}}}
    ),
    "v2 without layers": without(make_v2(FILES), "piece layers"),
    "v2 layer of another file": break_layer(),
    "hybrid that disagrees": disagree(),
}


@pytest.mark.parametrize("torrent", MALFORMED.values(), ids=MALFORMED)
def test_malformed_torrents_are_refused(torrent: dict[str, Any] | bytes, tmp_path: Path) -> None:
    path = save(tmp_path, torrent)
    with pytest.raises(CheckpointError, match=r"x\.torrent"):
        read_torrent(path)


def test_depth_has_a_limit() -> None:
    deepest = b"l" * MAX_DEPTH + b"le" + b"e" * MAX_DEPTH
    assert encode_bencode(parse_bencode(deepest, source="x")) == deepest
    with pytest.raises(CheckpointError, match="deep"):
        parse_bencode(b"l" + deepest + b"e", source="x")


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_mutations_give_clean_errors_alone(build: Builder, folder: Path, tmp_path: Path) -> None:
    """2,000 in all; what still parses is checked, and a changed hash or name is seen."""
    original = bencode(build(FILES))
    generator = random.Random(1)
    outcomes = {"refused": 0, "parsed": 0, "ok": 0}
    for _ in range(667):
        content = bytearray(original)
        for _ in range(generator.choice((1, 1, 3))):
            position = generator.randrange(len(content))
            match generator.randrange(3):
                case 0:
                    content[position] = generator.randrange(256)
                case 1:
                    del content[position : position + generator.randrange(1, 30)]
                case 2:
                    content[position:position] = generator.choice(
                        (b"i-1e", b"9", b"l", b"d", b"e", b"99999999:", b"..")
                    )
        path = save(tmp_path, bytes(content))
        try:
            report = verify_torrent(folder, read_torrent(path), source=str(path))
            outcomes["ok" if report.is_ok else "parsed"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 300
    assert outcomes["parsed"] > (20 if build is not make_v2 else 0)
    assert outcomes["ok"] < 100  # a change outside `info`, or of a digit in the announcement
