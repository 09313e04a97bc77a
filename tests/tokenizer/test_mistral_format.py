"""Mistral's formats give mistral-common's ids, whichever file the vocabulary came from."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from tests.tokenizer import vocabularies
from tests.tokenizer.texts import TEXTS
from tramontane.errors import RequestError, TokenizerError
from tramontane.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.mistral_format import MistralFormat
from tramontane.tokenizer.tokenizer import Tokenizer

FILES = vocabularies.FILES
ORACLES = {version: MistralTokenizer.from_file(str(file)) for version, file in FILES.items()}
TOKENIZERS = {version: load_tokenizer(file) for version, file in FILES.items()}
KINDS: dict[str, Any] = {"system": SystemMessage, "user": UserMessage}

# The ids that Mistral publishes for its own sample conversation (spec 0.3), v1.
GOLDEN = [1, 733, 16289, 28793, 1824, 28742, 28713, 272, 1204, 302, 28705, 28782, 648, 28705,
          28782, 28804, 733, 28748, 16289, 28793, 415, 1204, 302, 28705, 28782, 648, 28705, 28782,
          349, 28705, 28740, 28734, 28723, 2, 733, 16289, 28793]  # fmt: skip


def say(*parts: str) -> list[dict[str, str]]:
    """Messages from texts that begin with the first letter of their role: "u:hi", "a:hello"."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[part[0]], "content": part[2:]} for part in parts]


SAMPLE = say("u:What's the result of 5 + 5?", "a:The result of 5 + 5 is 10.", "u:And 6?")


def ask_oracle(version: int, messages: list[dict[str, str]], *, continue_final: bool) -> list[int]:
    last = len(messages) - 1
    request = ChatCompletionRequest(
        messages=[
            AssistantMessage(content=m["content"], prefix=continue_final and i == last)
            if m["role"] == "assistant"
            else KINDS[m["role"]](content=m["content"])
            for i, m in enumerate(messages)
        ]
    )
    return ORACLES[version].encode_chat_completion(request).tokens


def encode(
    version: int, messages: list[dict[str, str]], *, continue_final: bool = False
) -> list[int]:
    return MistralFormat(version).encode(
        messages, TOKENIZERS[version], continue_final=continue_final
    )


MESSAGE = st.tuples(
    st.sampled_from("suuaa"),
    st.text(max_size=9) | st.sampled_from(["</s>", "[INST]", " <s> ", "x ", " x", "\n", "\u00e9"]),
).map(lambda pair: f"{pair[0]}:{pair[1]}")


@pytest.mark.parametrize("version", FILES)
@settings(max_examples=200)
@given(parts=st.lists(MESSAGE, max_size=6), continue_final=st.booleans())
@example(parts=["s:be kind", "u:hi"], continue_final=False)
@example(parts=["s:be kind", "s:and short", "u:hi", "a:hello", "u:bye"], continue_final=False)
@example(parts=["u:hi", "s:be kind", "u:bye", "a: well "], continue_final=True)
@example(parts=["a:hello"], continue_final=True)
@example(parts=["u:hi", "a:", "u:bye"], continue_final=False)
@example(parts=["u:hi", "a:x", "s:late", "u:bye"], continue_final=False)
@example(parts=["u:1", "u:2", "a:3", "a:4", "u:"], continue_final=False)
def test_ids_are_those_of_mistral_common(
    version: int, parts: list[str], continue_final: bool
) -> None:
    """S-07, A05: or both refuse."""
    messages = say(*parts)
    continue_final = continue_final and bool(messages) and messages[-1]["role"] == "assistant"
    if messages and messages[-1]["role"] == "assistant" and not continue_final:
        return  # a complete conversation, which mistral-common writes for training alone
    try:
        expected = ask_oracle(version, messages, continue_final=continue_final)
    except MistralCommonException:
        with pytest.raises(RequestError):
            encode(version, messages, continue_final=continue_final)
        return
    ids = encode(version, messages, continue_final=continue_final)
    assert ids == expected
    assert ids.count(1) == 1
    assert ids.count(2) == sum(
        before["role"] == "assistant" != after["role"]
        for before, after in pairwise(messages)
        if after["role"] != "system"
    )


