"""The models in this machine's hub cache: which there are, where one lies, and removing one.

A cached model is CACHE/models--ORG--NAME/snapshots/COMMIT/, its files links to ../../blobs/;
`refs/main` holds the commit that the branch main had when it was fetched.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import constants

from tramontane.errors import CheckpointError, StorageError
from tramontane.hub.formats import Format, choose_files, find_formats
from tramontane.hub.paths import is_path, list_files

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_MODEL_ID = re.compile(rf"(?P<id>{_PART}/{_PART})(:(?P<part>[A-Za-z0-9._-]+))?")
_MAX_ID_CHARS = 96


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache; `last_used` is in seconds since 1970, as the file system noted it."""

    id: str
    path: Path
    formats: tuple[Format, ...]
    size_bytes: int
    last_used: float


def get_cache_folder() -> Path:
    """Where the hub's library keeps models; HF_HOME and HF_HUB_CACHE move it."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def split_model_id(text: str) -> tuple[str, str] | None:
    """Cut "org/name" or "org/name:PART" (of a GGUF file's name) in two; None if it is neither."""
    match = _MODEL_ID.fullmatch(text)
    if match is None or len(match["id"]) > _MAX_ID_CHARS or re.search(r"--|\.\.", match["id"]):
        return None
    return match["id"], match["part"] or ""


def resolve_model(name: str) -> Path:
    """Where the model called `name` lies: a path, or the id of a model in the cache.

    An existing path comes first. "org/name" gives the cached folder, or the file if it holds GGUF
    alone, which "org/name:Q4_0" chooses among several. What looks like neither is returned as the
    path that it says. Raises CheckpointError where an id is not in the cache, or has no weights.
    """
    split = split_model_id(name)
    if split is None or is_path(name):
        return Path(name)
    if (path := find_cached(name)) is not None:
        return path
    is_there = bool(find_snapshots(split[0]))
    found = "is in the cache without weights" if is_there else "is no path, and not in the cache"
    raise CheckpointError(f"{name} {found}; fetch it first: tramontane pull {name}")


def find_cached(name: str) -> Path | None:
    """Where the cache has the weights of an id, "org/name" or "org/name:Q4_0"; None without any.

    Raises CheckpointError where there are several GGUF files to choose from, or not that one.
    """
    split = split_model_id(name)
    assert split is not None, name
    model, part = split
    for snapshot in find_snapshots(model):
        names = list(list_files(snapshot))
        formats = find_formats(names)
        if "gguf" in formats and (part or formats == ["gguf"]):
            return snapshot / choose_files(names, model=model, format="gguf", part=part).weights[0]
        if formats and not part:
            return snapshot
    return None


def find_snapshots(model: str) -> list[Path]:
    """The cached folders of a model id: that of the branch main first, then the latest first."""
    repository = get_repository_folder(model)
    folders = [path for path in repository.glob("snapshots/*") if path.is_dir()]
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        main = ""
    return sorted(folders, key=lambda path: (path.name != main, -path.stat().st_mtime))


def get_repository_folder(model: str) -> Path:
    """Where the cache keeps a model id, whether it is there or not."""
    return get_cache_folder() / f"models--{model.replace('/', '--')}"


def list_models() -> tuple[list[CachedModel], list[str]]:
    """The cached models that have weights, by name, and what is wrong with others."""
    scan = _scan()
    if scan is None:
        return [], []
    models = [
        model
        for repository in scan.repos
        if repository.repo_type == "model" and (model := _describe(repository)) is not None
    ]
    return sorted(models, key=lambda model: model.id), sorted(map(str, scan.warnings))


def measure_model(model: str) -> int:
    """Bytes that removing a model frees. Raises CheckpointError if it is not in the cache."""
    scan, repository = _find_repository(model)
    return _plan_removal(scan, repository).expected_freed_size


def remove_model(model: str) -> int:
    """Remove every revision of a model from the cache; returns the bytes freed.

    Raises CheckpointError if it is not there, and StorageError if some of it would not go.
    """
    scan, repository = _find_repository(model)
    plan = _plan_removal(scan, repository)
    plan.execute()
    if repository.repo_path.exists():
        raise StorageError(f"{repository.repo_path} could not be removed whole; check its owner")
    return plan.expected_freed_size


def _plan_removal(
    scan: "HFCacheInfo", repository: "CachedRepoInfo"
) -> "huggingface_hub.DeleteCacheStrategy":
    """What to delete. Copies of a repository share commits, so the plan may see this one alone."""
    alone = replace(scan, repos=frozenset({repository}))
    return alone.delete_revisions(*(revision.commit_hash for revision in repository.revisions))


def _find_repository(model: str) -> tuple["HFCacheInfo", "CachedRepoInfo"]:
    scan = _scan()
    repositories = {} if scan is None else {r.repo_id: r for r in scan.repos if _is_model(r)}
    if scan is not None and model in repositories and repositories[model].revisions:
        return scan, repositories[model]
    folder = get_repository_folder(model)
    if split_model_id(model) and folder.is_dir():
        raise CheckpointError(f"{folder} is damaged or unfinished; remove that folder by hand")
    there = ", ".join(sorted(repositories)) or "no models"
    raise CheckpointError(f"{model} is not in the cache {get_cache_folder()}; there: {there}")


def _is_model(repository: "CachedRepoInfo") -> bool:
    return repository.repo_type == "model"


def _scan() -> "HFCacheInfo | None":
    """The library's own account of its cache; None where there is no cache yet."""
    folder = get_cache_folder()
    return huggingface_hub.scan_cache_dir(folder) if folder.is_dir() else None


def _describe(repository: "CachedRepoInfo") -> CachedModel | None:
    for snapshot in find_snapshots(repository.repo_id):
        if formats := find_formats(list(list_files(snapshot))):
            return CachedModel(
                id=repository.repo_id,
                path=snapshot,
                formats=tuple(formats),
                size_bytes=repository.size_on_disk,
                last_used=repository.last_accessed,
            )
    return None
