"""The rules of the house, read from the source: who imports whom, sizes, and what is never used."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tramontane"
FOLDERS = [PACKAGE, ROOT / "benchmarks", ROOT / "recipes"]
CODE = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
MODULES = [path for path in CODE if path.is_relative_to(PACKAGE)]

# Who may import whom, beside itself. Anyone may import `errors`.
ALLOWED = {
    "errors": set(),
    "atomic": set(),
    "bounded_json": set(),
    "config": set(),
    "kernels": set(),
    "tokenizer": set(),
    "nn": {"kernels", "config"},
    "models": {"nn", "config"},
    "checkpoint": {"models", "kernels.dispatch", "config", "quant.formats", "atomic",
                   "bounded_json"},
    "quant": {"nn", "kernels", "config"},
    "adapters": {"nn", "kernels", "config"},
    "offload": {"nn", "kernels", "config"},
    "engine": {"models", "nn", "checkpoint", "quant", "adapters", "offload", "tokenizer", "kernels",
               "config"},
    "data": {"tokenizer", "config", "atomic"},
    "train": {"models", "nn", "kernels", "checkpoint", "adapters", "data", "tokenizer", "config",
              "atomic"},
    "eval": {"engine", "models", "checkpoint", "data", "tokenizer", "config"},
    "hub": {"config", "atomic", "bounded_json"},
    "server": {"engine.request", "engine.completion", "engine.sampling_params", "engine.constraint",
               "tokenizer"},
    "cli": {"*"},
}  # fmt: skip
# Modules and packages that run without torch, and where an import inside a function may stand.
TORCH_FREE = ("errors", "atomic", "bounded_json", "config", "tokenizer", "hub", "server",
              "engine.block_manager", "engine.scheduler",
              "engine.sampling_params", "engine.constraint", "engine.completion", "engine.request",
              "engine.sequence", "engine.text_output", "engine.grammar_source",
              "engine.grammar_process", "engine.grammar_worker")  # fmt: skip
MAY_IMPORT_LATE = ("tramontane/cli/", "tramontane/kernels/dispatch.py",
                   "tramontane/checkpoint/files/gguf_values.py",
                   "tramontane/engine/grammar_worker.py",
                   "tramontane/train/event_log.py")  # fmt: skip
MAX_LINES = 600
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "yaml.load", "yaml.unsafe_load"}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_module(path: Path) -> str:
    """tramontane/nn/moe.py -> nn.moe, nn/__init__.py -> nn, and the root is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, package: str) -> bool:
    return package == "*" or module == package or module.startswith(package + ".")


def list_imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Full names of all modules that a file imports, with or without those for type checkers."""
    for node in walk_imports(parse(path), for_types=for_types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:  # `from tramontane.kernels import fused` imports a module
                is_module = (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def walk_imports(tree: ast.AST, *, for_types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif for_types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield from walk_imports(node, for_types=for_types)


def list_own_imports(path: Path, *, for_types: bool = True) -> set[str]:
    """Our own modules that a file imports: {"nn.moe", "config"}."""
    prefix = "tramontane."
    names = list_imports(path, for_types=for_types)
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_import_table(path: Path) -> None:
    module = name_module(path)
    if not module:  # the root names the public classes for type checkers alone
        assert not list_own_imports(path, for_types=False)
        return
    package = module.split(".")[0]
    assert package in ALLOWED, f"{package} is not in the import table of this test"
    allowed = {package, "errors", *ALLOWED[package]}
    wrong = {
        name for name in list_own_imports(path) if not any(is_within(name, to) for to in allowed)
    }
    assert not wrong, f"{module} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_who_never_imports_torch(path: Path) -> None:
    if any(is_within(name_module(path), package) for package in TORCH_FREE):
        assert not any(is_within(name, "torch") for name in list_imports(path))


def test_nobody_imports_the_command_line() -> None:
    for path in CODE:
        if not is_within(name_module(path) if path in MODULES else "", "cli"):
            assert not any(is_within(name, "cli") for name in list_own_imports(path)), path


def test_no_import_cycles() -> None:
    files = {name_module(path): path for path in MODULES}
    graph = {
        name: list_own_imports(path, for_types=False) & set(files) - {name}
        for name, path in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", CODE, ids=show)
def test_imports_stand_at_the_top(path: Path) -> None:
    if show(path).startswith(MAY_IMPORT_LATE):
        return
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.Lambda)]
    late = [node.lineno for function in functions for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    assert not late, f"imports inside functions, lines {late}"


@pytest.mark.parametrize("path", CODE, ids=show)
def test_nothing_can_run_code_from_a_file(path: Path) -> None:
    roots = {name.split(".")[0] for name in list_imports(path)}
    assert not roots & FORBIDDEN_MODULES
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in FORBIDDEN_ATTRIBUTES, f"line {node.lineno}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}"
            assert node.value.value is False, f"line {node.lineno}"


@pytest.mark.parametrize("path", CODE, ids=show)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parse(path)), "no module docstring"


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in MODULES}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_is_too_long_and_all_are_ascii() -> None:
    others = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("recipes/*.sh"), *ROOT.glob("csrc/*")]
    for path in CODE + others:
        content = path.read_bytes()
        assert content.count(b"\n") <= MAX_LINES, f"{show(path)}: over {MAX_LINES} lines"
        assert content.isascii(), f"{show(path)}: not ASCII"