@pytest.mark.parametrize("form", ["model", "json", "gguf"])
def test_the_published_ids(form: str) -> None:
    """S-07."""
    tokenizer: Tokenizer = {
        "model": lambda: TOKENIZERS[1],
        "json": lambda: JsonTokenizer.from_json(vocabularies.make_hub_json(), origin="x"),
        "gguf": lambda: tokenizer_from_gguf(vocabularies.make_gguf_metadata(), origin="x"),
    }[form]()
    ids = MistralFormat().encode(SAMPLE, tokenizer)
    assert ids[: len(GOLDEN)] == GOLDEN
    assert ids == ask_oracle(1, SAMPLE, continue_final=False)


def test_f8_transformers_reads_our_folder_with_the_published_ids(tmp_path: Path) -> None:
    """AutoTokenizer, without protobuf: mistral-common's ids of texts, and those of a chat."""
    TOKENIZERS[1].save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    oracle: Any = ORACLES[1].instruct_tokenizer.tokenizer
    for text in [*TEXTS, *(message["content"] for message in SAMPLE), " x", "x  y ", "\n"]:
        ids = theirs(text).input_ids
        assert ids == oracle.encode(text, bos=True, eos=False)
        assert ids == TOKENIZERS[1].encode(text, bos=True)
        assert theirs.decode(ids[1:]) == text
    question = f"[INST] {SAMPLE[0]['content']} [/INST]"
    assert theirs(question).input_ids == GOLDEN[:20]
    assert MistralFormat(1).encode(SAMPLE, load_tokenizer(tmp_path))[: len(GOLDEN)] == GOLDEN


def test_a_complete_conversation_ends_with_eos() -> None:
    ids = encode(1, SAMPLE[:2])
    assert ids == GOLDEN[: GOLDEN.index(2) + 1]
    assert encode(1, SAMPLE[:2], continue_final=True) == ids[:-1]


def test_the_text_for_people() -> None:
    messages = say("s:Be kind.", "u:Hi", "a:Hello", "u:Bye")
    assert MistralFormat(1).render(messages) == (
        "<s> [INST] Be kind.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]"
    )
    assert MistralFormat(3).render(messages) == (
        "<s>[INST] Hi[/INST] Hello</s>[INST] Be kind.\n\nBye[/INST]"
    )
    assert (
        MistralFormat(1).render(say("u:a", "a:b"), continue_final=True) == "<s> [INST] a [/INST] b"
    )


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(RequestError, match="there are no messages"):
        encode(1, [])
    with pytest.raises(RequestError, match=r"message 1, the assistant's, is empty"):
        encode(1, say("u:a", "a:"))
    with pytest.raises(RequestError, match="message 2 has role 'system', which cannot stand after"):
        encode(1, say("u:a", "a:b", "s:c"))
    with pytest.raises(RequestError, match="role 'tool', which cannot stand in Mistral's format"):
        encode(1, say("u:a", "t:b"))
    with pytest.raises(RequestError, match="only one of the assistant's can be continued"):
        encode(1, say("u:a"), continue_final=True)
    with pytest.raises(RequestError, match="message 0 has role 'robot'"):
        encode(1, [{"role": "robot", "content": "a"}])
    with pytest.raises(RequestError, match="message 0 has a NoneType for content"):
        encode(1, [{"role": "user", "content": None}])  # type: ignore[dict-item]
    with pytest.raises(TokenizerError, match=r"no control token \[INST\].*MistralFormat\(1\)"):
        MistralFormat(3).encode(say("u:a"), TOKENIZERS[1])
    with pytest.raises(TokenizerError, match="v7 is unknown"):
        MistralFormat(7)
