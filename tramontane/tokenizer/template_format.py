"""The chat template that came with a model, written to ids so that no message can forge a token.

The text alone does not tell the template's own "</s>" from one that a user wrote. So the template
is changed before it runs: each name of a control token in it becomes a mark of two characters
that no text may hold (Unicode's noncharacters U+10FFFE and U+10FFFF), around the token's number.
Messages stay as they are; whatever the template does with them (trims, splits, replaces), no mark
can arise. What stands between marks is encoded as plain text, in one piece, content and template
together, as transformers does. If the template takes a mark apart, it is an error, never a token.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from tramontane.errors import RequestError, TokenizerError
from tramontane.tokenizer.chat import Message, check_messages
from tramontane.tokenizer.template_sandbox import compile_template, render_template
from tramontane.tokenizer.tokenizer import Tokenizer

_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_FINAL = f"{_OPEN}.{_CLOSE}"  # where the message to be continued ends
# Methods and filters that look for their arguments in a message, where names are text.
_SEARCHES = frozenset(
    """count endswith find index lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split startswith strip trim""".split()
)


class TemplateFormat:
    """A Jinja chat template; `tokenizer` says which names in it are control tokens."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, origin: str) -> None:
        """Raises TokenizerError, naming `origin`, if the template is unusable."""
        self._origin = origin
        self._names = sorted(tokenizer.control_ids, key=len, reverse=True)
        self._marks = {name: f"{_OPEN}{i}{_CLOSE}" for i, name in enumerate(self._names)}
        if _OPEN in source or _CLOSE in source:
            raise TokenizerError(f"the chat template of {origin} holds a Unicode noncharacter")
        self._template = compile_template(source, origin=origin, transform=_Marker(self._marks))
        self._variables: dict[str, Any] = {
            "bos_token": self._marks[tokenizer.bos_token],
            "eos_token": self._marks[tokenizer.eos_token],
            "tools": None,
            "documents": None,
        }
        if tokenizer.unk_id is not None:
            name = next(n for n, i in tokenizer.control_ids.items() if i == tokenizer.unk_id)
            self._variables["unk_token"] = self._marks[name]

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, continue_final: bool = False
    ) -> list[int]:
        """Token ids, with the control tokens that the template itself writes.

        Raises RequestError if the template refuses the messages, TokenizerError if it fails.
        """
        checked = check_messages(messages, continue_final=continue_final)
        written = self._write(checked, continue_final=continue_final)
        self._require_no_assembled_name(written, checked)
        ids: list[int] = []
        for i, part in enumerate(_MARK.split(written)):  # text, number, text, number, text
            if i % 2:
                ids.append(tokenizer.control_ids[self._names[int(part)]])
            elif part:
                ids += tokenizer.encode_after_control(part) if i else tokenizer.encode(part)
        return ids

    def render(self, messages: Sequence[Message], *, continue_final: bool = False) -> str:
        """What the template writes, control tokens by their names. Raises as `encode` does."""
        checked = check_messages(messages, continue_final=continue_final)
        written = self._write(checked, continue_final=continue_final)
        return _MARK.sub(lambda mark: self._names[int(mark[1])], written)

    def _write(self, messages: list[dict[str, Any]], *, continue_final: bool) -> str:
        for text in _list_texts(messages):
            if _OPEN in text or _CLOSE in text:
                raise RequestError(
                    "a message holds U+10FFFE or U+10FFFF, which are no characters: remove them"
                )
        if continue_final:
            messages[-1]["content"] += _FINAL + " "
        variables = self._variables | {
            "messages": _copy_plain(messages),
            "add_generation_prompt": messages[-1]["role"] != "assistant",
        }
        written = render_template(self._template, variables, origin=self._origin)
        if continue_final:
            written = _cut_after_final(written)
        rest = _MARK.sub("", written)
        if _OPEN in rest or _CLOSE in rest:
            raise TokenizerError(
                f"the chat template of {self._origin} takes its control tokens apart"
            )
        return written

    def _require_no_assembled_name(self, written: str, messages: list[dict[str, Any]]) -> None:
        """A name in plain text that no message holds was put together, perhaps from a message."""
        plain = _MARK.sub(_CLOSE, written)
        said = _CLOSE.join(_list_texts(messages))
        for name in self._names:
            if name in plain and name not in said:
                raise TokenizerError(
                    f"the chat template of {self._origin} puts the control token {name} together "
                    f"from parts, which cannot be told from a message: write it in one piece"
                )


class _Marker(NodeTransformer):
    """Replaces names of control tokens in what a template writes, not in what it looks for."""

    def __init__(self, marks: Mapping[str, str]) -> None:
        self._marks = marks
        names = sorted(map(re.escape, marks), key=len, reverse=True)
        self._pattern = re.compile("|".join(names)) if names else re.compile("(?!)")

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._mark(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self._mark(node.value)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES:
            node.node = self.visit(node.node)
            return node
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name in _SEARCHES:
            node.node = self.visit(node.node) if node.node else None
            return node
        return self.generic_visit(node)

    def _mark(self, text: str) -> str:
        return self._pattern.sub(lambda name: self._marks[name[0]], text)


def _cut_after_final(written: str) -> str:
    """Ends where the last message does; a template that trims it has trimmed its blanks too."""
    at = written.rfind(_FINAL)
    if at < 0:
        raise RequestError(
            "the model's chat template leaves out the end of the last message, so that it cannot "
            "be continued"
        )
    is_kept = written.startswith(" ", at + len(_FINAL))
    return written[:at] if is_kept else written[:at].rstrip()


def _list_texts(value: Any) -> Iterator[str]:
    """All texts in `value`, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _list_texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _list_texts(item)


def _copy_plain(value: Any) -> Any:
    """`value` as JSON's own kinds, so that a template meets no other object.

    Raises RequestError for anything else.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _copy_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_plain(item) for item in value]
    raise RequestError(f"a message holds a {type(value).__name__}; use texts, numbers and lists")
