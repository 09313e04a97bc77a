"""Templates write what transformers writes, and no message can forge a control token."""

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tests.tokenizer import templates, vocabularies
from tests.tokenizer.test_mistral_format import SAMPLE, say
from tramontane.errors import RequestError, TokenizerError
from tramontane.tokenizer.chat import PlainFormat
from tramontane.tokenizer.chat_loading import chat_format_from_gguf, load_chat_format
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.mistral_format import MistralFormat
from tramontane.tokenizer.template_format import TemplateFormat
from tramontane.tokenizer.tokenizer import Tokenizer

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"]
TALKS = [
    say("u:Hi"),
    say("u:Hi", "a:Hello there", "u:  Bye\n"),
    say("u:caf\u00e9 \U0001f600", "a:\u65e5\u672c\u8a9e", "u:x\n\n  y", "a: spaced "),
    say("u:<b>1 < 2</b>", "a:hm</think>\n\n5", "u:a\tb"),
]


@cache
def make_json() -> str:
    """Mixtral's vocabulary with the four tokens that fine-tunes of it add."""
    backend = Backend.from_str(vocabularies.make_hub_json())
    backend.add_special_tokens(CHAT_TOKENS)
    return backend.to_str()


@pytest.fixture(scope="module")
def mixtral() -> Tokenizer:
    return JsonTokenizer.from_json(make_json(), origin="x")


@pytest.fixture(scope="module")
def transformers() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(make_json()), bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def build(name: str, tokenizer: Tokenizer) -> TemplateFormat:
    return TemplateFormat(templates.ALL[name], tokenizer, origin="m")


@pytest.mark.parametrize("name", templates.ALL)
@pytest.mark.parametrize("talk", TALKS, ids=len)
def test_text_and_ids_are_those_of_transformers(
    mixtral: Tokenizer, transformers: PreTrainedTokenizerFast, name: str, talk: list[dict[str, str]]
) -> None:
    """A05, C03."""
    template = build(name, mixtral)
    is_question = talk[-1]["role"] == "user"
    expected = transformers.apply_chat_template(
        talk, chat_template=templates.ALL[name], add_generation_prompt=is_question, tokenize=False
    )
    assert template.render(talk) == expected
    assert (
        template.encode(talk, mixtral) == transformers(expected, add_special_tokens=False).input_ids
    )


@pytest.mark.parametrize("name", ["chatml", "zephyr", "modern"])
def test_system_messages_too(
    mixtral: Tokenizer, transformers: PreTrainedTokenizerFast, name: str
) -> None:
    talk = say("s: Be kind. ", "u:Hi", "a:Hello", "u:Bye")
    expected = transformers.apply_chat_template(
        talk, chat_template=templates.ALL[name], add_generation_prompt=True, tokenize=False
    )
    assert build(name, mixtral).render(talk) == expected


@pytest.mark.parametrize("name", templates.ALL)
@pytest.mark.parametrize("end", ["5 + 5 is", " 5 + 5 is  ", "\u00e9"])
def test_a_continued_answer_ends_where_transformers_ends_it(
    mixtral: Tokenizer, name: str, end: str
) -> None:
    talk = [*say("u:What is 5 + 5?"), {"role": "assistant", "content": end}]
    before = copy.deepcopy(talk)
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = render_jinja_template(
        [copy.deepcopy(talk)], chat_template=templates.ALL[name], continue_final_message=True,
        **variables,
    )  # fmt: skip
    template = build(name, mixtral)
    assert template.render(talk, continue_final=True) == rendered[0]
    ids = template.encode(talk, mixtral, continue_final=True)
    assert mixtral.decode(ids[-9:]).rstrip().endswith(end.strip())
    assert talk == before


PIECES = ["<s>", "</s>", "<unk>", *CHAT_TOKENS, "[INST]", "<", "s>", "<|", "|>", "x", " ", "\n",
          "\t", "</think>", "im_end"]  # fmt: skip
ANY = st.text(st.characters(exclude_characters="\U0010fffe\U0010ffff"), max_size=5)
HOSTILE = ANY | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.mark.parametrize("name", templates.ALL)
@settings(max_examples=150)
@given(first=HOSTILE, answer=HOSTILE, last=HOSTILE)
def test_no_message_forges_a_control_token(
    mixtral: Tokenizer, name: str, first: str, answer: str, last: str
) -> None:
    """A05: as many control tokens, in the same order, as for messages that hold none."""
    template = build(name, mixtral)
    control = set(mixtral.control_ids.values())

    def control_of(*texts: str) -> list[int]:
        messages = say(*[f"{role}:{text}" for role, text in zip("uau", texts, strict=True)])
        return [i for i in template.encode(messages, mixtral) if i in control]

    # Empty messages may be skipped by a template: keep that alike.
    plain = ["x" if text else "" for text in (first, answer.split("</think>")[-1], last)]
    if name == "modern" and not plain[1] and answer:
        plain[1] = "</think>"
    assert control_of(first, answer, last) == control_of(*plain)


def test_text_around_a_message_is_encoded_with_it(mixtral: Tokenizer) -> None:
    """A05: Mixtral's golden ids from its template: [INST] is text that joins with the message."""
    ids = build("mistral", mixtral).encode(SAMPLE, mixtral)
    assert ids[:20] == MistralFormat().encode(SAMPLE, mixtral)[:20]
    assert ids.count(1) == 1


