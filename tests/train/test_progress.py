"""The progress line: loss, tokens/s, MFU, memory and time left."""

import re
from dataclasses import replace

import pytest

from tramontane.train.loop import StepReport
from tramontane.train.progress import ProgressPrinter

REPORT = StepReport(
    step=1, loss=3.0, load_balancing_loss=2.0, router_z_loss=1.0, grad_norm=1.0, lr=1e-3,
    num_units=1000, seconds=60.0, mfu=None,
)  # fmt: skip


def print_steps(reports: list[StepReport], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with ProgressPrinter(print_every=2) as printer:
        for report in reports:
            printer.on_step(report, 12)
    return capsys.readouterr().err.splitlines()


def test_a_line_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Medians of time and MFU, as the first step is slow; the mean of the loss."""
    times = {1: (60.0, 0.01), 2: (2.0, 0.3), 3: (2.0, 0.31), 4: (3.0, 0.2), 5: (2.0, 0.3)}
    reports = [
        replace(REPORT, step=step, loss=float(step), seconds=seconds, mfu=mfu)
        for step, (seconds, mfu) in times.items()
    ]
    second, fourth = print_steps(reports, capsys)
    assert second.startswith("step 2/12  loss 1.500  32 tok/s  MFU 16%")
    pattern = r"step 4/12  loss 2\.500  400 tok/s  MFU 25%  \d+\.\d GiB  0 min left"
    assert re.fullmatch(pattern, fourth)


def test_without_a_peak_there_is_no_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = print_steps([REPORT, replace(REPORT, step=2)], capsys)
    assert "MFU" not in line
    assert line.endswith("10 min left")
