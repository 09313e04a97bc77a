"""Every string comes back; control tokens cannot be forged; transformers agrees."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tramontane.errors import TokenizerError
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.tokenizer import Tokenizer

PIECES = ["</s>", "<s>", "<unk>", " ", "\n", "\r\n", "\t", "\u2028", "a", "42", "\u0301"]
AWKWARD = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@given(text=AWKWARD)
@example(text="\U0001f468\u200d\U0001f4bb \u65e5\u672c \u0645\u0631\u062d\u0628\u0627\x00\x7f")
def test_every_string_comes_back_without_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
    assert not {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@given(text=AWKWARD)
def test_transformers_gives_equal_ids(
    tokenizer: Tokenizer, oracle: PreTrainedTokenizerFast, text: str
) -> None:
    assert oracle(text)["input_ids"] == tokenizer.encode(text, bos=True)
    assert oracle.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_transformers_knows_the_control_tokens(oracle: PreTrainedTokenizerFast) -> None:
    assert (oracle.unk_token_id, oracle.bos_token_id, oracle.eos_token_id) == (0, 1, 2)
    assert len(oracle) == 330


def test_control_tokens_are_added_by_request_and_are_silent(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("girl", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "girl"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_a_batch_is_encoded_like_its_texts(tokenizer: Tokenizer) -> None:
    texts = ["the rain", "", "</s>", "x = 1"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, folder: Path) -> None:
    loaded = load_tokenizer(folder)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode("didn't</s>") == tokenizer.encode("didn't</s>")


@pytest.mark.parametrize("token_id", [-1, 330, 10**9])
def test_an_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match=rf"id {token_id} is outside.*0\.\.329"):
        tokenizer.decode([5, token_id])


def test_a_lone_surrogate_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"character 2 .*ud800"):
        tokenizer.encode("ab\ud800")


def test_added_tokens_decode_to_their_content(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["\u00e9t\u00e9 2024"])
    assert JsonTokenizer(backend).decode([330]) == "\u00e9t\u00e9 2024"


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for content in (b"", b"{", b"{}", b"\xff\xfe", b"[1]"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="model WordLevel"):
        load_tokenizer(tmp_path)


def test_missing_control_tokens_and_foreign_pieces_are_refused(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(TokenizerError, match="lacks the control token '<s>'"):
        JsonTokenizer(backend)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["\u65e5"] = 330
    with pytest.raises(TokenizerError, match="pieces that are not bytes"):
        JsonTokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
