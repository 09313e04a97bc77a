"""The results of a bake-off as a Markdown table, and the place in the page where it stands."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.machine import describe_machine
from tramontane.atomic import atomic_file

MAX_RISE = 0.5  # nats that the loss of a run may have risen at its end

Result = dict[str, Any]
Column = Callable[[Sequence[Result], Sequence[Result]], str]  # of same tokens, and of same time


def build_table(results: Sequence[Result]) -> str:
    """One row per arm: mean and standard deviation over the seeds that ended with a model."""
    shown = [r for r in results if not r["hidden"]]
    columns = _COLUMNS if any(r["budget"] == "time" for r in shown) else _TOKEN_COLUMNS
    seeds = sorted({r["seed"] for r in shown})
    lines = [
        f"{describe_machine()}; seeds {', '.join(map(str, seeds))}.",
        "",
        "| " + " | ".join(["arm", *columns]) + " |",
        "| " + " | ".join(["---"] + ["--:"] * len(columns)) + " |",
    ]
    for name in dict.fromkeys(r["arm"] for r in shown):
        same_tokens, same_time = (
            [r for r in shown if r["arm"] == name and r["budget"] == budget]
            for budget in ("tokens", "time")
        )
        cells = [column(same_tokens, same_time) for column in columns.values()]
        lines.append("| " + " | ".join([same_tokens[0]["label"], *cells]) + " |")
    return "\n".join(lines)


def _count_parameters(same_tokens: Sequence[Result], _: Sequence[Result]) -> str:
    count = same_tokens[0]["parameters"]
    return f"{count['total'] / 1e6:.2f}M, {count['active'] / 1e6:.2f}M"


def _show_speed(same_tokens: Sequence[Result], _: Sequence[Result]) -> str:
    return f"{fmean(r['tokens_per_second'] for r in same_tokens):,.0f}"


def _show_bits(results: Sequence[Result]) -> str:
    return _show(results, lambda r: fmean(r["bits_per_byte"].values()))


def _show_time(_: Sequence[Result], same_time: Sequence[Result]) -> str:
    """Steps, and the minutes that they really took, in the mean."""
    minutes = fmean(r["steps"] * r["seconds_per_step"] for r in same_time) / 60
    return f"{same_time[0]['steps']:,} in {minutes:.1f}"


def _show_entropy(same_tokens: Sequence[Result], _: Sequence[Result]) -> str:
    return _show(
        [r for r in same_tokens if r.get("load_entropy")], lambda r: min(r["load_entropy"])
    )


def _count_dead(same_tokens: Sequence[Result], _: Sequence[Result]) -> str:
    sparse = [r for r in same_tokens if r.get("load_entropy")]
    return f"{fmean(r['num_dead'] for r in sparse):.1f}" if sparse else "-"


def _count_diverged(same_tokens: Sequence[Result], same_time: Sequence[Result]) -> str:
    results = [*same_tokens, *same_time]
    diverged = [r for r in results if "bits_per_byte" not in r or r["loss_rise"] > MAX_RISE]
    return f"{len(diverged)} of {len(results)}"


def _show(results: Sequence[Result], measure: Callable[[Result], float]) -> str:
    """Mean and sample deviation; of one result the value alone."""
    values = [measure(result) for result in results if "bits_per_byte" in result]
    if not values:
        return "-"
    spread = f" \u00b1 {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread}"


_COLUMNS: dict[str, Column] = {
    "parameters, active": _count_parameters,
    "tokens/s": _show_speed,
    "bits per byte, same tokens": lambda same_tokens, _: _show_bits(same_tokens),
    "bits per byte, same time": lambda _, same_time: _show_bits(same_time),
    "steps and minutes then": _show_time,
    "load entropy": _show_entropy,
    "dead experts": _count_dead,
    "diverged": _count_diverged,
}
_TOKEN_COLUMNS = {
    name: column
    for name, column in _COLUMNS.items()
    if name not in ("bits per byte, same time", "steps and minutes then")
}


def list_marks(name: str) -> tuple[str, str]:
    """The lines of the page between which the table of this recipe stands."""
    return f"<!-- the table of {name} begins -->", f"<!-- the table of {name} ends -->"


def write_table(page: Path, name: str, table: str) -> None:
    """Put the table of a recipe between its marks of the page."""
    first, last = list_marks(name)
    head, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"{page} has no place for the table: the lines {first} and {last}")
    with atomic_file(page) as path:
        path.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")
