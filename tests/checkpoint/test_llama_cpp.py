"""llama.cpp reads what we write: the same logits, tokens and vocabulary. Slow: it has to be there.

Run with: pip install llama-cpp-python -c constraints.txt; pytest -m slow tests/checkpoint
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import make_config, make_model, make_tokens
from tests.tokenizer.vocabularies import V1_FILE
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.parameters import ParametersInMemory, StoredParameters
from tramontane.engine.bundled import BUNDLED_MODEL
from tramontane.engine.loading import load_for_running
from tramontane.engine.vocabulary import require_tokenizer
from tramontane.models.transformer import Transformer
from tramontane.quant.modules import QuantizedExperts
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf
from tramontane.tokenizer.sentence_piece import SentencePieceTokenizer
from tramontane.tokenizer.tokenizer import Tokenizer

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


def write_bundled_model(folder: Path, encoding: str) -> tuple[Tokenizer, Path]:
    checkpoint = open_checkpoint(BUNDLED_MODEL)
    tokenizer = require_tokenizer(checkpoint)
    path = folder / "bundled.gguf"
    write_gguf(
        StoredParameters(checkpoint.pairs), checkpoint.config, path,
        encoding=encoding, metadata=describe_for_gguf(tokenizer),
    )  # fmt: skip
    return tokenizer, path


@pytest.mark.parametrize("encoding", BOUNDS)
def test_bundled_model(tmp_path: Path, llama_cpp: Any, encoding: str) -> None:
    """Logits, greedy tokens, and the vocabulary of the file."""
    tokenizer, path = write_bundled_model(tmp_path, encoding)
    theirs, ours = llama_cpp(path), load_model(path, dtype=torch.float32)
    for text in TEXTS:
        assert theirs.tokenize(text) == tokenizer.encode(text)
    ids = tokenizer.encode(TEXTS[0], bos=True)
    expected = normalize(theirs.compute_logits(ids))
    found = compute_log_probs(ours, ids)
    likely = expected > np.log(1e-4)
    assert np.abs(found - expected)[likely].max() < BOUNDS[encoding]
    assert_same_greedy_tokens(theirs, ours, ids, bound=BOUNDS[encoding])


def assert_same_greedy_tokens(theirs: Any, ours: Transformer, ids: list[int], bound: float) -> None:
    """The likeliest token is the same wherever it leads by more than the type's error allows."""
    sequence, num_decided = list(ids), 0
    for _ in range(24):
        log_probs = compute_log_probs(ours, sequence)[-1]
        second, first = np.sort(log_probs)[-2:]
        chosen = int(theirs.compute_logits(sequence)[-1].argmax())
        if first - second > 2 * bound:
            assert chosen == int(log_probs.argmax())
            num_decided += 1
        sequence.append(chosen)
    assert num_decided >= 12


@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_0"])
def test_packed_weights_as_they_run(tmp_path: Path, llama_cpp: Any, encoding: str) -> None:
    """Not unpacked: both sides multiply whole numbers."""
    tokenizer, path = write_bundled_model(tmp_path, encoding)
    packed = load_for_running(open_checkpoint(path))
    assert any(isinstance(module, QuantizedExperts) for module in packed.modules())
    ids = tokenizer.encode(TEXTS[0], bos=True)
    assert_same_greedy_tokens(llama_cpp(path), packed, ids, bound=BOUNDS[encoding])


def test_vocabulary_of_pieces(tmp_path: Path, llama_cpp: Any) -> None:
    """Mistral's own, 32,000 pieces of SentencePiece."""
    tokenizer = SentencePieceTokenizer.from_file(V1_FILE)
    config = make_config(vocab_size=tokenizer.vocab_size, n_layers=1)
    path = tmp_path / "pieces.gguf"
    write_gguf(
        ParametersInMemory(make_model(config).state_dict()), config, path,
        encoding="F32", metadata=describe_for_gguf(tokenizer),
    )  # fmt: skip
    theirs = llama_cpp(path)
    for text in (*TEXTS, "[INST] Hello [/INST]", "\U0001f40c \u4f60\u597d"):
        assert theirs.tokenize(text) == tokenizer.encode(text)


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
