"""What importing costs: base dependencies suffice, and the command line starts without torch."""

import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BASE = ["torch", "numpy", "safetensors", "tokenizers", "mistral-common[sentencepiece]",
        "huggingface_hub", "cyclopts", "rich"]  # fmt: skip
CORE = ["torch", "numpy", "safetensors"]
SERVE = [*BASE, "fastapi", "uvicorn", "pydantic", "prometheus-client"]
# What runs on a machine that has little more than torch.
CORE_PACKAGES = ("config", "errors", "kernels", "nn", "models", "checkpoint", "quant")

# A finder before all others that hides every top-level module named in argv[1].
_IMPORT_WITHOUT = """
import importlib, sys
hidden = set(sys.argv[1].split(","))
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is hidden in this test", name=name)
sys.meta_path.insert(0, Hide())
for name in sys.argv[2].split(","):
    importlib.import_module(name)
"""


def list_modules(*packages: str) -> list[str]:
    paths = sorted((ROOT / "tramontane").rglob("*.py"))
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]
    return [name for name in names if not packages or set(name.split(".")[1:2]) & set(packages)]


def list_distributions(requirements: list[str]) -> set[str]:
    """Names of the distributions that these need, with all that those need."""
    waiting, found, seen = [Requirement(r) for r in requirements], set(), set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found.add(normalize(requirement.name))
        try:
            needed = [Requirement(line) for line in requires(requirement.name) or ()]
        except PackageNotFoundError:
            continue
        extras = [{"extra": extra} for extra in (*requirement.extras, "")]
        waiting += [r for r in needed if not r.marker or any(map(r.marker.evaluate, extras))]
    return found


def normalize(name: str) -> str:
    return name.lower().replace("_", "-")


def list_hidden(requirements: list[str]) -> list[str]:
    """Installed top-level modules outside the closure of these requirements."""
    allowed = list_distributions(requirements) | {"tramontane", "setuptools", "pip"}
    return [
        module
        for module, owners in packages_distributions().items()
        if not any(normalize(owner) in allowed for owner in owners)
    ]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("requirements", "modules"),
    [
        (BASE, [name for name in list_modules() if name.split(".")[1:2] != ["server"]]),
        (CORE, list_modules(*CORE_PACKAGES)),
        (SERVE, list_modules("server")),
    ],
    ids=["base", "core", "serve"],
)
def test_modules_import_with_these_alone(requirements: list[str], modules: list[str]) -> None:
    hidden = list_hidden(requirements)
    assert "transformers" in hidden
    result = run_python("-c", _IMPORT_WITHOUT, ",".join(hidden), ",".join(modules))
    assert result.returncode == 0, result.stderr


def test_tokenizer_and_settings_import_without_torch() -> None:
    modules = [*list_modules("config", "errors", "tokenizer", "server"),
               "tramontane.engine.sampling_params", "tramontane.cli.main"]  # fmt: skip
    result = run_python("-c", _IMPORT_WITHOUT, "torch", ",".join(modules))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", ["--version", "--help", "run --help", "train --help"])
def test_command_line_answers_without_torch_within_a_second(arguments: str) -> None:
    """Of a processor, best of three, as the machine may be busy; no other test looks at a clock."""
    call = "from tramontane.cli.main import main; main()"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run_python("-X", "importtime", "-c", call, *arguments.split())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr[-2000:]
        imported = {line.rsplit("|")[-1].strip() for line in result.stderr.splitlines()}
        assert "cyclopts" in imported
        assert not imported & {"torch", "transformers"}
        if seconds[-1] < 1:
            return
    pytest.fail(f"took {seconds} seconds")
