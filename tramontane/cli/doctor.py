"""`tramontane doctor`: what this machine has, and what that means for speed."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from cyclopts import Parameter

from tramontane import __version__
from tramontane.cli.instruction_sets import MEANINGS, explain_speed, find_instruction_sets
from tramontane.cli.machine import (
    count_usable_cores,
    format_bytes,
    read_cpu_flags,
    read_cpu_model,
    read_memory,
)
from tramontane.engine.bundled import BUNDLED_MODEL, is_bundled_model_there

_PACKAGES = "torch numpy safetensors tokenizers cyclopts rich transformers".split()
_VARIABLES = (
    "OMP_NUM_THREADS OMP_PROC_BIND MKL_NUM_THREADS ONEDNN_MAX_CPU_ISA CUDA_VISIBLE_DEVICES "
    "TRAMONTANE_KERNELS TRAMONTANE_ISA"
).split()
_Report = dict[str, Any]


def doctor(*, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Print the machine, the versions, and what they mean for speed.

    Parameters
    ----------
    as_json
        Print one JSON object instead of text.
    """
    report = build_report()
    print(json.dumps(report, indent=2) if as_json else format_report(report))


def build_report() -> _Report:
    """Everything that `doctor` knows, as plain values."""
    flags = read_cpu_flags()
    sets = None if flags is None else find_instruction_sets(flags)
    has_torch = _find_version("torch") is not None
    report: _Report = {
        "tramontane": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _find_version(name) for name in _PACKAGES},
        "cpu": {"model": read_cpu_model(), "usable_cores": count_usable_cores()},
        "memory": read_memory(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "instruction_sets": sets,
        "bundled_model": {"folder": str(BUNDLED_MODEL), "is_there": is_bundled_model_there()},
        "torch": _describe_torch() if has_torch else None,
    }
    if has_torch and is_bundled_model_there():
        report["bundled_model"] |= _describe_bundled_model()
    return report | {"advice": _advise(report)}


def format_report(report: _Report) -> str:
    """The report as text for people."""
    cpu, memory = report["cpu"], report["memory"]
    lines = [
        f"tramontane    {report['tramontane']}, Python {report['python']}, {report['system']}",
        "packages      " + ", ".join(f"{k} {v or '-'}" for k, v in report["packages"].items()),
        f"processor     {cpu['model']}, {cpu['usable_cores']} usable cores",
        "memory        " + ", ".join(
            f"{format_bytes(value)} {name.removesuffix('_bytes')}"
            for name, value in memory.items() if value is not None
        ),
        *_format_torch(report["torch"]),
        "environment   " + (
            ", ".join(f"{k}={v}" for k, v in report["environment"].items()) or "nothing set"
        ),
        "instructions  " + ("unknown on this system" if report["instruction_sets"] is None else ""),
    ]  # fmt: skip
    for name, is_there in (report["instruction_sets"] or {}).items():
        lines.append(f"  {'yes' if is_there else 'no ':3} {name:12} {MEANINGS[name]}")
    lines.append(_format_bundled_model(report["bundled_model"]))
    return "\n".join([*lines, *(f"- {sentence}" for sentence in report["advice"])])


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_torch() -> _Report:
    import torch

    from tramontane.kernels import extension
    from tramontane.kernels.dispatch import get_kernels

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "vector_level": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "kernels": get_kernels().__name__.rpartition(".")[2],
        "native": extension.get_instruction_set() if extension.is_available() else None,
    }


def _describe_bundled_model() -> _Report:
    from tramontane.checkpoint.hf import read_hf_config

    config = read_hf_config(BUNDLED_MODEL)
    count = config.count_parameters()
    return {
        "weights_bytes": (BUNDLED_MODEL / "model.safetensors").stat().st_size,
        "parameters": count.total,
        "active_parameters": count.active,
        "context": config.max_seq_len,
    }


def _advise(report: _Report) -> list[str]:
    """What the facts mean, and what to change."""
    sets, torch_facts = report["instruction_sets"], report["torch"]
    cores = report["cpu"]["usable_cores"]
    advice = [] if sets is None else explain_speed(sets)
    if torch_facts is None:
        return [*advice, "torch is missing: pip install torch"]
    if torch_facts["threads"] != cores:
        advice.append(
            f"torch uses {torch_facts['threads']} threads on {cores} cores; set OMP_NUM_THREADS="
            f"{cores} to use each core once"
        )
    if torch_facts["native"] is None:
        advice.append(
            "the native kernels have not been built, so everything runs through torch, several "
            "times slower; install a C++ compiler (Debian: g++), then: pip install --no-deps -e ."
        )
    if torch_facts["gpus"]:
        advice.append('GPUs are used through Python: LLM(device="cuda")')
    if not report["bundled_model"]["is_there"]:
        advice.append("the bundled model is missing: `tramontane run` needs a model folder")
    return advice


def _format_torch(facts: _Report | None) -> list[str]:
    if facts is None:
        return ["torch         missing"]
    return [
        f"torch         {facts['threads']} threads, CPU kernels for {facts['vector_level']}, "
        f"GPUs: {', '.join(facts['gpus']) or 'none'}",
        f"kernels       {facts['kernels']} (TRAMONTANE_KERNELS chooses others); "
        f"native: {facts['native'] or 'not built'}",
    ]


def _format_bundled_model(facts: _Report) -> str:
    if not facts["is_there"]:
        return f"bundled model missing from {facts['folder']}"
    if "parameters" not in facts:
        return f"bundled model in {facts['folder']}"
    return (
        f"bundled model {facts['parameters']:,} parameters, {facts['active_parameters']:,} active, "
        f"{format_bytes(facts['weights_bytes'])}, context {facts['context']} tokens, "
        f"in {facts['folder']}"
    )
