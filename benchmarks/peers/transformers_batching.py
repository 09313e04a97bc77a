"""transformers' continuous batching: `generate_batch`, over its own paged cache."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from tramontane.checkpoint.intake import open_checkpoint
from tramontane.engine.vocabulary import require_tokenizer

# Room for 50,000 tokens, as llama.cpp has here; nothing is kept of one measurement for the next.
BATCHING = ContinuousBatchingConfig(
    block_size=32, num_blocks=1563, max_batch_tokens=512, allow_block_sharing=False
)


class Runner:
    """A model of FOLDER in `dtype`."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.tokenizer = require_tokenizer(open_checkpoint(folder / "hf"))
        self.model = AutoModelForCausalLM.from_pretrained(
            folder / "hf", dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        return self.tokenizer.encode(text)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        """Answer greedily with exactly so many tokens each; how many there were."""
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=2,
            use_cache=True,
        )  # fmt: skip
        outputs = self.model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=BATCHING,
            persistent_manager=True, warmup=False,
        )  # fmt: skip
        return sum(len(output.generated_tokens) for output in outputs.values())
