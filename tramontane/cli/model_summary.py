"""What `show` and `estimate` say of a model that need not be on this machine."""

from typing import TYPE_CHECKING

from tramontane.errors import CheckpointError

if TYPE_CHECKING:
    from tramontane.checkpoint.summary import Summary


def find_summary(model: str) -> "Summary":
    """That of a path, a preset, or an id of the hub; of what was not pulled, the configuration.

    Raises CheckpointError or ConfigError, naming what was looked for.
    """
    from dataclasses import replace

    from tramontane.checkpoint.summary import summarize
    from tramontane.hub.cache import find_cached, find_snapshots, split_model_id
    from tramontane.hub.paths import is_path
    from tramontane.hub.pull import CONFIG_FILES, fetch_config

    split = split_model_id(model)
    if split is None or is_path(model):
        return summarize(model)
    path = find_cached(model)
    if path is None and split[1]:
        raise CheckpointError(
            f"{model} is not in the cache, and a GGUF has its configuration inside; fetch it "
            f"first (tramontane pull {model}), or name {split[0]} for the model as it was trained"
        )
    if path is None:
        snapshots = find_snapshots(split[0])
        known = (s for s in snapshots if any((s / name).exists() for name in CONFIG_FILES))
        try:
            path = next(known, None) or fetch_config(split[0])
        except CheckpointError as error:
            raise CheckpointError(f"{model} is no path, and not in the cache; {error}") from error
    return replace(summarize(str(path)), name=model)
