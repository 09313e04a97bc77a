"""What a name stands for, and the cache's own folders."""

import hashlib
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.hub_server import hash_git_blob
from tramontane.cli import main as cli
from tramontane.cli.main import run_command
from tramontane.errors import CheckpointError
from tramontane.hub.cache import list_models, remove_model, resolve_model

COMMITS = ["a" * 40, "b" * 40]
WEIGHTS = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def add_model(
    cache: Path, model: str, files: dict[str, bytes], *, commit: str = COMMITS[0], main: bool = True
) -> Path:
    """A snapshot as the hub's library leaves it."""
    repository = cache / f"models--{model.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        is_large = name.endswith((".safetensors", ".gguf"))
        digest = hashlib.sha256(content).hexdigest() if is_large else hash_git_blob(content)
        (repository / "blobs" / digest).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    if main:
        (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_a_path_wins_over_the_cache(cache: Path, tmp_path: Path) -> None:
    snapshot = add_model(cache, "org/name", WEIGHTS)
    assert resolve_model("org/name") == snapshot
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")


def test_a_path_where_nobody_may_look_is_no_id(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is fetched for it; the system's word is passed on."""

    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refuse)
    for verb in ("show", "estimate", "verify"):
        assert run_command([verb, "org/name"]) == 1
        assert "org/name: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["./org/name", "/no/where", "name", "a/b/c", "x.gguf", "", "../a", "a--b/c", "o/" * 99]
)
def test_what_is_no_id_stays_a_path(name: str, cache: Path) -> None:
    assert resolve_model(name) == Path(name)


def test_what_is_not_there_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="tramontane pull org/name"):
        resolve_model("org/name")
    add_model(cache, "org/name", {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match="without weights; fetch it first: tramontane pull"):
        resolve_model("org/name")


def test_the_branch_main_comes_first_if_it_has_weights(cache: Path) -> None:
    main = add_model(cache, "org/name", WEIGHTS)
    other = add_model(cache, "org/name", WEIGHTS, commit=COMMITS[1], main=False)
    os.utime(main, (0, 0))
    assert resolve_model("org/name") == main
    for path in main.iterdir():
        path.unlink()
    assert resolve_model("org/name") == other


def test_gguf_files(cache: Path) -> None:
    snapshot = add_model(cache, "org/gguf", {"x.Q4_0.gguf": b"4"})
    assert resolve_model("org/gguf") == snapshot / "x.Q4_0.gguf"
    add_model(cache, "org/gguf", {"x.Q8_0.gguf": b"8"})
    assert resolve_model("org/gguf:q8_0") == snapshot / "x.Q8_0.gguf"
    with pytest.raises(CheckpointError, match="2 GGUF models"):
        resolve_model("org/gguf")
    with pytest.raises(CheckpointError, match="no GGUF model with 'Q2'"):
        resolve_model("org/gguf:Q2")


def test_a_copy_with_the_same_commit_stays(cache: Path) -> None:
    """A repository that was duplicated on the hub has the commits of the first."""
    snapshots = {f"org/{n}": add_model(cache, f"org/{n}", WEIGHTS) for n in ("a", "b", "c")}
    assert remove_model("org/b") == sum(map(len, WEIGHTS.values()))
    assert {m for m, s in snapshots.items() if s.exists()} == {"org/a", "org/c"}
    with pytest.raises(CheckpointError, match="there: org/a, org/c"):
        remove_model("org/b")


def test_damage_is_said_and_does_not_hide_the_others(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_model(cache, "org/good", WEIGHTS)
    bad = add_model(cache, "org/bad", WEIGHTS)
    (bad / "model.safetensors").resolve().unlink()
    models, warnings = list_models()
    assert [model.id for model in models] == ["org/good"]
    assert "Blob missing" in warnings[0]
    with pytest.raises(CheckpointError, match=r"models--org--bad is damaged"):
        remove_model("org/bad")
    assert run_command(["list"]) == 0
    assert "damaged: Blob missing" in capsys.readouterr().err
    assert run_command(["verify", "org/bad"]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors (missing)" in error
    assert "run: tramontane pull org/bad" in error


def test_rm_asks(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal:
        def __init__(self, answer: str) -> None:
            self.readline = lambda: answer
            self.isatty = lambda: True

    snapshot = add_model(cache, "org/name", WEIGHTS)
    monkeypatch.setattr(cli.sys, "stdin", Terminal("\n"))
    assert run_command(["rm", "org/name"]) == 0
    assert snapshot.exists()
    assert "remove org/name, 0 MiB? [y/N]\nkept" in capsys.readouterr().err
    monkeypatch.setattr(cli.sys, "stdin", Terminal("y\n"))
    assert run_command(["rm", "org/name"]) == 0
    assert not snapshot.exists()
