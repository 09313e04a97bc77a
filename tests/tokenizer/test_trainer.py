"""What a trained vocabulary holds, and how it cuts text."""

import math

import pytest

from tests.tokenizer.texts import TEXTS
from tramontane.errors import ConfigError, TokenizerError
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import measure_bytes_per_token, train_tokenizer


def cut(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]


def test_the_vocabulary_has_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 330
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert {tokenizer.decode_bytes([i]) for i in range(3, 259)} == {bytes([i]) for i in range(256)}


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), vocab_size=330).to_json() == tokenizer.to_json()


def test_words_carry_their_space_and_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert cut(tokenizer, " little girl")[-1] == " girl"
    assert cut(tokenizer, "2024") == ["2", "0", "2", "4"]
    assert cut(tokenizer, "x12") == ["x", "1", "2"]


def test_no_token_crosses_a_boundary() -> None:
    text = "don't l'am stop. stop.\n    go\n    go 77 77"
    tokenizer = train_tokenizer([text] * 50, vocab_size=272)
    assert cut(tokenizer, text) == [
        "don", "'t", " l", "'", "am", " stop", ".", " stop", ".", "\n", "   ", " go", "\n", "   ",
        " go", " ", "7", "7", " ", "7", "7",
    ]  # fmt: skip


def test_a_size_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 258, but must be at least 259"):
        train_tokenizer(TEXTS, vocab_size=258)
    with pytest.raises(TokenizerError, match=r"yield only 2\d\d tokens, but vocab_size is 9000"):
        train_tokenizer(["a little text"], vocab_size=9000)


def test_bytes_per_token_are_those_of_all_texts(tokenizer: Tokenizer) -> None:
    ids = sum(len(tokenizer.encode(text)) for text in TEXTS)
    expected = sum(len(text.encode("utf-8")) for text in TEXTS) / ids
    assert measure_bytes_per_token(tokenizer, TEXTS) == expected > 1
    assert math.isnan(measure_bytes_per_token(tokenizer, []))
