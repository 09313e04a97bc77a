"""What an answer must be: a JSON document, a match of a regular expression, a word of a grammar."""

from dataclasses import dataclass
from typing import Literal, get_args

from tramontane.errors import RequestError

ConstraintKind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]
MAX_SOURCE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Constraint:
    """`source` is a JSON schema, a regular expression, a Lark grammar, or a JSON list of choices.

    For "json_object" it is empty. Raises RequestError on an unknown kind or a source too long; what
    is wrong within it is found when it is compiled (constraints.py).
    """

    kind: ConstraintKind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            raise RequestError(f"there is no constraint {self.kind!r}; there are "
                               f"{', '.join(get_args(ConstraintKind))}")  # fmt: skip
        if (size := len(self.source.encode("utf-8", errors="replace"))) > MAX_SOURCE_BYTES:
            raise RequestError(
                f"the {self.kind} has {size} bytes; at most {MAX_SOURCE_BYTES} are compiled"
            )
