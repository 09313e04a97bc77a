"""What a person sees of a run: a progress bar in a terminal, plain lines elsewhere."""

import resource
import statistics
import sys
from collections import deque
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tramontane.train.loop import StepReport

_WINDOW = 20  # steps that the shown averages are taken over


class ProgressPrinter:
    """Shows step, loss, tokens per second, MFU, memory and time left; notes go above the bar."""

    def __init__(self, *, print_every: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._print_every = max(1, print_every)
        self._recent: deque[StepReport] = deque(maxlen=_WINDOW)
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(),
            TextColumn("{task.description}"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def on_step(self, report: StepReport, num_steps: int) -> None:
        """Move the bar, or print a line every so many steps where there is none."""
        self._recent.append(report)
        loss = statistics.fmean(step.loss for step in self._recent)
        seconds = statistics.median(step.seconds for step in self._recent)  # the first is slow
        rate = report.num_units / seconds
        shares = [step.mfu for step in self._recent if step.mfu is not None]
        mfu = f"  MFU {statistics.median(shares):.0%}" if shares else ""
        text = f"loss {loss:.3f}  {rate:,.0f} tok/s{mfu}  {_peak_memory_gib():.1f} GiB"
        self._bar.update(self._task, completed=report.step, total=num_steps, description=text)
        if self._bar.disable and report.step % self._print_every == 0:
            left = (num_steps - report.step) * seconds / 60
            self._print(f"step {report.step}/{num_steps}  {text}  {left:,.0f} min left")

    def on_note(self, text: str) -> None:
        """Print a line that stays."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _peak_memory_gib() -> float:
    """The most that was occupied: of the GPU where there is one in use, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
