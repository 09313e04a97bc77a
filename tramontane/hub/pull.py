"""Fetch a model from the hub: one format of it, into the hub's cache or a folder of your own.

The library `huggingface_hub` does the fetching: it resumes where a connection broke, keeps files
that are finished, and honours HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from tramontane.atomic import require_disk_space
from tramontane.errors import CheckpointError, ConfigError
from tramontane.hub.cache import get_cache_folder, get_repository_folder, split_model_id
from tramontane.hub.formats import Choice, Format, choose_files
from tramontane.hub.hub_errors import HUB_ERRORS, explain_hub_error
from tramontane.hub.meter import Meter, OnBytes, ignore_bytes
from tramontane.hub.paths import check_relative_path

CONFIG_FILES = ("config.json", "params.json")
CheckConfig = Callable[[Path], object]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _accept(_: Path) -> None: ...


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub: its size in bytes, and the name its content has in the cache."""

    size: int
    blob: str


@dataclass(frozen=True)
class PullPlan:
    """What a pull will fetch; `folder` is None for the hub's cache."""

    model: str
    revision: str
    commit: str
    choice: Choice
    files: Mapping[str, RemoteFile]
    folder: Path | None

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, those that are already there included."""
        return sum(file.size for file in self.files.values())

    @property
    def snapshot(self) -> Path:
        """Where the files will lie together."""
        if self.folder is not None:
            return self.folder
        return get_repository_folder(self.model) / "snapshots" / self.commit

    @property
    def path(self) -> Path:
        """What to load: the folder, or the (first) GGUF file."""
        is_gguf = self.choice.format == "gguf"
        return self.snapshot / self.choice.weights[0] if is_gguf else self.snapshot

    def count_missing_bytes(self) -> int:
        """Bytes that are not yet on this machine."""
        return sum(file.size for name, file in self.files.items() if not self._has(name, file))

    def _has(self, name: str, file: RemoteFile) -> bool:
        if self.folder is not None:
            return (self.folder / name).is_file()
        blob = get_repository_folder(self.model) / "blobs" / file.blob
        return (self.snapshot / name).is_file() or (bool(file.blob) and blob.is_file())


def plan_pull(
    model: str,
    *,
    revision: str | None = None,
    format: Format | None = None,
    part: str = "",
    folder: Path | None = None,
) -> PullPlan:
    """Ask the hub what `model` ("org/name") has, and choose the files of one format.

    Raises ConfigError if that is no model id, and CheckpointError if it is not there, not open, has
    no weights that we read, or the hub cannot be reached.
    """
    split = split_model_id(model)
    if split is None or split[1]:
        raise ConfigError(f"{model!r} is not a model id; it should read org/name")
    info = _ask_hub(model, revision)
    names = [file.rfilename for file in info.siblings or ()]
    choice = choose_files(names, model=model, format=format, part=part)
    for name in choice.files:
        check_relative_path(name, source=model)
    files = {file.rfilename: file for file in info.siblings or ()}
    return PullPlan(
        model=model,
        revision=revision or constants.DEFAULT_REVISION,
        commit=_require_commit(info.sha, model),
        choice=choice,
        files={name: _describe(files[name], model) for name in choice.files},
        folder=None if folder is None else folder.expanduser().absolute(),
    )


def run_pull(
    plan: PullPlan,
    *,
    on_bytes: OnBytes = ignore_bytes,
    check_config: CheckConfig = _accept,
) -> Path:
    """Fetch the files of a plan; returns the path to load.

    `check_config` is given the configuration as soon as it is there, before the weights, and raises
    a TramontaneError if these could not be used. A GGUF has it inside, where it is not looked at.

    Raises CapacityError before the first byte if the disk has not enough space, CheckpointError if
    the network fails or a file has another size than the hub says, and StorageError if the place
    cannot be written to.
    """
    require_disk_space(plan.folder or get_cache_folder(), plan.count_missing_bytes())
    meter = Meter(plan.total_bytes, on_bytes)
    done = 0
    for name, file in plan.files.items():
        path = _fetch(plan, name, plan.commit, meter)
        _check_size(path, file, plan)
        if name in CONFIG_FILES:
            _check(path, plan.model, check_config)
        done += file.size
        meter.add(done - meter.done)  # also what was there before, or came compressed
    if plan.folder is None and not _COMMIT.fullmatch(plan.revision):
        _point_branch(plan, meter)
    return plan.path


def _check(path: Path, model: str, check_config: CheckConfig) -> None:
    try:
        check_config(path)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(
            f"{model} cannot be used, so its weights were not fetched: {error}"
        ) from None


def fetch_config(model: str, *, revision: str | None = None) -> Path:
    """Fetch a model's configuration alone; returns the folder of the cache it lies in.

    Raises as `plan_pull` does.
    """
    info = _ask_hub(model, revision)
    names = {file.rfilename for file in info.siblings or ()}
    name = next((name for name in CONFIG_FILES if name in names), None)
    if name is None:
        raise CheckpointError(f"{model} has neither config.json nor params.json on the hub")
    commit = _require_commit(info.sha, model)
    try:
        return Path(huggingface_hub.hf_hub_download(model, name, revision=commit)).parent
    except HUB_ERRORS as error:
        folder = get_cache_folder()
        raise explain_hub_error(error, model=model, revision=revision, folder=folder) from error


def _ask_hub(model: str, revision: str | None) -> "huggingface_hub.ModelInfo":
    timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
    api = huggingface_hub.HfApi()
    try:
        return api.model_info(model, revision=revision, files_metadata=True, timeout=timeout)
    except HUB_ERRORS as error:
        raise explain_hub_error(
            error, model=model, revision=revision, folder=get_cache_folder()
        ) from error
    except (ValueError, KeyError, TypeError) as error:  # an answer that is no model's description
        endpoint = constants.ENDPOINT
        raise CheckpointError(
            f"{endpoint} did not answer as a hub does when asked for {model} ({error}); check "
            "HF_ENDPOINT, and whether a network asks you to log in first"
        ) from error


def _require_commit(commit: str | None, model: str) -> str:
    if commit is None or not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"the hub gave {commit!r} as the commit of {model}; try again later")
    return commit


def _describe(file: "huggingface_hub.hf_api.RepoSibling", model: str) -> RemoteFile:
    if not isinstance(file.size, int) or file.size < 0:
        raise CheckpointError(
            f"the hub gave {file.size!r} as the size of {file.rfilename} of {model}"
        )
    blob = file.lfs.sha256 if file.lfs is not None else file.blob_id or ""
    return RemoteFile(file.size, blob if re.fullmatch(r"[0-9a-f]{40,64}", blob) else "")


def _fetch(plan: PullPlan, name: str, revision: str, meter: Meter) -> Path:
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                plan.model,
                name,
                revision=revision,
                local_dir=plan.folder,
                tqdm_class=_make_counter(meter),
            )
        )
    except HUB_ERRORS as error:
        folder = plan.folder or get_cache_folder()
        raise explain_hub_error(
            error, model=plan.model, revision=plan.revision, folder=folder
        ) from error


def _check_size(path: Path, file: RemoteFile, plan: PullPlan) -> None:
    size = path.stat().st_size
    if size != file.size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, and {file.size:,} on the hub; remove {path.resolve()} and "
            f"pull {plan.model} again"
        )


def _point_branch(plan: PullPlan, meter: Meter) -> None:
    """Let the cache know that this commit is the branch, now that every file is there.

    Asking for one of its files by the branch's name does so, and fetches nothing.
    """
    smallest = min(plan.files, key=lambda name: plan.files[name].size)
    path = _fetch(plan, smallest, plan.revision, meter)
    if path != plan.snapshot / smallest:
        raise CheckpointError(
            f"{plan.model} changed on the hub while it was fetched; pull it again to have the new "
            f"version, or use the one in {plan.path}"
        )


def _make_counter(meter: Meter) -> Any:
    """What the library takes for a progress bar of each file; it tells the meter of all files."""

    class Counter:
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            meter.add(initial)

        def update(self, count: float | None = 1) -> None:
            meter.add(int(count or 0))

        def update_transfer(self, _: float | None = 1) -> None: ...

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *_: object) -> None: ...

    return Counter
