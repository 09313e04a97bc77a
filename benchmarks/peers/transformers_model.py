"""transformers' `generate`."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tramontane.checkpoint.intake import open_checkpoint
from tramontane.engine.vocabulary import require_tokenizer


class Runner:
    """A model of FOLDER in `dtype`."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.tokenizer = require_tokenizer(open_checkpoint(folder / "hf"))
        self.model = AutoModelForCausalLM.from_pretrained(
            folder / "hf", dtype=getattr(torch, dtype)
        )

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        return self.tokenizer.encode(text)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        """Answer greedily with exactly so many tokens each; how many there were."""
        ids = torch.tensor(prompts)
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens,
            min_new_tokens=num_tokens, do_sample=False, pad_token_id=2,
        )  # fmt: skip
        return num_tokens * len(prompts)
