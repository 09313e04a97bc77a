"""tramontane through its Python interface."""

from pathlib import Path

from tramontane import LLM, SamplingParams
from tramontane.engine.request import Request


class Runner:
    """A model of FOLDER, quantised on load if `quant` is not empty.

    Nothing is kept of one measurement for the next, unless `use_prefix_cache`.
    """

    def __init__(self, folder: Path, quant: str, *, use_prefix_cache: bool = False) -> None:
        self.llm = LLM(folder / "hf", quant=quant or None, use_prefix_cache=use_prefix_cache)

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        return self.llm.tokenizer.encode(text)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        """Answer greedily with exactly so many tokens each; how many there were."""
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        requests = [Request(prompt_ids=prompt, params=params) for prompt in prompts]
        return sum(len(answer.token_ids) for answer in self.llm.run(requests))
