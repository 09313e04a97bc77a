"""OUT/router_health.html: a run's routers as pictures, one page that needs nothing else.

python -m tramontane.train.health_report OUT draws it again from OUT/log.jsonl.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tramontane.atomic import atomic_file
from tramontane.train.line_chart import draw_lines, shade

MAX_COLUMNS = 120  # of a picture of loads: steps beyond that share one
_CELL, _LEFT, _WIDTH = 14, 70, 720
_MEASURES = {
    "entropy": "Entropy of the load, of an even one (1: balanced)",
    "max_over_mean": "Largest load over the mean (1: balanced)",
    "dead": "Dead experts (below 0.1 % of the choices)",
    "dropped": "Share of choices that capacity dropped",
    "experts_per_token": "Experts per token",
}
_LOSSES = {
    "loss": "Loss", "load_balancing_loss": "Load-balancing loss", "router_z_loss": "Router z-loss",
}  # fmt: skip
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:820px;margin:2em auto;color:#222}
svg{display:block;margin:.3em 0 1.2em}text{font:12px system-ui,sans-serif;fill:#444}
h2{margin-top:2em;font-size:1.15em}li{margin:.2em 0}"""


def write_health_page(log_path: Path, target: Path) -> bool:
    """Draw the log of a run; nothing is written, and False returned, if it has no router."""
    records = _read_log(log_path)
    routed = [record for record in records if "router" in record]
    if not routed:
        return False
    title = f"Router health of {log_path.parent.name}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f"<p>Steps {routed[0]['step']:,} to {routed[-1]['step']:,}.</p>",
        *_list_alarms(records),
        "<h2>Load of each expert</h2><p>Grey has its even share of a layer's choices, blue less, "
        "orange more; black had no token.</p>",
        *_draw_loads(routed),
        "<h2>Layer by layer</h2>",
        *_draw_measures(routed),
        "<h2>Losses</h2>",
        *_draw_losses(records),
    ]
    with atomic_file(target) as path:
        path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return True


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Whole lines alone: a killed process may have left a part of one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _list_alarms(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    alarms = [(r["step"], text) for r in records for text in r.get("alarms", ())]
    yield f"<h2>Alarms</h2><p>{'None.' if not alarms else ''}</p>"
    if alarms:
        yield "<ul>" + "".join(f"<li>step {s:,}: {escape(text)}" for s, text in alarms) + "</ul>"


def _draw_loads(routed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One picture per layer: experts downwards, steps to the right."""
    columns = _bin(routed)
    steps = routed[0]["step"], routed[-1]["step"]
    for layer in range(len(routed[0]["router"]["load"])):
        loads = [_average([r["router"]["load"][layer] for r in column]) for column in columns]
        yield _draw_load(layer, loads, steps)


def _draw_load(layer: int, loads: Sequence[Sequence[float]], steps: tuple[int, int]) -> str:
    num_experts, width = len(loads[0]), (_WIDTH - _LEFT) / len(loads)
    height = num_experts * _CELL
    cells = [
        f'<rect x="{_LEFT + x * width:.2f}" y="{e * _CELL}" width="{width + 0.3:.2f}" '
        f'height="{_CELL - 1}" fill="{_color(load * num_experts)}">'
        f"<title>expert {e}: {load:.1%}</title></rect>"
        for x, column in enumerate(loads)
        for e, load in enumerate(column)
    ]
    names = [
        f'<text x="{_LEFT - 6}" y="{e * _CELL + 11}" text-anchor="end">{e}</text>'
        for e in range(num_experts)
    ]
    ends = (
        f'<text x="{_LEFT}" y="{height + 14}">step {steps[0]:,}</text>'
        f'<text x="{_WIDTH}" y="{height + 14}" text-anchor="end">step {steps[1]:,}</text>'
        f'<text x="0" y="{height / 2 + 4}">layer {layer}</text>'
    )
    svg = f'<svg role="img" aria-label="load of layer {layer}" width="{_WIDTH}" '
    return f'{svg}height="{height + 18}">{"".join(cells + names)}{ends}</svg>'


def _color(ratio: float) -> str:
    """Of a load over the even one: half is blue, twice is orange, nothing is black."""
    if ratio == 0:
        return "#000"
    return shade((ratio - 1) / max(ratio, 1))


def _draw_measures(routed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = _bin(routed)
    steps = [column[-1]["step"] for column in columns]
    for name, title in _MEASURES.items():
        rows = [_average([record["router"][name] for record in column]) for column in columns]
        found = {value for row in rows for value in row}
        if len(found) == 1:
            yield f"<p>{escape(title)}: {found.pop():g} in all layers, all the time.</p>"
            continue
        lines = {f"layer {i}": list(values) for i, values in enumerate(zip(*rows, strict=True))}
        yield draw_lines(title, steps, lines)


def _draw_losses(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    reports = [record for record in records if "loss" in record]
    columns = _bin(reports) if reports else []
    for name, title in _LOSSES.items():
        values = [_average([[record[name]] for record in column])[0] for column in columns]
        if values:
            yield draw_lines(title, [column[-1]["step"] for column in columns], {"": values})


def _bin(records: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """At most MAX_COLUMNS runs of records, of equal length but for the last."""
    size = -(-len(records) // MAX_COLUMNS)
    return [records[start : start + size] for start in range(0, len(records), size)]


def _average(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column by column."""
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if not write_health_page(folder / "log.jsonl", folder / "router_health.html"):
        sys.exit(f"{folder / 'log.jsonl'} is not there, or has no routers")
