"""What a chat template may use up: time, text, and the size of every value it makes.

A template is a program that came with a file. It can make loops, and values that double with each
step, but none that escape these limits; nothing here is shared between two renderings.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

MAX_SECONDS = 2.0
MAX_CHARS = 2**23  # of one value, and of all that is written
MAX_ITEMS = 100_000  # of one value, whatever its depth
MAX_DEPTH = 100
MAX_INT_BITS = 4096


class BudgetError(TemplateError):
    """A template used up what it may."""


class Budget:
    """One rendering's limits. Every step of the template calls `tick`, every new value `bound`."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._num_written = 0

    def tick(self) -> None:
        """One step. Raises BudgetError when the time is over."""
        if time.monotonic() > self._deadline:
            raise BudgetError(f"it ran longer than {MAX_SECONDS:g} s")

    def write(self, text: str) -> str:
        """`text`, on its way to the output. Raises BudgetError."""
        self.tick()
        self._num_written += len(text)
        if self._num_written > MAX_CHARS:
            raise BudgetError(f"it writes more than {MAX_CHARS} characters")
        return text

    def bound(self, value: Any) -> Any:
        """`value`, an iterator as a list. Raises BudgetError if it is too large."""
        if isinstance(value, Iterator):
            value = self.collect(value)
        require_small(value)
        return value

    def collect(self, values: Iterable[Any]) -> list[Any]:
        """A list of `values`, which may be endless. Raises BudgetError."""
        collected: list[Any] = []
        size = 0
        for value in values:
            self.tick()
            size += require_small(value) + 1
            if size > MAX_CHARS or len(collected) >= MAX_ITEMS:
                raise BudgetError("it makes a list that is too long")
            collected.append(value)
        return collected

    def walk(self, values: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, one step each."""
        for value in values:
            self.tick()
            yield value


def require_small(value: Any) -> int:
    """Characters and items of `value` if all it holds were written out. Raises BudgetError.

    A value that holds another twice counts it twice: ten lists of ten lists of ten are 1110 items
    even if they are three objects.
    """
    size, num_items, stack = 0, 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        num_items += 1
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, int):
            _require_small_int(item)
        elif isinstance(item, Namespace):
            if depth:
                raise BudgetError("it puts a namespace into another value")
        elif isinstance(item, dict):
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += [(part, depth + 1) for part in item]
        if size > MAX_CHARS or num_items + len(stack) > MAX_ITEMS or depth > MAX_DEPTH:
            raise BudgetError("it makes a value that is too large")
    return size + num_items


def _require_small_int(number: int) -> None:
    if number.bit_length() > MAX_INT_BITS:
        raise BudgetError("it makes a number that is too large")


def require_small_result(operator: str, left: Any, right: Any) -> None:
    """Refuses, before it is computed, what grows faster than by adding. Raises BudgetError."""
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            is_repeat = isinstance(times, int) and not isinstance(value, int | float)
            if is_repeat and times > 1 and require_small(value) * times > MAX_CHARS:
                raise BudgetError("it repeats a value too often")
    elif operator == "**":
        is_small = isinstance(left, int | float) and isinstance(right, int | float)
        if not is_small or abs(right) > 64 or (isinstance(left, int) and abs(left) > 2**64):
            raise BudgetError("it raises a number to too high a power")
    elif operator == "%" and isinstance(left, str | bytes):
        raise BudgetError("it formats a text with %, which is not allowed: use ~")


def require_small_replacement(text: str, old: str, new: str) -> None:
    """As `require_small_result`, for replacing `old` in `text`."""
    if len(text) + text.count(old) * len(new) > MAX_CHARS:
        raise BudgetError("it replaces too much")


def require_small_join(separator: str, values: Any) -> None:
    """As `require_small_result`, for joining."""
    num_values = len(values) if hasattr(values, "__len__") else MAX_ITEMS
    if len(separator) * num_values + require_small(values) > MAX_CHARS:
        raise BudgetError("it joins too much")
