"""Generation speed: tramontane and transformers in turn, same model folder, same greedy answers.

    python benchmarks/generate.py [--model FOLDER] [--prompt-tokens 512] [--tokens 128]

Prefill is the time to the first token of a long prompt; decode is the rate of the tokens after it,
at batch 1 and 8. The limit of decoding is the read bandwidth, measured in the same run, over the
bytes of the weights that one token touches.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import describe_machine, measure_read_rate, print_table
from transformers import AutoModelForCausalLM

from tramontane import LLM, SamplingParams

BUNDLED = Path(__file__).parents[1] / "tramontane" / "assets"
OPENING = "Once upon a time there was a little girl who lived near the sea. "
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Contender:
    """`generate(prompts, tokens)` answers greedily and returns how many tokens it made."""

    name: str
    dtype: torch.dtype
    generate: Callable[[list[str], int], int]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, prompt: str, *, prompt_tokens: int, tokens: int) -> None:
        """Add one figure of each kind."""
        first = self._time([prompt], 1)[0]
        self.figures.setdefault("prefill", []).append(prompt_tokens / first)
        for batch in (1, 8):
            prompts = [OPENING] * batch
            before, made_before = self._time(prompts, 1)
            seconds, made = self._time(prompts, tokens)
            rate = (made - made_before) / (seconds - before)
            self.figures.setdefault(f"decode {batch}", []).append(rate)

    def _time(self, prompts: list[str], tokens: int) -> tuple[float, int]:
        started = time.perf_counter()
        made = self.generate(prompts, tokens)
        return time.perf_counter() - started, made

    def median(self, kind: str) -> float:
        """Tokens per second."""
        return statistics.median(self.figures[kind])


def build_ours(folder: Path, name: str) -> Contender:
    llm = LLM(folder, dtype=DTYPES[name])

    def generate(prompts: list[str], tokens: int) -> int:
        answers = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens))
        return sum(len(answer.token_ids) for answer in answers)

    return Contender(f"tramontane, {name}", DTYPES[name], generate)


def build_theirs(folder: Path, name: str, tokenize: Callable[[str], list[int]]) -> Contender:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[name])

    @torch.inference_mode()
    def generate(prompts: list[str], tokens: int) -> int:
        ids = torch.tensor([tokenize(prompt) for prompt in prompts])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=2
        )
        return (out.shape[1] - ids.shape[1]) * len(prompts)

    return Contender(f"transformers, {name}", DTYPES[name], generate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    llm = LLM(arguments.model)
    encode = llm.tokenizer.encode
    ids = encode(OPENING * arguments.prompt_tokens)[: arguments.prompt_tokens - 1]
    prompt = llm.tokenizer.decode(ids)
    contenders = []
    for name in DTYPES:
        contenders.append(build_ours(arguments.model, name))
        theirs = build_theirs(arguments.model, name, lambda text: encode(text, bos=True))
        contenders.append(theirs)
    bandwidth = []
    for repeat in range(arguments.repeats + 1):
        bandwidth.append(measure_read_rate())
        for contender in contenders:
            contender.measure(
                prompt, prompt_tokens=arguments.prompt_tokens, tokens=arguments.tokens
            )
            if repeat == 0:  # warm-up
                contender.figures.clear()
    active = llm.config.count_parameters().active - llm.config.vocab_size * llm.config.dim
    limits = {d: statistics.median(bandwidth) / (active * d.itemsize) for d in DTYPES.values()}
    print(describe_machine("transformers"))
    print_table(
        ["generation", "prefill tokens/s", "decode 1", "of the limit", "decode 8"],
        [
            [
                c.name,
                f"{c.median('prefill'):,.0f}",
                f"{c.median('decode 1'):,.0f}",
                f"{c.median('decode 1') / limits[c.dtype]:.0%}",
                f"{c.median('decode 8'):,.0f}",
            ]
            for c in contenders
        ],
    )
    print(
        f"limit of decode 1: {statistics.median(bandwidth) / 1e9:.1f} GB/s / {active / 1e6:.1f}M "
        "active weights; a model that fits into the cache can be above it"
    )


if __name__ == "__main__":
    main()
