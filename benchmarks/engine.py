"""Many requests at once: ours, transformers' continuous batching, llama.cpp's parallel decode.

    python benchmarks/engine.py [--model bundled M] [--concurrent 1 8 32 128] [--repeats 3]

So many requests come at once, with prompts of 16 to 256 tokens; the rate is that of all tokens
that are generated (64 each), the time for the prompts included. Weights are the same, greedy. With
--shared the first 128 tokens of all prompts are the same, and tramontane may keep them. Each
contender is a process of its own and works in turn with the others. --profile prints instead what
part of a decode step stands around the model's own kernels.
"""

import argparse
import time
from pathlib import Path

from contenders import CONTENDERS
from machine import describe_machine, print_table
from peers.tramontane_llm import Runner
from random_models import SIZES, write_model
from workers import Worker, choose_contenders, find_folder

BUNDLED = Path(__file__).parents[1] / "tramontane" / "assets"
DEFAULT = [
    "tramontane bf16", "tramontane int4", "transformers bf16, batching",
    "transformers fp32, batching", "llama.cpp BF16", "llama.cpp Q4_0",
]  # fmt: skip
PROFILE_TOKENS = 200


def run_size(size: str, folder: Path, names: list[str], cases: list[str], repeats: int) -> None:
    workers = [Worker(name, folder / size) for name in names]
    for _ in range(repeats):
        for case in cases:
            for worker in workers:
                worker.measure(case)
    peaks = {worker.name: worker.close() for worker in workers}
    rows = [
        [worker.name, *(f"{worker.median(case):,.0f}" for case in cases),
         f"{peaks[worker.name] / 1e9:.1f}"]
        for worker in workers
    ]  # fmt: skip
    print(f"\n{size}\n")
    print_table(["tokens/s", *cases, "peak, GB"], rows)


def print_profile(size: str, model: Path) -> None:
    """Milliseconds of a decode step, and the share of it outside the kernels."""
    rows = []
    for concurrent in (1, 8, 32):
        runner = Runner(model, "")
        prompts = [[1000 + i, 300, 301] for i in range(concurrent)]
        runner.generate(prompts, 8)
        before = sum(runner.llm.list_kernel_seconds().values())
        started = time.perf_counter()
        runner.generate(prompts, PROFILE_TOKENS)
        total = time.perf_counter() - started
        kernels = sum(runner.llm.list_kernel_seconds().values()) - before
        rows.append([f"{size}, {concurrent} at once", f"{total / PROFILE_TOKENS * 1e3:.3f}",
                     f"{kernels / PROFILE_TOKENS * 1e3:.3f}",
                     f"{1 - kernels / total:.1%}"])  # fmt: skip
    print_table(["decode step", "ms", "of it in kernels", "around them"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=["bundled", *SIZES], default=["bundled", "M"])
    parser.add_argument("--contender", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--concurrent", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    names = choose_contenders(arguments.contender, DEFAULT)
    kind = "shared" if arguments.shared else "mixed"
    cases = [f"{kind} {count}" for count in arguments.concurrent]
    with find_folder(arguments.folder) as folder:
        print(describe_machine("transformers"))
        for size in arguments.model:
            write_model(size, folder, bundled=BUNDLED)
            if arguments.profile:
                print_profile(size, folder / size)
            else:
                run_size(size, folder, names, cases, arguments.repeats)


if __name__ == "__main__":
    main()
