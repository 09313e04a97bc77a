"""Fetching from a hub, with the real huggingface_hub library against a server on this machine."""

import errno
import json
import random
from pathlib import Path

import pytest

from tests.checkpoint.layouts import save_gguf_split
from tests.checkpoint.quantized_folder import save_quantized
from tests.hub.hub_server import Hub, Repository, run_tramontane
from tests.tiny import make_config, make_model
from tramontane.checkpoint.mistral import write_params
from tramontane.errors import CapacityError, StorageError
from tramontane.hub.hub_errors import explain_hub_error

MODEL = "someone/tiny-mixtral"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def make_files(**changes: bytes) -> dict[str, bytes]:
    """A repository with everything twice, and what must never be taken."""
    weights = random.Random(0).randbytes(300_000)
    return {
        "config.json": json.dumps(make_config().to_hf()).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "README.md": b"read me",
        "LICENSE": b"do as you like",
        "model.safetensors.index.json": b'{"weight_map": {}}',
        SHARDS[0]: weights,
        SHARDS[1]: weights[::-1],
        "params.json": json.dumps(write_params(make_config())).encode(),
        "consolidated.safetensors": weights * 2,
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "onnx/model.onnx": b"onnx",
        **changes,
    }


@pytest.fixture
def repository(hub: Hub) -> Repository:
    hub.repositories[MODEL] = Repository(make_files())
    return hub.repositories[MODEL]


def find_snapshot(home: Path, repository: Repository) -> Path:
    folder = f"models--{MODEL.replace('/', '--')}"
    return home / "hub" / folder / "snapshots" / repository.commit


