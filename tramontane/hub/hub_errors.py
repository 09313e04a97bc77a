"""What went wrong between this machine and the hub, in words that say what to do."""

import errno
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tramontane.atomic import explain_os_error
from tramontane.errors import CheckpointError, StorageError, TramontaneError

# Whatever a call to the hub's library may raise, beside wrong arguments; hf_xet has RuntimeError.
HUB_ERRORS = (HTTPError, OSError, RuntimeError)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def explain_hub_error(
    error: BaseException, *, model: str, revision: str | None, folder: Path
) -> TramontaneError:
    """What to raise when a call about `model`, writing into `folder`, failed with `error`."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it speaks of a cache; its cause says why the hub was not reached
    if isinstance(error, HfHubHTTPError):
        return CheckpointError(_explain_answer(error, model=model, revision=revision))
    if isinstance(error, OfflineModeIsEnabled):
        return CheckpointError(
            f"{model} cannot be fetched: HF_HUB_OFFLINE is set; unset it, or use what "
            "`tramontane list` shows"
        )
    if isinstance(error, HTTPError):
        return CheckpointError(
            f"{model} cannot be fetched from {constants.ENDPOINT}: "
            f"{str(error) or type(error).__name__}; check the network, proxies and HF_ENDPOINT, "
            "then run the same command again: finished files are kept"
        )
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return explain_os_error(error, folder / model)
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{folder} cannot be written: {error}")
    return CheckpointError(
        f"{model} cannot be fetched: {error}; run the same command again: finished files are kept"
    )


def _explain_answer(error: HfHubHTTPError, *, model: str, revision: str | None) -> str:
    """What an HTTP answer of the hub means."""
    page, status = f"{constants.ENDPOINT}/{model}", error.response.status_code
    licence = f"accept its licence at {page}, and set HF_TOKEN to a token of that account"
    if isinstance(error, RevisionNotFoundError):
        return f"{model} has no revision {revision!r}; see {page}/tree/main"
    if isinstance(error, GatedRepoError):
        return f"{model} is gated (HTTP {status}): {licence}"
    if status == 401:
        return f"{model} does not exist, or is private or gated (HTTP 401): {licence}"
    if status == 403:
        return f"{model} is not open to you (HTTP 403): {licence}"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"{model} is not on {constants.ENDPOINT} (HTTP 404); check the spelling"
    return f"{constants.ENDPOINT} answered HTTP {status} for {model}; try again later"
