"""Mistral's vocabulary gives SentencePiece's own ids, whichever file it comes from."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from tests.tokenizer import vocabularies
from tests.tokenizer.texts import TEXTS
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf, tokenizer_from_gguf
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.model_proto import PieceType, write_model
from tramontane.tokenizer.sentence_piece import SentencePieceTokenizer
from tramontane.tokenizer.sentence_piece_json import derive_merges
from tramontane.tokenizer.stream import IncrementalDecoder
from tramontane.tokenizer.tokenizer import Tokenizer


def copy_as_json(file: Path) -> JsonTokenizer:
    """The tokenizer.json that we write for a SentencePiece model."""
    with TemporaryDirectory() as folder:
        load_tokenizer(file).save(folder)
        return JsonTokenizer.from_file(Path(folder, "tokenizer.json"))


FORMS: dict[str, Callable[[], Tokenizer]] = {
    "tokenizer.model": lambda: load_tokenizer(vocabularies.V1_FILE),
    "tokenizer.json": lambda: JsonTokenizer.from_json(vocabularies.make_hub_json(), origin="x"),
    "copy": lambda: copy_as_json(vocabularies.V1_FILE),
    "metaspace": lambda: JsonTokenizer.from_json(vocabularies.make_modern_json(), origin="x"),
    "gguf": lambda: tokenizer_from_gguf(vocabularies.make_gguf_metadata(), origin="x"),
}
PARTS = [
    "</s>", "<s>", "<unk>", "[INST]", "[/INST]", "<0x0A>", " ", "  ", "                ", "\n",
    "\r\n", "\t", "\u2028", "\u3000", "a", "The", "the", "42", "1234567", "\u0301", "\u00e9",
    "\u00df", "\u0130", "\u65e5\u672c\u8a9e", "\u4e00", "\ud55c", "\U0001f600", "\u0645\u0631",
    "\U0001f468\u200d\U0001f4bb", "\x00", "\x7f", "\ufeff", "\ufffd", "ing", "_", "''", "...",
]  # fmt: skip
TEXT = st.text() | st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@pytest.fixture(scope="module", params=FORMS)
def mistral(request: pytest.FixtureRequest) -> Tokenizer:
    return FORMS[request.param]()


@settings(max_examples=300)
@given(text=TEXT)
@example(text="")
@example(text=" ")
@example(text="".join(TEXTS))
def test_ids_are_sentence_pieces_and_come_back(mistral: Tokenizer, text: str) -> None:
    """A05."""
    ids = mistral.encode(text)
    assert ids == vocabularies.oracle().encode(text)
    assert not {0, 1, 2} & set(ids)
    assert mistral.decode(ids) == text.replace("\u2581", " ")
    assert mistral.decode([1, *ids, 2]) == mistral.decode(ids)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(1, 31999) | st.integers(3, 258) | st.just(28705)))
def test_any_ids_decode_as_in_sentence_piece(mistral: Tokenizer, ids: list[int]) -> None:
    expected = vocabularies.oracle().decode(ids)
    if "\ufffd" not in expected:
        assert mistral.decode(ids) == expected
    pieces = IncrementalDecoder(mistral, starts_text=True)
    assert "".join([*map(pieces.push, ids), pieces.finish()]) == mistral.decode(ids)


def test_an_answer_keeps_its_space_where_it_goes_on_with_a_text(mistral: Tokenizer) -> None:
    ids = mistral.encode("girl")
    going_on, anew = IncrementalDecoder(mistral), IncrementalDecoder(mistral, starts_text=True)
    assert "".join(map(going_on.push, ids)) == " girl"
    assert "".join(map(anew.push, [1, *ids])) == "girl"
    anew.finish()
    assert "".join(map(anew.push, ids)) == "girl"


def test_control_tokens_have_names_and_ids(mistral: Tokenizer) -> None:
    assert mistral.vocab_size == 32000
    assert (mistral.unk_id, mistral.bos_id, mistral.eos_id) == (0, 1, 2)
    assert (mistral.bos_token, mistral.eos_token) == ("<s>", "</s>")
    assert mistral.control_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert mistral.encode("hi", bos=True, eos=True) == [1, 12014, 2]
    assert mistral.encode_batch(["hi", "", "</s>"]) == [[12014], [], mistral.encode("</s>")]


def test_after_a_control_token_only_the_newer_json_has_no_space() -> None:
    for name, make in FORMS.items():
        tokenizer = make()
        ids = tokenizer.encode_after_control("girl </s>")
        assert tokenizer.decode_bytes(ids) == b" " * (name != "metaspace") + b"girl </s>"
        assert not {0, 1, 2} & set(ids)


def test_a_saved_tokenizer_is_the_same(mistral: Tokenizer, tmp_path: Path) -> None:
    mistral.save(tmp_path)
    assert load_tokenizer(tmp_path).to_json() == mistral.to_json()


def test_every_form_survives_gguf(mistral: Tokenizer) -> None:
    described = describe_for_gguf(mistral)
    again = tokenizer_from_gguf(described, origin="x")
    assert isinstance(again, SentencePieceTokenizer)
    for text in [*TEXTS, *PARTS, "".join(PARTS)]:
        assert again.encode(text) == vocabularies.oracle().encode(text)
    stored = vocabularies.make_gguf_metadata()
    for key in ("tokens", "token_type"):
        assert described["tokenizer.ggml." + key] == stored["tokenizer.ggml." + key]
    if not isinstance(mistral, JsonTokenizer):  # which has ranks for scores
        assert described["tokenizer.ggml.scores"] == stored["tokenizer.ggml.scores"]


@pytest.mark.parametrize("version", vocabularies.FILES)
def test_f8_merges_are_those_of_transformers(version: int) -> None:
    """The list that transformers derives where it has protobuf."""
    pieces = SentencePieceTokenizer.from_file(vocabularies.FILES[version]).list_pieces()
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces}
    assert derive_merges(pieces) == generate_merges(vocab, scores)


@pytest.mark.parametrize("version", vocabularies.FILES)
def test_f8_a_folder_keeps_the_model_and_a_copy_for_transformers(
    tmp_path: Path, version: int
) -> None:
    original = SentencePieceTokenizer.from_file(vocabularies.FILES[version])
    original.save(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {f"tokenizer.model.v{version}", "tokenizer.json", "tokenizer_config.json"}
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.to_json() == original.to_json()
    assert loaded.format_version == version
    copy = JsonTokenizer.from_file(tmp_path / "tokenizer.json")
    assert copy.control_ids == original.control_ids
    for text in [*TEXTS, *PARTS, "".join(PARTS), " a", ""]:
        assert copy.encode(text) == original.encode(text)


def test_f8_what_a_copy_cannot_hold_has_none(tmp_path: Path) -> None:
    """Without the 256 bytes, or where runs of spaces become one, it would give other ids."""
    pieces = SentencePieceTokenizer.from_file(vocabularies.V1_FILE).list_pieces()
    proto = write_model(pieces, bos_id=1, eos_id=2, adds_prefix_space=True)
    merging = proto.replace(b"identity\x18\x01\x20\x00", b"identity\x18\x01\x20\x01")
    assert merging != proto
    SentencePieceTokenizer(merging).save(tmp_path / "spaces")
    pieces = [piece for piece in pieces if piece.type != PieceType.BYTE]
    proto = write_model(pieces, bos_id=1, eos_id=2, adds_prefix_space=True)
    SentencePieceTokenizer(proto).save(tmp_path / "bytes")
    for name in ("bytes", "spaces"):
        assert not (tmp_path / name / "tokenizer.json").exists()
        assert isinstance(load_tokenizer(tmp_path / name), SentencePieceTokenizer)


def test_f1_other_ids_around_a_text_are_kept(tmp_path: Path) -> None:
    """A GGUF names them; the tokenizer.model that it becomes has to."""
    metadata = vocabularies.make_gguf_metadata()
    metadata |= {"tokenizer.ggml.bos_token_id": 31998, "tokenizer.ggml.eos_token_id": 31999}
    tokenizer = tokenizer_from_gguf(metadata, origin="x")
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.model")):
        assert (loaded.bos_id, loaded.eos_id) == (31998, 31999)
        assert loaded.control_ids == tokenizer.control_ids
        assert not {31998, 31999} & set(loaded.encode("".join(loaded.control_ids)))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (31998, 31999)
    assert theirs("hi").input_ids == [31998, 12014]


def test_later_vocabularies_keep_instructions_apart_from_their_names() -> None:
    """A05: in v3 [INST] is a control token, but not when a user writes it."""
    tokenizer = load_tokenizer(vocabularies.V3_FILE)
    assert tokenizer.vocab_size == 32768
    assert tokenizer.control_ids["[INST]"] == 3
    ids = tokenizer.encode("[INST] </s> [control_8]")
    assert not set(tokenizer.control_ids.values()) & set(ids)
    assert tokenizer.decode(ids) == "[INST] </s> [control_8]"
    types = describe_for_gguf(tokenizer)["tokenizer.ggml.token_type"]
    assert types[3] == PieceType.CONTROL
