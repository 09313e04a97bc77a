"""A run's figures for TensorBoard, where that is installed: the numbers of log.jsonl as curves."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class EventLog:
    """Writes every number of a record as a scalar; without TensorBoard it writes nothing.

    A number in a list gets the list's place in its name: router/load/layer_3/expert_5.
    """

    def __init__(self, folder: Path, *, first_step: int, say: Callable[[str], None]) -> None:
        self._writer: Any = None
        try:  # not at the top: it is optional, and takes half a second
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no curves for TensorBoard (pip install tensorboard); log.jsonl has all figures")
            return
        # What an interrupted run wrote after its checkpoint is not shown.
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of one line of the log, at its step."""
        if self._writer is None:
            return
        for name, value in _list_scalars(record, ""):
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Force all to disk."""
        if self._writer is not None:
            self._writer.close()


def _list_scalars(value: Any, name: str, *places: str) -> Iterator[tuple[str, float]]:
    """Names and numbers in a record's values; what is no number has none."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _list_scalars(inner, f"{name}/{key}" if name else key, "layer", "expert")
    elif isinstance(value, list) and places:
        for index, inner in enumerate(value):
            yield from _list_scalars(inner, f"{name}/{places[0]}_{index}", *places[1:])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
