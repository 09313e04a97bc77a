"""Lists of checksums: every spelling is read, and the file that differs is named (S-37)."""

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tramontane.cli.main import run_command
from tramontane.errors import CheckpointError
from tramontane.hub.manifest import read_manifest
from tramontane.hub.verify import verify_model, write_manifest

FILES = {
    "a.safetensors": b"a" * 5_000_000,
    "config.json": b"{}",
    "sub/b.bin": b"",
    "two words": b"2",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


def hash_all(algorithm: str) -> dict[str, str]:
    return {name: hashlib.new(algorithm, content).hexdigest() for name, content in FILES.items()}


def format_gnu(algorithm: str, *, mark: str = " ", before: str = "", end: str = "\n") -> str:
    return "".join(f"{v} {mark}{before}{n}{end}" for n, v in hash_all(algorithm).items())


def format_bsd(algorithm: str) -> str:
    lines = hash_all(algorithm).items()
    return "".join(f"{algorithm.upper()} ({name}) = {value}\n" for name, value in lines)


SPELLINGS = {
    "sha256sum": format_gnu("sha256"),
    "sha256sum --binary": format_gnu("sha256", mark="*"),
    "find | xargs sha256sum": format_gnu("sha256", before="./"),
    "Windows": "\ufeff" + format_gnu("sha256", end="\r\n"),
    "upper case, remarks": "# all files\n\n"
    + "".join(f"{value.upper()}  {name}\n" for name, value in hash_all("sha256").items()),
    "md5sum": format_gnu("md5"),
    "sha1sum": format_gnu("sha1"),
    "BSD SHA256": format_bsd("sha256"),
    "BSD MD5": format_bsd("md5"),
    "JSON": json.dumps(hash_all("sha256")),
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(text: str, folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "sums"
    manifest.write_bytes(text.encode())
    assert verify_model(folder, manifest=manifest).is_ok
    (folder / "a.safetensors").write_bytes(FILES["a.safetensors"][:-1] + b"b")
    report = verify_model(folder, manifest=manifest)
    assert [f.path for f in report.files if f.status == "differs"] == ["a.safetensors"]
    assert report.count("ok") == 3


def test_missing_and_uncovered_files(folder: Path) -> None:
    sums = hash_all("sha256")
    (folder / "SHA256SUMS").write_text(
        f"{sums['config.json']}  config.json\n{sums['sub/b.bin']}  c\n"
    )
    report = verify_model(folder)
    assert {f.path: f.status for f in report.files} == {"config.json": "ok", "c": "missing"}
    assert report.not_covered == ("a.safetensors", "sub/b.bin", "two words")
    assert not report.is_ok


def test_a_missing_shard_is_known_by_its_sisters(folder: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    (folder / name).write_bytes(b"")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'').hexdigest()}  {name}\n")
    report = verify_model(folder)
    assert [f.path for f in report.files if f.status == "missing"] == [name.replace("1-", "2-", 1)]


@pytest.mark.parametrize("name", ["checklist.chk", "manifest.json", "all.sha256", "sha256sum.txt"])
def test_lists_that_are_found(name: str, folder: Path) -> None:
    text = json.dumps(hash_all("sha256")) if name.endswith("json") else format_gnu("md5")
    (folder / name).write_text(text)
    report = verify_model(folder)
    assert report.is_ok
    assert report.not_covered == ()


def test_a_list_for_each_file(folder: Path) -> None:
    for name in ("a.safetensors", "config.json"):
        (folder / f"{name}.sha256").write_text(hash_all("sha256")[name])
    report = verify_model(folder)
    assert (report.is_ok, len(report.files)) == (True, 2)


def test_one_file_alone(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "sums"
    manifest.write_text(format_gnu("sha256").replace("config.json", "other"))
    report = verify_model(folder / "a.safetensors", manifest=manifest)
    assert (report.is_ok, len(report.files)) == (True, 1)
    with pytest.raises(CheckpointError, match=r"no checksum of config\.json"):
        verify_model(folder / "config.json", manifest=manifest)


def test_nothing_to_check_against(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--manifest FILE"):
        verify_model(folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify_model(tmp_path / "none")


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"2")
    (folder / "two words").unlink()
    (folder / "two words").symlink_to(tmp_path / "outside")
    (folder / "SHA256SUMS").write_text(format_gnu("sha256"))
    with pytest.raises(CheckpointError, match="outside the folder"):
        verify_model(folder)


GOOD = hashlib.sha256(b"").hexdigest()
MALFORMED = {
    "empty": b"",
    "remarks alone": b"# nothing\n",
    "not hex": b"x" * 64 + b"  a\n",
    "odd length": b"0" * 63 + b"  a\n",
    "no name": f"{GOOD}  \n".encode(),
    "one space": f"{GOOD} a\n".encode(),
    "not UTF-8": f"{GOOD}  ".encode() + b"\xff\n",
    "path up": f"{GOOD}  ../a\n".encode(),
    "path absolute": f"{GOOD}  /etc/passwd\n".encode(),
    "path with a drive": f"{GOOD}  C:\\a\n".encode(),
    "escaped new line": f"\\{GOOD}  a\\nb\n".encode(),
    "two sums of one file": f"{GOOD}  a\n{'0' * 64}  ./a\n".encode(),
    "wrong kind": f"MD5 (a) = {GOOD}\n".encode(),
    "JSON cut off": b'{"a": "',
    "JSON of numbers": b'{"a": 1}',
    "JSON of words": b'{"a": "sum"}',
    "JSON nested": b'{"a":' * 100_000,
    "JSON path up": json.dumps({"../a": GOOD}).encode(),
    "too large": b"#" * (16 * 2**20 + 1),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_lists_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sums"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="sums"):
        read_manifest(path)


@pytest.mark.parametrize("text", [SPELLINGS["sha256sum"], SPELLINGS["BSD MD5"], SPELLINGS["JSON"]])
def test_mutations_give_clean_errors_alone(text: str, tmp_path: Path) -> None:
    generator = random.Random(2)
    path = tmp_path / "sums"
    num_refused = 0
    for _ in range(700):
        content = bytearray(text.encode())
        position = generator.randrange(len(content))
        content[position : position + generator.randrange(3)] = generator.randbytes(1)
        path.write_bytes(content)
        try:
            read_manifest(path)
        except CheckpointError:
            num_refused += 1
    assert 100 < num_refused < 700


def test_written_manifests_are_read_back(folder: Path) -> None:
    """Also by `sha256sum --check`, whose format it is."""
    for odd in ("back\\slash", "x" * 200):
        (folder / odd).write_bytes(b"odd")
    target = folder / "SHA256SUMS"
    write_manifest(folder, target)
    write_manifest(folder, target)  # it does not list itself
    expected = {**hash_all("sha256"), "x" * 200: hashlib.sha256(b"odd").hexdigest()}
    (folder / "back\\slash").unlink()
    lines = target.read_text().splitlines(keepends=True)
    assert [line[1:] for line in lines if line.startswith("\\")] == [
        f"{hashlib.sha256(b'odd').hexdigest()}  back\\\\slash\n"
    ]
    target.write_text("".join(line for line in lines if not line.startswith("\\")))
    digests = read_manifest(target)
    assert {name: digest.value for name, digest in digests.items()} == expected
    assert verify_model(folder).is_ok


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums = folder / "SHA256SUMS"
    assert run_command(["verify", str(folder), "--write", str(sums)]) == 0
    assert "SHA-256 of 4 files" in capsys.readouterr().out
    assert run_command(["verify", str(folder)]) == 0
    (folder / "config.json").write_bytes(b"[]")
    (folder / "new\x1b[2Jname").write_bytes(b"")
    assert run_command(["verify", str(folder), "--manifest", str(sums)]) == 1
    captured = capsys.readouterr()
    assert "differs     config.json: sha256 is" in captured.out
    assert "not covered new\\x1b[2Jname" in captured.out
    assert "3 of 4 files ok" in captured.out
    assert "config.json (differs)" in captured.err
    assert run_command(["verify", str(folder), "--manifest", str(sums), "--write", "x"]) == 1
    assert "exclude one another" in capsys.readouterr().err


def test_an_unreadable_file_does_not_stop_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "SHA256SUMS").write_text(format_gnu("sha256"))
    real_open: Callable = Path.open

    def fail(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "config.json":
            raise OSError(5, os.strerror(5), str(path))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    report = verify_model(folder)
    assert {f.path: f.status for f in report.files}["config.json"] == "unreadable"
    assert report.count("ok") == 3


def test_a_pipe_in_the_folder_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    """It has no end, and no checksum."""
    os.mkfifo(folder / "pipe")
    signal.alarm(10)
    digests = write_manifest(folder, tmp_path / "SHA256SUMS")
    assert digests.keys() == FILES.keys()
    assert verify_model(folder, manifest=tmp_path / "SHA256SUMS").is_ok
    signal.alarm(0)


def test_a_manifest_that_would_grow_is_refused(tmp_path: Path) -> None:
    """16 MiB of empty lists would take 500."""
    (tmp_path / "manifest.json").write_bytes(b'{"a":[' + b"[]," * 5_000_000 + b"1]}")
    with pytest.raises(CheckpointError, match=r"could take .* bytes of memory when it is parsed"):
        read_manifest(tmp_path / "manifest.json")
