"""tramontane through its Python interface."""

from pathlib import Path

from tramontane import LLM, SamplingParams


class Runner:
    """A model of FOLDER, quantised on load if `quant` is not empty."""

    def __init__(self, folder: Path, quant: str) -> None:
        self.llm = LLM(folder / "hf", quant=quant or None)

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        return self.llm.tokenizer.encode(text)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        """Answer greedily with up to so many tokens each; how many there were."""
        texts = [self.llm.tokenizer.decode(prompt) for prompt in prompts]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        return sum(len(answer.token_ids) for answer in self.llm.generate(texts, params))
