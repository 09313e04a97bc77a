"""Jinja as transformers sets it up for chat templates, for templates that nobody has read.

Three walls. Jinja's immutable sandbox: no underscore attribute, no changing of values. A list of
what is allowed instead of what is not: filters, methods and functions that templates use, no file,
no import. And a budget: the template's tree is rewritten so that every loop, call, operation and
new value passes `Budget`, in the thread that renders, with no signal and no second process.
"""

import json
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tramontane.errors import RequestError, TokenizerError
from tramontane.tokenizer.template_budget import (
    MAX_CHARS,
    Budget,
    BudgetError,
    require_small_join,
    require_small_replacement,
    require_small_result,
)

MAX_SOURCE_CHARS = 2**16  # which take about a second to compile at worst
# Names with a space: no template can say them.
_BUDGET, _LOOP, _CONCAT, _VALUE = " budget", " loop", " concat", " value"

_FILTERS = """abs capitalize count d default dictsort e escape first float int items join last
    length list lower map max min reject rejectattr replace reverse safe select selectattr sort
    string title trim unique upper""".split()
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        """capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace
        isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
        rpartition rsplit rstrip split splitlines startswith strip swapcase title upper""".split()
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    bytes: frozenset(),
    int: frozenset(),
    float: frozenset(),
}
# What else running a stranger's template may raise: its own mistakes.
_MISTAKES = (
    TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


class _RejectedError(TemplateError):
    """The template itself refuses the conversation, through `raise_exception`."""


def compile_template(
    source: str, *, origin: str, transform: NodeTransformer | None = None
) -> Template:
    """A template ready for `render_template`; `transform` may change its tree first.

    Raises TokenizerError, naming `origin`, if it is malformed, too long, or reads other files.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise TokenizerError(
            f"the chat template of {origin} has {len(source)} characters; at most "
            f"{MAX_SOURCE_CHARS} are read"
        )
    sandbox = _Sandbox()
    try:
        tree = sandbox.parse(source)
        if transform is not None:
            tree = transform.visit(tree)
        return sandbox.from_string(_Guard().visit(tree))
    except _MISTAKES as error:
        raise TokenizerError(f"the chat template of {origin} is unusable: {error}") from error


def render_template(template: Template, variables: Mapping[str, Any], *, origin: str) -> str:
    """The text that `template` writes. Raises RequestError with the template's own words if it
    refuses the conversation, TokenizerError if it fails, runs too long or asks for too much.
    """
    try:
        return template.render({**variables, _BUDGET: Budget()})
    except _RejectedError as error:
        raise RequestError(f"the model's chat template refuses: {error}") from error
    except _MISTAKES as error:
        raise TokenizerError(
            f"the chat template of {origin} was stopped: {error or type(error).__name__}"
        ) from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """An environment in which whatever a template does passes its budget."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols],
            finalize=_write, optimized=False,  # nothing is computed before there is a budget
        )  # fmt: skip
        self.filters = {name: _guard_filter(self.filters[name], name) for name in _FILTERS}
        self.filters |= {"tojson": _guard_filter(_to_json, "tojson"), _LOOP: _walk,
                         _CONCAT: _concat, _VALUE: _bound}  # fmt: skip
        self.globals = {
            "range": self.globals["range"],
            "dict": _make_dict,
            "namespace": _SmallNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call, of whatever is called."""
        budget = _budget_of(context)
        budget.tick()
        _require_small_call(function, args)
        return budget.bound(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation."""
        budget = _budget_of(context)
        budget.tick()
        require_small_result(operator, left, right)
        return budget.bound(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use `obj.attr`: methods must be on the list."""
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: str.format is not on the list of methods, stored or not."""

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What a macro or the whole template wrote."""
        collected: list[str] = []
        size = 0
        for part in parts:
            collected.append(part)
            size += len(part)
            if size > MAX_CHARS:
                raise BudgetError(f"it writes more than {MAX_CHARS} characters")
        return "".join(collected)


class _Guard(NodeTransformer):
    """Puts the budget into a template's tree, and refuses what reads other files."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("recursive loops are not allowed")
        self.generic_visit(node)
        node.iter = _apply(_LOOP, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _apply(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _apply(_VALUE, self.generic_visit(node))

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _apply(_VALUE, node) if node.ctx == "load" else node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError(f"{type(node).__name__.lower()} is not allowed: it reads other files")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks what the assistant says; here it only stands."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _SmallNamespace(Namespace):
    """`namespace()`, whose values are small and whose names are plain."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        Namespace.__init__(self, {})
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        if isinstance(value, Namespace):
            raise BudgetError("it puts a namespace into another")
        Namespace.__setitem__(self, name, value)


def _apply(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _budget_of(context: Context) -> Budget:
    return context.parent[_BUDGET]


def _guard_filter(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` with its value and its result bounded; what it was passed by jinja2 stays."""
    wanted = getattr(function, "jinja_pass_arg", None)
    kind = getattr(wanted, "name", None)

    @pass_context  # also keeps the compiler from computing it
    def guarded(context: Context, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        budget = _budget_of(context)
        budget.tick()
        value = budget.bound(value)
        if name == "replace":
            require_small_replacement(str(value), *[str(arg) for arg in args[:2]])
        elif name == "join":
            require_small_join(str(args[0] if args else kwargs.get("d", "")), value)
        extra = {"context": context, "eval_context": context.eval_ctx,
                 "environment": context.environment}  # fmt: skip
        passed = () if kind is None else (extra[kind],)
        return budget.bound(function(*passed, value, *args, **kwargs))

    return guarded


@pass_context
def _walk(context: Context, values: Any) -> Any:
    return _budget_of(context).walk(values)


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    budget = _budget_of(context)
    budget.tick()
    budget.bound(values)
    return budget.bound("".join([str(value) for value in values]))


@pass_context
def _bound(context: Context, value: Any) -> Any:
    budget = _budget_of(context)
    budget.tick()
    return budget.bound(value)


@pass_context
def _write(context: Context, value: Any) -> Any:
    budget = _budget_of(context)
    budget.tick()
    return budget.write(str(value))


def _require_small_call(function: Any, args: tuple[Any, ...]) -> None:
    """The methods of a text whose result can be far larger than what they are given."""
    text = getattr(function, "__self__", None)
    if not isinstance(function, types.BuiltinMethodType | types.MethodType):
        return
    if isinstance(text, str) and function.__name__ == "replace" and len(args) >= 2:
        require_small_replacement(text, str(args[0]), str(args[1]))
    elif isinstance(text, str) and function.__name__ == "join" and args:
        require_small_join(text, args[0])


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """As transformers: no escapes for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise BudgetError(f"it indents JSON by {indent!r}; 0 to 16 are allowed")
    if separators is not None:
        separators = (str(separators[0])[:16], str(separators[1])[:16])
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _Sandbox.concat(encoder.iterencode(value))


def _raise_exception(message: Any) -> None:
    raise _RejectedError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(str(pattern)[:200])
