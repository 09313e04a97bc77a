"""A byte-level vocabulary goes through GGUF's metadata and back; what is damaged is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tests.tokenizer import vocabularies
from tests.tokenizer.texts import TEXTS
from tramontane.errors import TokenizerError
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf, tokenizer_from_gguf
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.model_proto import PieceType
from tramontane.tokenizer.tokenizer import Tokenizer

JSON = "tokenizer.huggingface.json"
GGML = "tokenizer.ggml."


def test_ours_comes_back_exactly(tokenizer: Tokenizer) -> None:
    metadata = describe_for_gguf(tokenizer)
    assert metadata[GGML + "model"] == "gpt2"
    assert metadata[GGML + "pre"] == "qwen2"
    assert metadata[GGML + "token_type"][:4] == [3, 3, 3, 1]
    assert len(metadata[GGML + "tokens"]) == 330
    assert tokenizer_from_gguf(metadata, origin="x").to_json() == tokenizer.to_json()


@given(text=st.text() | st.lists(st.sampled_from(["</s>", "<s>", " ", "\n", "1"])).map("".join))
def test_tokens_and_merges_alone_are_enough_to_write_every_text(
    tokenizer: Tokenizer, text: str
) -> None:
    """A05: as llama.cpp sees it, without the tokenizer.json."""
    metadata = describe_for_gguf(tokenizer)
    del metadata[JSON]
    read = tokenizer_from_gguf(metadata, origin="x")
    assert (read.unk_id, read.bos_id, read.eos_id) == (0, 1, 2)
    assert read.decode(read.encode(text)) == text
    assert not {0, 1, 2} & set(read.encode(text))


def test_plain_texts_have_equal_ids_by_the_name_of_the_expression(tokenizer: Tokenizer) -> None:
    metadata = describe_for_gguf(tokenizer)
    del metadata[JSON]
    read = tokenizer_from_gguf(metadata, origin="x")
    assert read.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_gpt2_keeps_its_own_expression_and_names() -> None:
    alphabet = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(alphabet | {"<|endoftext|>": 256, "th": 257}, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    names = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    metadata = describe_for_gguf(JsonTokenizer(backend, names=names))
    assert metadata[GGML + "pre"] == "gpt-2"
    assert GGML + "unknown_token_id" not in metadata
    del metadata[JSON]
    metadata[GGML + "add_bos_token"] = False
    read = tokenizer_from_gguf(metadata, origin="x")
    assert (read.bos_id, read.eos_id, read.unk_id, read.adds_bos) == (256, 256, None, False)
    assert read.encode("th") == [257]
    assert read.decode(read.encode("<|endoftext|>")) == "<|endoftext|>"
    assert 256 not in read.encode("<|endoftext|>")


@pytest.mark.parametrize("form", ["ours", "gpt2", "pieces"])
def test_f9_tokens_that_fill_up_are_no_part_of_the_vocabulary(
    tokenizer: Tokenizer, form: str
) -> None:
    original = tokenizer
    if form == "pieces":
        original = tokenizer_from_gguf(vocabularies.make_gguf_metadata(), origin="x")
    count = original.vocab_size
    metadata = describe_for_gguf(original, num_rows=count + 3)
    if form == "gpt2":
        del metadata[JSON]
    lists = [metadata[GGML + key] for key in ("tokens", "token_type")]
    assert [values[count:] for values in lists] == [
        [f"[PAD{count}]", f"[PAD{count + 1}]", f"[PAD{count + 2}]"],
        [PieceType.UNUSED] * 3,
    ]
    if form == "pieces":
        assert len(metadata[GGML + "scores"]) == count + 3
    for types in (lists[1], np.array(lists[1])):
        read = tokenizer_from_gguf(metadata | {GGML + "token_type": types}, origin="x")
        assert read.vocab_size == count
        assert read.encode_batch(TEXTS) == original.encode_batch(TEXTS)
        assert read.control_ids == original.control_ids
    assert describe_for_gguf(read, num_rows=count + 3)[GGML + "tokens"] == lists[0]
    assert describe_for_gguf(original, num_rows=7) == describe_for_gguf(original)


def test_f9_only_what_fills_up_is_left_out() -> None:
    """An unused token of another name, or one before others, has its id in the vocabulary."""
    metadata = vocabularies.make_gguf_metadata()
    metadata[GGML + "tokens"][31998:] = ["[PAD31998]", "[PAD7]"]
    metadata[GGML + "token_type"][31998:] = [5, 5]
    assert tokenizer_from_gguf(metadata, origin="x").vocab_size == 32000
    metadata[GGML + "tokens"][31999] = "[PAD31999]"
    assert tokenizer_from_gguf(metadata, origin="x").vocab_size == 31998


def test_arrays_and_bytes_are_read_as_lists_and_texts() -> None:
    metadata = vocabularies.make_gguf_metadata()
    for key in ("scores", "token_type"):
        metadata[GGML + key] = np.array(metadata[GGML + key])
    metadata[GGML + "tokens"] = [piece.encode() for piece in metadata[GGML + "tokens"]]
    metadata[GGML + "model"] = b"llama"
    metadata[GGML + "bos_token_id"] = np.uint32(1)
    read = tokenizer_from_gguf(metadata, origin="x")
    assert read.encode("hi") == [12014]
    assert read.bos_id == 1


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "has no tokenizer.ggml.model": lambda m: m.pop(GGML + "model"),
    "model 'bert'; supported": lambda m: m.update({GGML + "model": "bert"}),
    "has no list tokenizer.ggml.tokens": lambda m: m.pop(GGML + "tokens"),
    "has no list tokenizer.ggml.scores": lambda m: m.update({GGML + "scores": 7}),
    "tokens, scores and types disagree": lambda m: m[GGML + "scores"].pop(),
    "types disagree .*9": lambda m: m[GGML + "token_type"].__setitem__(5, 9),
    "holds 5 where its vocabulary needs a text": lambda m: m[GGML + "tokens"].__setitem__(0, 5),
    "not UTF-8": lambda m: m[GGML + "tokens"].__setitem__(0, b"\xff"),
    "bos is 99999, but ids": lambda m: m.update({GGML + "bos_token_id": 99999}),
    "'x', not an id": lambda m: m.update({GGML + "eos_token_id": "x"}),
    "is not a SentencePiece model": lambda m: m[GGML + "tokens"].__setitem__(700, "<s>"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_vocabulary_is_named(message: str) -> None:
    metadata = vocabularies.make_gguf_metadata()
    DAMAGE[message](metadata)
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(metadata, origin="x.gguf")


def test_a_byte_level_vocabulary_that_contradicts_itself_is_refused(tokenizer: Tokenizer) -> None:
    metadata = describe_for_gguf(tokenizer)
    metadata[GGML + "tokens"][300] = "zz"
    with pytest.raises(TokenizerError, match="hold different vocabularies"):
        tokenizer_from_gguf(metadata, origin="x")
    del metadata[JSON]
    with pytest.raises(TokenizerError, match=r"pre 'strange'; supported are default, gpt-2"):
        tokenizer_from_gguf(metadata | {GGML + "pre": "strange"}, origin="x")
    with pytest.raises(TokenizerError, match="bos_token_id is 9999 of 330"):
        tokenizer_from_gguf(metadata | {GGML + "bos_token_id": 9999}, origin="x")
