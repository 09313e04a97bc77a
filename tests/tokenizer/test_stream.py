"""Streamed text is the whole text, and never a part of a character."""

from hypothesis import given
from hypothesis import strategies as st

from tramontane.tokenizer.stream import IncrementalDecoder
from tramontane.tokenizer.tokenizer import Tokenizer

EMOJI = "\U0001f600\U0001f468\u200d\U0001f4bb\u65e5\u672c\u8a9e\u00e9\u0301"


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


@given(ids=st.lists(st.integers(0, 329)))
def test_pieces_of_any_ids_are_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(st.sampled_from(EMOJI + "ab ")) | st.text())
def test_no_character_is_split(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_bytes_of_a_character_wait_for_the_last_one(tokenizer: Tokenizer) -> None:
    byte_ids = {tokenizer.decode_bytes([i]): i for i in range(3, 259)}
    decoder = IncrementalDecoder(tokenizer)
    ids = [byte_ids[bytes([byte])] for byte in "\U0001f600".encode()]
    assert [decoder.push(token_id) for token_id in ids] == ["", "", "", "\U0001f600"]
    assert decoder.push(tokenizer.bos_id) == ""
    decoder.push(ids[0])
    assert decoder.finish() == "\ufffd"
    assert decoder.push(byte_ids[b"a"]) == "a"
