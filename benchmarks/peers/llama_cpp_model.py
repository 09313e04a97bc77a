"""llama.cpp through its C interface (llama-cpp-python), so that sequences decode in one batch."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from tramontane.checkpoint.intake import open_checkpoint
from tramontane.engine.vocabulary import require_tokenizer

MAX_BATCH = 512
MAX_SEQUENCES = 128
NUM_SLOTS = 50_000  # tokens that the cache of all sequences has room for


class Runner:
    """The GGUF of FOLDER in `encoding`."""

    def __init__(self, folder: Path, encoding: str) -> None:
        self.tokenizer = require_tokenizer(open_checkpoint(folder / "hf"))
        num_threads = torch.get_num_threads()
        self.llama = llama_cpp.Llama(
            str(folder / f"{encoding}.gguf"), n_ctx=NUM_SLOTS, n_batch=MAX_BATCH, verbose=False,
            n_threads=num_threads, n_threads_batch=num_threads,
        )  # fmt: skip
        parameters = self.llama.context_params
        parameters.n_seq_max = MAX_SEQUENCES
        parameters.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.llama.model, parameters)
        self.batch = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        return self.tokenizer.encode(text)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        """Answer greedily with exactly so many tokens each; how many there were."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        latest = self._run_prompts(prompts)
        for step in range(num_tokens - 1):
            tokens = [
                (token, len(prompt) + step, sequence, True)
                for sequence, (prompt, token) in enumerate(zip(prompts, latest, strict=True))
            ]
            self._decode(tokens)
            latest = [self._choose(row) for row in range(len(prompts))]
        return num_tokens * len(prompts)

    def _run_prompts(self, prompts: list[list[int]]) -> list[int]:
        """All prompts one after another, in full batches; the first token of each answer."""
        tokens = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        first = []
        for start in range(0, len(tokens), MAX_BATCH):
            part = tokens[start : start + MAX_BATCH]
            self._decode(part)
            first += [self._choose(row) for row, token in enumerate(part) if token[3]]
        return first

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Run (token, position, sequence, whether its scores are wanted)."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, is_wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = is_wanted
        status = llama_cpp.llama_decode(self.context, self.batch)
        assert status == 0, status

    def _choose(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(values, shape=(self.llama.n_vocab(),)).argmax())