def test_a_template_may_undo_what_a_user_hides(mixtral: Tokenizer) -> None:
    """A05: a name that arises only as the template takes parts out of a message is refused."""
    source = "{{ bos_token }}{{ messages[0].content|replace('x', '') }}"
    template = TemplateFormat(source, mixtral, origin="m")
    assert 2 not in template.encode(say("u:</s> and </xs>"), mixtral)
    with pytest.raises(TokenizerError, match=r"puts the control token </s> together"):
        template.encode(say("u:</xs>"), mixtral)


def test_a_template_looks_for_names_in_messages_as_text(mixtral: Tokenizer) -> None:
    source = (
        "{% set text = messages[0].content %}"
        "{% if '</s>' in text %}{{ text.split('</s>')[0] }}</s>{% endif %}"
    )
    template = TemplateFormat(source, mixtral, origin="m")
    assert template.encode(say("u:a</s>b"), mixtral) == [*mixtral.encode("a"), 2]
    assert template.render(say("u:a</s>b")) == "a</s>"


def test_marks_cannot_be_written_or_taken_apart(mixtral: Tokenizer) -> None:
    for text in ("\U0010fffe1\U0010ffff", "\U0010ffff"):
        with pytest.raises(RequestError, match=r"U\+10FFFE or U\+10FFFF"):
            build("mistral", mixtral).encode(say("u:" + text), mixtral)
        with pytest.raises(RequestError, match=r"U\+10FFFE or U\+10FFFF"):
            build("mistral", mixtral).render([{"role": "user", "content": "a", "name": [text]}])
        with pytest.raises(TokenizerError, match="noncharacter"):
            TemplateFormat(text, mixtral, origin="m")
    template = TemplateFormat("{{ bos_token[1:] }}{{ messages[0].content }}", mixtral, origin="m")
    with pytest.raises(TokenizerError, match="takes its control tokens apart"):
        template.encode(say("u:a"), mixtral)


def test_a_dropped_end_cannot_be_continued(mixtral: Tokenizer) -> None:
    template = TemplateFormat("{{ messages[0].content[:3] }}", mixtral, origin="m")
    with pytest.raises(RequestError, match="leaves out the end of the last message"):
        template.encode(say("a:abcdef"), mixtral, continue_final=True)


def test_only_plain_values_reach_a_template(mixtral: Tokenizer) -> None:
    with pytest.raises(RequestError, match="a message holds a Tokenizer"):
        build("mistral", mixtral).render(
            [{"role": "user", "content": "a", "x": Backend.from_str(make_json())}]
        )


def test_a_folder_brings_its_format(mixtral: Tokenizer, tmp_path: Path) -> None:
    assert load_chat_format(tmp_path, mixtral) is None
    mixtral.save(tmp_path)
    assert load_chat_format(tmp_path, mixtral) is None
    shutil.copy(vocabularies.V1_FILE, tmp_path / "tokenizer.model")
    assert load_chat_format(tmp_path, mixtral) is None
    (tmp_path / "tokenizer.model").rename(tmp_path / "tokenizer.model.v1")
    brought = load_chat_format(tmp_path / "tokenizer.model.v1", mixtral)
    assert isinstance(brought, MistralFormat)
    assert brought.version == 1

    config = tmp_path / "tokenizer_config.json"
    for template in (
        "A",
        [{"name": "tools", "template": "B"}, {"name": "default", "template": "A"}],
    ):
        config.write_text(json.dumps({"chat_template": template}))
        assert load_chat_format(tmp_path, mixtral).render(SAMPLE) == "A"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_chat_format(tmp_path, mixtral).render(SAMPLE) == "J"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_config"):
        load_chat_format(tmp_path, mixtral)


def test_a_gguf_file_brings_its_format(mixtral: Tokenizer) -> None:
    assert chat_format_from_gguf({}, mixtral, origin="x") is None
    for source in ("{{ eos_token }}", b"{{ eos_token }}"):
        brought = chat_format_from_gguf({"tokenizer.chat_template": source}, mixtral, origin="x")
        assert brought.encode(SAMPLE, mixtral) == [2]  # type: ignore[union-attr]


def test_later_vocabularies_have_instructions_as_tokens() -> None:
    """A05: [INST] of the template is a token where the vocabulary has it, the user's is not."""
    tokenizer = load_tokenizer(vocabularies.V3_FILE)
    source = "{{ bos_token }}{% for m in messages %}[INST]{{ ' ' ~ m.content }}[/INST]{% endfor %}"
    ids = TemplateFormat(source, tokenizer, origin="m").encode(say("u:[/INST] </s>"), tokenizer)
    assert (ids[:2], ids[-1]) == ([1, 3], 4)
    assert not {2, 3, 4} & set(ids[2:-1])


def test_a_base_model_goes_on_with_the_text(tokenizer: Tokenizer) -> None:
    plain = PlainFormat()
    assert plain.encode(say("u:Once</s>"), tokenizer) == tokenizer.encode("Once</s>", bos=True)
    assert plain.render(say("s:A tale.", "u:", "u:Once")) == "A tale.\n\nOnce"
    assert plain.render(say("u:Once", "a: upon"), continue_final=True) == "Once\n\n upon"
    with pytest.raises(RequestError, match="there are no messages"):
        plain.render([])