def test_one_format_is_fetched_listed_checked_and_removed(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 0, result.stderr
    snapshot = find_snapshot(tmp_path, repository)
    expected = {
        "config.json", "tokenizer.json", "README.md", "LICENSE", "model.safetensors.index.json",
        *SHARDS,
    }  # fmt: skip
    assert {path.name for path in snapshot.iterdir()} == expected
    assert all((snapshot / name).read_bytes() == repository.files[name] for name in expected)
    assert sorted(hub.list_fetched()) == sorted(expected)
    assert str(snapshot) in result.stdout
    assert f"tramontane run {MODEL}\n" in result.stdout

    hub.requests.clear()  # a second time there is nothing to fetch
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert (result.returncode, hub.list_fetched()) == (0, [])
    assert "already there" in result.stderr

    result = run_tramontane("list", "--json", home=tmp_path)
    (listed,) = [m for m in json.loads(result.stdout) if not m["is_bundled"]]
    assert (listed["id"], listed["formats"], listed["path"]) == (MODEL, ["hf"], str(snapshot))
    assert listed["bytes"] == sum(len(repository.files[name]) for name in expected)
    assert MODEL in run_tramontane("list", home=tmp_path).stdout

    result = run_tramontane("verify", MODEL, home=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    flip_bit((snapshot / SHARDS[1]).resolve())
    result = run_tramontane("verify", MODEL, home=tmp_path)
    assert result.returncode == 1
    assert f"differs     {SHARDS[1]}: sha256 is" in result.stdout
    assert f"ok          {SHARDS[0]}" in result.stdout
    assert "ok          config.json" in result.stdout
    assert f"{SHARDS[1]} (differs)" in result.stderr

    blob = (snapshot / SHARDS[1]).resolve()  # what the message says to do mends it
    assert f"remove {blob}, then run: tramontane pull {MODEL}" in result.stderr
    blob.unlink()
    hub.requests.clear()
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert (result.returncode, hub.list_fetched()) == (0, [SHARDS[1]])
    assert (snapshot / SHARDS[1]).read_bytes() == repository.files[SHARDS[1]]

    result = run_tramontane("rm", MODEL, home=tmp_path)  # nobody to ask
    assert result.returncode == 1
    assert "--yes" in result.stderr
    result = run_tramontane("rm", MODEL, "--yes", home=tmp_path)
    assert f"({listed['bytes']:,} bytes) freed" in result.stdout
    assert not snapshot.parents[1].exists()
    result = run_tramontane("rm", MODEL, "--yes", home=tmp_path)
    assert (result.returncode, "there: no models" in result.stderr) == (1, True)


def flip_bit(path: Path, position: int = 1000) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_dropped_connection_is_resumed(hub: Hub, tmp_path: Path) -> None:
    """The library writes, and resumes, in steps of 10 MiB."""
    weights = random.Random(0).randbytes(11 * 2**20)
    files = {**make_files(), SHARDS[0]: weights}
    hub.repositories[MODEL] = repository = Repository(files)
    hub.breaks[SHARDS[0]] = len(weights) - 1000
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 0, result.stderr
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith(SHARDS[0])]
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    assert (find_snapshot(tmp_path, repository) / SHARDS[0]).read_bytes() == weights


def test_finished_files_are_kept_after_a_failure(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    hub.failures[SHARDS[1]] = 500
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 1
    assert "answered HTTP 500" in result.stderr
    assert "Traceback" not in result.stderr
    result = run_tramontane("verify", MODEL, home=tmp_path)  # half a model is not a whole one
    assert (result.returncode, f"missing     {SHARDS[1]}" in result.stdout) == (1, True)
    hub.failures.clear()
    hub.requests.clear()
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert (result.returncode, hub.list_fetched()) == (0, [SHARDS[1]])


def test_into_a_folder_and_checked_there(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    arguments = ("pull", MODEL, "--format", "mistral", "--dir", str(folder))
    result = run_tramontane(*arguments, home=tmp_path / "home", url=hub.url)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        "params.json", "consolidated.safetensors", "tokenizer.json", "README.md", "LICENSE"
    }  # fmt: skip
    assert f"tramontane run '{folder}'" in result.stdout
    flip_bit(folder / "consolidated.safetensors")
    result = run_tramontane("verify", str(folder), home=tmp_path / "home")
    assert result.returncode == 1
    assert "differs     consolidated.safetensors" in result.stdout
    assert "4 of 5 files ok" in result.stdout


def test_a_gguf_file_is_chosen_by_a_part_of_its_name(hub: Hub, tmp_path: Path) -> None:
    names = ["tiny.Q4_0.gguf", "tiny.Q8_0.gguf"]
    hub.repositories[MODEL] = Repository({name: name.encode() for name in names})
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 1
    assert "2 GGUF models" in result.stderr
    assert "tiny.Q4_0, tiny.Q8_0" in result.stderr
    result = run_tramontane("pull", f"{MODEL}:q8_0", home=tmp_path, url=hub.url)
    assert result.returncode == 0, result.stderr
    assert hub.list_fetched() == [names[1]]
    assert f"run {MODEL}:q8_0\n" in result.stdout


def test_all_parts_of_a_split_gguf_are_fetched_and_run(hub: Hub, tmp_path: Path) -> None:
    """What is announced as runnable is: the name of the first part stands for all."""
    save_gguf_split(make_model(), tmp_path / "parts", stem="tiny-Q8")
    parts = sorted((tmp_path / "parts").iterdir())
    files = {f"Q8/{part.name}": part.read_bytes() for part in parts}
    hub.repositories[MODEL] = Repository({**files, "other.gguf": b"x"})
    result = run_tramontane("pull", f"{MODEL}:Q8", home=tmp_path, url=hub.url)
    assert result.returncode == 0, result.stderr
    assert "3 gguf weight files" in result.stderr
    assert sorted(hub.list_fetched()) == [part.name for part in parts]
    assert f"run {MODEL}:Q8\n" in result.stdout
    for verb in ("show", "estimate"):
        result = run_tramontane(verb, f"{MODEL}:Q8", "--json", home=tmp_path)
        assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"] == f"{MODEL}:Q8"

    del hub.repositories[MODEL].files[f"Q8/{parts[1].name}"]
    result = run_tramontane("pull", f"{MODEL}:Q8", home=tmp_path / "new", url=hub.url)
    assert result.returncode == 1
    assert f"{MODEL} is not whole: Q8/{parts[1].name} is missing" in result.stderr


def test_the_disk_is_measured_before_the_first_byte(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    before = "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 8, 1234)"
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url, before=before)
    assert (result.returncode, hub.list_fetched()) == (1, [])
    assert "bytes needed, 1,234 bytes free" in result.stderr


def test_a_model_of_another_family_costs_no_weights(hub: Hub, tmp_path: Path) -> None:
    config = b'{"model_type": "llama"}'
    hub.repositories[MODEL] = Repository(make_files(**{"config.json": config}))
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 1
    assert "model_type is 'llama'" in result.stderr
    assert not set(hub.list_fetched()) & set(SHARDS)


def test_params_of_another_kind_cost_no_weights(hub: Hub, tmp_path: Path) -> None:
    params = json.dumps(write_params(make_config()) | {"vision_encoder": {}}).encode()
    hub.repositories[MODEL] = Repository(make_files(**{"params.json": params}))
    result = run_tramontane("pull", MODEL, "--format", "mistral", home=tmp_path, url=hub.url)
    assert result.returncode == 1
    assert f"{MODEL} cannot be used, so its weights were not fetched: " in result.stderr
    assert "params.json: vision_encoder is {}" in result.stderr
    assert "consolidated.safetensors" not in hub.list_fetched()


def test_a_folder_that_we_quantised_is_fetched_and_read(hub: Hub, tmp_path: Path) -> None:
    model = make_model(make_config(dim=64, head_dim=16, hidden_dim=96))
    folder = save_quantized(model, tmp_path / "quantized")
    hub.repositories[MODEL] = Repository({p.name: p.read_bytes() for p in folder.iterdir()})
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 0, result.stderr
    assert "(quantized, " in result.stdout
    result = run_tramontane("show", MODEL, "--json", home=tmp_path)
    assert json.loads(result.stdout)["layout"] == "tramontane, quantised"


@pytest.mark.parametrize("file", ["config.json", "params.json"])
def test_show_and_estimate_fetch_the_configuration_alone(
    hub: Hub, repository: Repository, tmp_path: Path, file: str
) -> None:
    other = {"config.json": "params.json", "params.json": "config.json"}[file]
    del repository.files[other]
    result = run_tramontane("show", MODEL, "--json", home=tmp_path, url=hub.url)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["name"] == MODEL
    assert values["layout"] == "a configuration, no weights"
    assert values["parameters"] == make_config().count_parameters().total
    assert hub.list_fetched() == [file]
    hub.requests.clear()  # a second time it is there
    result = run_tramontane("estimate", MODEL, "--json", home=tmp_path, url=hub.url)
    assert result.returncode == 0, result.stderr
    assert hub.requests == []
    result = run_tramontane("estimate", f"{MODEL}:Q4_0", home=tmp_path, url=hub.url)
    assert result.returncode == 1
    assert f"fetch it first (tramontane pull {MODEL}:Q4_0), or name {MODEL}" in result.stderr


REFUSED = {
    f"{MODEL} --revision v9": "has no revision 'v9'",
    "someone/else": "is not on http://127.0.0.1",
    "gated/model": "accept its licence at http://127.0.0.1",
    "only/pickles": "pickles only (pytorch_model.bin)",
    "only/words": "has no weights that tramontane reads",
    f"{MODEL} --format gguf": "no weights in the format gguf; it has hf, mistral",
    f"{MODEL} --format onnx": "--format is 'onnx'",
    f"{MODEL}:Q4_0 --format hf": "names a GGUF file, and --format hf something else",
    "../etc/passwd": "is not a model id",
    "no--dashes/there": "is not a model id",
    "gpt2": "is not a model id",
}


def test_what_cannot_be_fetched_is_said(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    hub.repositories["gated/model"] = Repository(make_files(), refused=(403, "GatedRepo"))
    hub.repositories["only/pickles"] = Repository(
        {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    )
    hub.repositories["only/words"] = Repository({"README.md": b"soon"})
    before = f"""
from tramontane.cli.main import run_command
for line in {list(REFUSED)}:
    assert run_command(["pull", *line.split()]) == 1, line
"""
    result = run_tramontane("--version", home=tmp_path, url=hub.url, before=before)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if ": error: " in line]
    for error, (arguments, expected) in zip(errors, REFUSED.items(), strict=True):
        assert expected in error, arguments
    assert hub.list_fetched() == []


def test_the_configuration_alone(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    before = f"from tramontane.hub.pull import fetch_config\nprint(fetch_config({MODEL!r}))"
    result = run_tramontane("list", home=tmp_path, url=hub.url, before=before)
    assert result.returncode == 0, result.stderr
    assert str(find_snapshot(tmp_path, repository)) in result.stdout
    assert hub.list_fetched() == ["config.json"]
    assert MODEL not in result.stdout


def test_a_token_opens_what_is_closed(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    hub.needs_token = True
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 1
    assert "(HTTP 401)" in result.stderr
    assert "HF_TOKEN" in result.stderr
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url, HF_TOKEN="let-me-in")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "cannot be fetched from http://127.0.0.1:9"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFF")],
)
def test_no_network(environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    result = run_tramontane("pull", MODEL, home=tmp_path, **environment)
    assert result.returncode == 1
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_of_another_size_is_refused(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    assert run_tramontane("pull", MODEL, home=tmp_path, url=hub.url).returncode == 0
    path = (find_snapshot(tmp_path, repository) / SHARDS[0]).resolve()
    path.write_bytes(path.read_bytes()[:-1])
    result = run_tramontane("pull", MODEL, home=tmp_path, url=hub.url)
    assert result.returncode == 1
    assert f"299,999 bytes, and 300,000 on the hub; remove {path}" in result.stderr


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, CapacityError), (errno.EACCES, StorageError)]
)
def test_errors_of_the_disk(number: int, expected: type, tmp_path: Path) -> None:
    error = explain_hub_error(OSError(number, "no"), model=MODEL, revision=None, folder=tmp_path)
    assert isinstance(error, expected)
