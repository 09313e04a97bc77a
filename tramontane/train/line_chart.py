"""Line charts as SVG text, for pages that stand alone."""

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 190, 70, 78, 24, 20
_MAX_NAMES = 8  # of lines; of more, the first and the last have one
_COLD, _EVEN, _HOT = (33, 102, 172), (235, 235, 235), (230, 110, 20)
_FIRST, _LAST = (150, 190, 235), (20, 40, 90)  # of a row of lines, from light to dark

Color = tuple[int, int, int]


def shade(value: float) -> str:
    """-1 is blue, 0 grey, 1 orange."""
    end = _HOT if value > 0 else _COLD
    return _mix(_EVEN, end, min(1.0, abs(value)))


def draw_lines(title: str, steps: Sequence[int], lines: Mapping[str, Sequence[float]]) -> str:
    """Several lines over the same steps, in shades of blue, light to dark in their order."""
    low, high = _find_range([value for values in lines.values() for value in values])

    def place(step: float, value: float) -> tuple[float, float]:
        span = max(1, steps[-1] - steps[0])
        x = _LEFT + (step - steps[0]) / span * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [f'<text x="0" y="14" style="font-weight:600">{escape(title)}</text>']
    for value in (low, (low + high) / 2, high):
        (x, y), (end, _) = place(steps[0], value), place(steps[-1], value)
        parts.append(
            f'<path d="M{x} {y}H{max(end, x + 1)}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>'
        )
    for step in (steps[0], steps[-1]):
        anchor = "start" if step == steps[0] else "end"
        x, _ = place(step, low)
        parts.append(f'<text x="{x}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{step:,}</text>')
    for index, (name, values) in enumerate(lines.items()):
        points = [place(*pair) for pair in zip(steps, values, strict=True)]
        color = _mix(_FIRST, _LAST, index / max(1, len(lines) - 1)) if len(lines) > 1 else "#21508c"
        parts.append(_draw_line(points, color, name))
    ends = {name: place(steps[-1], values[-1]) for name, values in lines.items()}
    parts += _name_lines(ends)
    head = f'<svg role="img" aria-label="{escape(title)}" width="{_WIDTH}" height="{_HEIGHT}">'
    return f"{head}{''.join(parts)}</svg>"


def _draw_line(points: Sequence[tuple[float, float]], color: str, name: str) -> str:
    if len(points) == 1:
        (x, y) = points[0]
        return f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>'
    path = " ".join(f"{x},{y}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6">'
    return f"{line}<title>{escape(name)}</title></polyline>"


def _name_lines(ends: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names beside the ends of the lines, moved apart where they would overlap."""
    names = [name for name in ends if name]
    if len(names) > _MAX_NAMES:
        names = [names[0], names[-1]]
    texts, next_free = [], float("-inf")
    for name in sorted(names, key=lambda name: ends[name][1]):
        x, y = ends[name]
        next_free = max(y + 4, next_free + 13)
        texts.append(f'<text x="{x + 6}" y="{next_free:.1f}">{escape(name)}</text>')
    return texts


def _find_range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest, or something around them if they are one."""
    low, high = min(values), max(values)
    margin = abs(low) * 0.1 or 0.5
    return (low, high) if high - low > 1e-9 * abs(high) else (low - margin, high + margin)


def _mix(first: Color, second: Color, share: float) -> str:
    parts = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return f"rgb({','.join(map(str, parts))})"
