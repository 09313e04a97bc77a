from pathlib import Path

import pytest

from tests.tokenizer.texts import TEXTS
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=330)


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path
