"""The native kernels built anew: with sanitizers, without a compiler. Slow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Puts the extension of the first argument in the place of the installed one, then runs pytest.
RUN_TESTS = """
import importlib.util, sys
name = "tramontane.kernels._native"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
import tramontane.kernels
tramontane.kernels._native = module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done


def require_program(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def find_libraries(compiler: str) -> str:
    """What has to be loaded first, since Python was not built with it: it looks for C++ itself."""
    names = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(name).is_absolute() for name in names):
        pytest.skip("no AddressSanitizer here")
    return " ".join(names)


def test_no_read_beyond_and_nothing_undefined(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan watch all kernel tests: odd sizes, empty experts, one token."""
    cmake, compiler = require_program("cmake"), require_program("g++")
    pytest.importorskip("nanobind", reason="pip install nanobind, which the build has of its own")
    preload = find_libraries(compiler)
    run(cmake, "-S", "csrc", "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release", "-DTRAMONTANE_SANITIZE=ON")  # fmt: skip
    run(cmake, "--build", str(tmp_path), "--parallel", "2")
    (extension,) = tmp_path.glob("_native*.so")
    done = run(
        sys.executable, "-c", RUN_TESTS, str(extension), "-q", "-p", "no:cacheprovider",
        "tests/kernels/test_native.py", "tests/kernels/test_experts_per_token.py",
        "tests/kernels/test_native_decoder.py", "tests/kernels/test_paged.py",
        "tests/kernels/test_sampling.py", "tests/kernels/test_native_gradients.py",
        LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0",
    )  # fmt: skip
    assert " passed" in done.stdout


def test_without_a_compiler_nothing_is_built(tmp_path: Path) -> None:
    cmake = require_program("cmake")
    done = run(
        cmake, "-S", "csrc", "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}",
        "-G", "Unix Makefiles", CXX="no-such-compiler", PATH=str(Path(cmake).parent) + ":/no",
    )  # fmt: skip
    assert "native kernels are left out" in done.stdout + done.stderr
