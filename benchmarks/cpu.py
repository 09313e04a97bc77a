"""The CPU against its limits: tramontane, transformers and llama.cpp on the same random weights.

    python benchmarks/cpu.py [--model bundled S M L] [--folder FOLDER] [--repeats 3] [--profile]

Each contender is a process of its own and works in turn with the others; the limits (read
bandwidth, rates of large products) are measured in the same rounds. S, M and L are random Mixtrals:
their weights cost what trained ones do, and say nothing. They are written to FOLDER once, as a
Hugging Face folder and as GGUF. llama.cpp takes part if llama-cpp-python is installed.
--profile prints instead where the time of our own steps goes, by kernel.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from contenders import CONTENDERS
from machine import describe_machine, measure_matmul_rate, measure_read_rate, print_table
from random_models import SIZES, write_model
from workers import Worker, choose_contenders, find_folder

from tramontane import LLM, SamplingParams
from tramontane.checkpoint.loader import load_config

BUNDLED = Path(__file__).parents[1] / "tramontane" / "assets"
CASES = ("prefill 512", "prefill 2048", "decode 1", "decode 8")


def measure_limits() -> dict[str, float]:
    return {
        "read": measure_read_rate(),
        "bf16": measure_matmul_rate(2048, 2048, 2048),
        "fp32": measure_matmul_rate(2048, 2048, 2048, dtype=torch.float32),
    }


def run_size(
    size: str, folder: Path, names: list[str], *, wanted: Sequence[str], repeats: int
) -> None:
    config = load_config(BUNDLED if size == "bundled" else folder / size / "hf")
    cases = [case for case in wanted if int(case.split()[1]) + 160 <= config.max_seq_len]
    workers = [Worker(name, folder / size) for name in names]
    limits: dict[str, list[float]] = {}
    for _ in range(repeats):
        for key, value in measure_limits().items():
            limits.setdefault(key, []).append(value)
        for case in cases:
            for worker in workers:
                worker.measure(case)
    middle = {key: statistics.median(values) for key, values in limits.items()}
    peaks = {worker.name: worker.close() for worker in workers}
    active = config.count_parameters().active - config.vocab_size * config.dim
    total = config.count_parameters().total
    print(f"\n{size}: {total / 1e6:,.0f}M parameters, {active / 1e6:,.0f}M read for a token\n")
    print_results(workers, cases, middle, peaks, active=active)
    flops = 2 * (active - config.vocab_size * config.dim)
    best = max(middle["bf16"], middle["fp32"])
    print(
        f"\nlimits: reading {middle['read'] / 1e9:.1f} GB/s; torch's product of 2048^3 in bf16 "
        f"{middle['bf16'] / 1e12:.2f} TFLOP/s, in fp32 {middle['fp32'] / 1e12:.2f} TFLOP/s, at "
        f"which a prompt runs at {best / flops:,.0f} tokens/s"
    )


def print_results(
    workers: list[Worker],
    cases: list[str],
    limits: Mapping[str, float],
    peaks: Mapping[str, int],
    *,
    active: int,
) -> None:
    rows = []
    for worker in workers:
        limit = limits["read"] / (active * CONTENDERS[worker.name].bytes_per_weight)
        rows.append([
            worker.name,
            *(f"{worker.median(case):,.0f}" if worker.median(case) >= 100
              else f"{worker.median(case):.1f}" for case in cases),
            f"{worker.median('decode 1') / limit:.0%}",
            f"{worker.loaded['seconds']:.2f}",
            f"{peaks[worker.name] / 1e9:.1f}",
        ])  # fmt: skip
    header = ["tokens/s", *cases, "decode 1, of the limit", "load, s", "peak, GB"]
    print_table(header, rows)


def print_profile(size: str, model: Path) -> None:
    """Where the time of decoding and of a prompt goes, in ms per step, and what stands around."""
    rows = []
    for quant in (None, "int8", "int4"):
        llm = LLM(model, quant=quant, use_prefix_cache=False)
        for case, prompt, num_tokens in (
            ("prompt of 500", "Once upon a time " * 100, 1), ("decode", "Once", 64)
        ):  # fmt: skip
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
            llm.generate(prompt, params)
            before = llm.list_kernel_seconds()
            started = time.perf_counter()
            answer = llm.generate(prompt, params)
            total = time.perf_counter() - started
            steps = len(answer.token_ids)
            parts = {k: v - before[k] for k, v in llm.list_kernel_seconds().items()}
            parts["sampling, Python"] = total - sum(parts.values())
            rows.append([f"{size} {quant or 'bf16'}", case, f"{total / steps * 1e3:.2f}",
                         *(f"{seconds / total:.0%}" for seconds in parts.values())])  # fmt: skip
    print_table(["model", "step", "ms", *parts], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=["bundled", *SIZES], default=["bundled", "M"])
    parser.add_argument("--contender", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    alone = [name for name in CONTENDERS if "batching" not in name]  # those have engine.py
    names = choose_contenders(arguments.contender, alone)
    with find_folder(arguments.folder) as folder:
        print(describe_machine("transformers"))
        for size in arguments.model:
            write_model(size, folder, bundled=BUNDLED)
            if arguments.profile:
                print_profile(size, folder / size / "hf")
            else:
                run_size(size, folder, names, wanted=arguments.case, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
