"""Who takes part in `cpu.py`, and the process in which each of them runs.

Lines in are cases ("prefill 512", "decode 8"), lines out are tokens per second. A prefill is the
time to the first token of a prompt of that length; a decode is the rate of 64 tokens for so many
sequences at once, after prompts of about 100 tokens. "mixed 32" is the rate of 64 tokens for 32
requests that come at once, with prompts of 16 to 256 tokens, those included in the time; in
"shared 32" the first 128 tokens of all prompts are the same.
"""

import json
import random
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from machine import read_peak_memory

OPENING = "Once upon a time there was a little girl who lived near the sea. "
NUM_TOKENS = 64


class Contender(NamedTuple):
    """A module of `peers`, what its Runner is told, and how many bytes a weight takes there."""

    module: str
    option: str
    bytes_per_weight: float


CONTENDERS = {
    "tramontane bf16": Contender("tramontane_llm", "", 2),
    "tramontane int8": Contender("tramontane_llm", "int8", 34 / 32),
    "tramontane int4": Contender("tramontane_llm", "int4", 18 / 32),
    "transformers bf16": Contender("transformers_model", "bfloat16", 2),
    "transformers bf16, batching": Contender("transformers_batching", "bfloat16", 2),
    "transformers fp32, batching": Contender("transformers_batching", "float32", 4),
    "transformers fp32": Contender("transformers_model", "float32", 4),
    "llama.cpp BF16": Contender("llama_cpp_model", "BF16", 2),
    "llama.cpp Q8_0": Contender("llama_cpp_model", "Q8_0", 34 / 32),
    "llama.cpp Q4_0": Contender("llama_cpp_model", "Q4_0", 18 / 32),
}


def measure(runner: Any, case: str) -> float:
    """Tokens per second."""
    kind, number = case.split()
    if kind == "prefill":
        prompt = runner.encode(OPENING * int(number))[: int(number)]
        return len(prompt) / _time(runner, [prompt], 1)[0]
    if kind in ("mixed", "shared"):
        prompts = _list_prompts(runner, int(number), is_shared=kind == "shared")
        seconds, made = _time(runner, prompts, NUM_TOKENS)
        return made / seconds
    prompts = [runner.encode(OPENING * 6)] * int(number)
    before, first = _time(runner, prompts, 1)
    seconds, made = _time(runner, prompts, 1 + NUM_TOKENS)
    return (made - first) / (seconds - before)


def _list_prompts(runner: Any, count: int, *, is_shared: bool) -> list[list[int]]:
    """Prompts of 16 to 256 tokens, each another part of one text."""
    text = runner.encode(OPENING * 400)
    rng = random.Random(0)
    prompts = []
    for i in range(count):
        length = rng.randint(16, 256)
        own = [1000 + i, *text[i : i + length - 1]]
        prompts.append((text[:128] if is_shared else []) + own)
    return prompts


def _time(runner: Any, prompts: list[list[int]], num_tokens: int) -> tuple[float, int]:
    started = time.perf_counter()
    made = runner.generate(prompts, num_tokens)
    return time.perf_counter() - started, made


def main() -> None:
    name, folder = sys.argv[1:]
    contender = CONTENDERS[name]
    runners = import_module(f"peers.{contender.module}")
    started = time.perf_counter()
    runner = runners.Runner(Path(folder), contender.option)
    print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
    measure(runner, "prefill 64")
    measure(runner, "decode 1")
    for line in sys.stdin:
        print(json.dumps({"rate": measure(runner, line.strip())}), flush=True)
    print(json.dumps({"peak": read_peak_memory()}), flush=True)


if __name__ == "__main__":
    main()
