"""The results of the bake-off as a Markdown table, and the place in the page where it stands."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.machine import describe_machine
from tramontane.atomic import atomic_file

BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
HEADER = (
    "arm", "parameters, active", "tokens/s", "bits per byte, same tokens",
    "bits per byte, same time", "steps and minutes then", "load entropy", "dead experts",
)  # fmt: skip

Result = dict[str, Any]


def build_table(results: Sequence[Result]) -> str:
    """One row per arm that was run both ways: mean and standard deviation over the seeds."""
    by_time = [r for r in results if r["budget"] == "time"]
    names = dict.fromkeys(r["arm"] for r in by_time)
    seeds = sorted({r["seed"] for r in by_time})
    lines = [
        f"{describe_machine()}; seeds {', '.join(map(str, seeds))}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "| " + " | ".join(["---"] + ["--:"] * (len(HEADER) - 1)) + " |",
    ]
    for name in names:
        same_tokens, same_time = (
            [r for r in results if r["arm"] == name and r["budget"] == budget]
            for budget in ("tokens", "time")
        )
        lines.append("| " + " | ".join(_build_row(same_tokens, same_time)) + " |")
    return "\n".join(lines)


def _build_row(same_tokens: list[Result], same_time: list[Result]) -> list[str]:
    first = same_tokens[0]
    count = first["parameters"]
    is_sparse = bool(first["load_entropy"])
    return [
        first["label"],
        f"{count['total'] / 1e6:.2f}M, {count['active'] / 1e6:.2f}M",
        f"{fmean(r['tokens_per_second'] for r in same_tokens):,.0f}",
        _show(same_tokens, lambda r: fmean(r["bits_per_byte"].values())),
        _show(same_time, lambda r: fmean(r["bits_per_byte"].values())),
        f"{same_time[0]['steps']:,} in {_count_minutes(same_time):.1f}",
        _show(same_tokens, lambda r: min(r["load_entropy"])) if is_sparse else "-",
        f"{fmean(r['num_dead'] for r in same_tokens):.1f}" if is_sparse else "-",
    ]


def _count_minutes(results: list[Result]) -> float:
    """What the steps really took, in the mean."""
    return fmean(r["steps"] * r["seconds_per_step"] for r in results) / 60


def _show(results: list[Result], measure: Callable[[Result], float]) -> str:
    """Mean and sample deviation; of one result the value alone."""
    values = [measure(result) for result in results]
    spread = f" \u00b1 {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread}"


def write_table(page: Path, table: str) -> None:
    """Put the table between the marks of the page."""
    head, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no place for the table: the lines {BEGIN} and {END}")
    with atomic_file(page) as path:
        path.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")
