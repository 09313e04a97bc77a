"""llama.cpp reads what we write: the same logits, tokens and vocabulary. Slow: it has to be there.

Run with: pip install llama-cpp-python -c constraints.txt; pytest -m slow tests/checkpoint
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import make_config, make_model, make_tokens
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.parameters import ParametersInMemory, StoredParameters
from tramontane.engine.bundled import BUNDLED_MODEL
from tramontane.engine.vocabulary import require_tokenizer
from tramontane.models.transformer import Transformer
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf

pytestmark = pytest.mark.slow
# Largest difference of log-probabilities: llama.cpp multiplies F16, BF16 and packed rows with
# activations in their own low precision, F32 alone in fp32.
BOUNDS = {"F32": 2e-3, "F16": 2e-2, "BF16": 6e-2, "Q8_0": 0.1, "Q4_0": 0.3}
TEXTS = (
    "Once upon a time, there was a little girl.",
    "Tom's 12 dogs\n\n  ran; 34.5 cats!",
    "caf\u00e9",
)


@torch.no_grad()
def compute_log_probs(model: Transformer, ids: list[int]) -> np.ndarray:
    tokens = torch.tensor(ids)
    logits = model.compute_logits(model.forward_packed(tokens, [len(ids)]).hidden)
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def normalize(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()


@pytest.fixture
def llama_cpp() -> Any:
    from tests.oracles.llama_cpp import LlamaCpp

    return LlamaCpp


@pytest.mark.parametrize("encoding", BOUNDS)
def test_bundled_model(tmp_path: Path, llama_cpp: Any, encoding: str) -> None:
    """Logits, greedy tokens, and the vocabulary of the file."""
    checkpoint = open_checkpoint(BUNDLED_MODEL)
    tokenizer = require_tokenizer(checkpoint)
    path = tmp_path / "bundled.gguf"
    write_gguf(
        StoredParameters(checkpoint.pairs), checkpoint.config, path,
        encoding=encoding, metadata=describe_for_gguf(tokenizer),
    )  # fmt: skip
    theirs, ours = llama_cpp(path), load_model(path, dtype=torch.float32)
    for text in TEXTS:
        assert theirs.tokenize(text) == tokenizer.encode(text)
    ids = tokenizer.encode(TEXTS[0], bos=True)
    expected = normalize(theirs.compute_logits(ids))
    found = compute_log_probs(ours, ids)
    likely = expected > np.log(1e-4)
    assert np.abs(found - expected)[likely].max() < BOUNDS[encoding]
    if encoding in ("F32", "F16"):
        sequence = list(ids)
        for _ in range(24):
            sequence.append(int(compute_log_probs(ours, sequence)[-1].argmax()))
        assert theirs.generate(ids, 24) == sequence[len(ids) :]


@pytest.mark.parametrize(
    "changes", [{}, {"moe": None}, {"tie_embeddings": True}], ids=["mixtral", "mistral", "tied"]
)
def test_random_models(tmp_path: Path, llama_cpp: Any, changes: dict[str, Any]) -> None:
    """Sizes that llama.cpp can multiply: rows of a multiple of 32."""
    tokenizer = require_tokenizer(open_checkpoint(BUNDLED_MODEL))
    config = make_config(vocab_size=tokenizer.vocab_size, **changes)
    model = make_model(config)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    path = tmp_path / "tiny.gguf"
    write_gguf(
        ParametersInMemory(model.state_dict()), config, path,
        encoding="F32", metadata=describe_for_gguf(tokenizer),
    )  # fmt: skip
    ids = make_tokens(40, vocab_size=config.vocab_size).tolist()
    expected = normalize(llama_cpp(path).compute_logits(ids))
    assert np.abs(compute_log_probs(model, ids) - expected).max() < 0.02
