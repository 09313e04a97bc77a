from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.files import make_stories, write_records
from tramontane.data.sources import Source
from tramontane.data.token_files import TokenFile, prepare_token_files
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(make_stories(30, seed=9), vocab_size=300)


@pytest.fixture
def make_files(
    tmp_path: Path, tokenizer: Tokenizer
) -> Callable[[dict[str, list[str]]], dict[str, TokenFile]]:
    """Makes the training file of each domain from its texts."""

    def make(texts_by_domain: dict[str, list[str]]) -> dict[str, TokenFile]:
        sources = []
        for domain, texts in texts_by_domain.items():
            records = [{"text": text, "split": "train"} for text in texts]
            path = tmp_path / f"{domain}.jsonl"
            write_records(path, [*records, {"text": "held out", "split": "valid"}])
            sources.append(Source(domain, str(path)))
        files = prepare_token_files(sources, tokenizer, tmp_path / "tokens")
        return {domain: files[domain, "train"] for domain in texts_by_domain}

    return make
