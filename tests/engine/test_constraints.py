"""Constraints with each kind of source and of vocabulary; the big run with a model is in
test_constrained_answers.py, hostile sources are in test_hostile_constraints.py.
"""

import json
from collections.abc import Iterator

import jsonschema
import pytest
import regex as re  # its \w has the marks of letters, as Unicode says and llguidance does
import torch

from tests.engine.constraint_writing import write
from tests.tokenizer import vocabularies
from tramontane.engine import grammar_process
from tramontane.engine.bundled import BUNDLED_MODEL
from tramontane.engine.constraint import Constraint
from tramontane.engine.constraints import MAX_CACHED, ConstraintCompiler
from tramontane.errors import ConfigError, OverloadError, RequestError
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf, tokenizer_from_gguf
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.sentence_piece import SentencePieceTokenizer
from tramontane.tokenizer.tokenizer import Tokenizer

PADDING = 11  # rows of a head that are no tokens
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["\u00e9t\u00e9", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def load_byte_level() -> Tokenizer:
    return load_tokenizer(BUNDLED_MODEL)


def load_gguf_byte_level() -> Tokenizer:
    metadata = describe_for_gguf(load_tokenizer(BUNDLED_MODEL))
    del metadata["tokenizer.huggingface.json"]
    return tokenizer_from_gguf(metadata, origin="x")


VOCABULARIES = {
    "tokenizer.json": load_byte_level,
    "tokenizer.model": lambda: SentencePieceTokenizer.from_file(vocabularies.V1_FILE),
    "gguf llama": lambda: tokenizer_from_gguf(vocabularies.make_gguf_metadata(), origin="x"),
    "gguf gpt2": load_gguf_byte_level,
}


def build_compiler(tokenizer: Tokenizer, **options: float) -> ConstraintCompiler:
    size = tokenizer.vocab_size + PADDING
    return ConstraintCompiler(tokenizer, [tokenizer.eos_id], size, **options)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_byte_level()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[ConstraintCompiler]:
    compiler = build_compiler(tokenizer, compile_seconds=10)  # on a machine at work too
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_each_kind_of_vocabulary_writes_what_is_asked(name: str) -> None:
    tokenizer = VOCABULARIES[name]()
    compiler = build_compiler(tokenizer)
    for seed in range(6):
        answer = write(compiler.compile(Constraint("json_schema", json.dumps(PERSON))), tokenizer,
                       seed=seed)  # fmt: skip
        assert answer is not None
        jsonschema.validate(json.loads(answer), PERSON)
        pattern = "(\u00e9|\U0001f600|\n| a){2,9}-[0-9a-f]{3}"
        answer = write(compiler.compile(Constraint("regex", pattern)), tokenizer, seed=seed)
        assert answer is not None
        assert re.fullmatch(pattern, answer)
    compiler.close()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_only_texts_and_ends_are_ever_allowed(name: str) -> None:
    """Neither control tokens nor the rows that fill up a head, whatever a grammar says."""
    tokenizer = VOCABULARIES[name]()
    compiler = build_compiler(tokenizer)
    highest = tokenizer.vocab_size + PADDING - 1
    for source in ("start: /(.|\\n)*/", f"start: <[0-{highest}]> /(.|\\n)*/"):
        mask = compiler.compile(Constraint("grammar", source)).allowed_mask()
        assert mask.dtype == torch.bool
        assert mask.shape == (tokenizer.vocab_size + PADDING,)
        allowed = set(mask.nonzero()[:, 0].tolist())
        assert allowed.isdisjoint(range(tokenizer.vocab_size, highest + 1))
        assert allowed & {*tokenizer.control_ids.values()} <= {tokenizer.eos_id}
        assert len(allowed) > 0.9 * tokenizer.vocab_size
    compiler.close()


def test_of_two_ids_that_spell_the_same_the_vocabularys_own_is_allowed() -> None:
    """SentencePiece has "<0x61>" and "a", and writes "a"."""
    tokenizer = VOCABULARIES["tokenizer.model"]()
    compiler = build_compiler(tokenizer)
    matcher = compiler.compile(Constraint("regex", "[ab]+"))
    allowed = matcher.allowed_mask().nonzero()[:, 0].tolist()
    pieces = tokenizer.describe_pieces()
    assert {pieces[i] for i in allowed} >= {"a", "b", "ab"}
    assert not any(pieces[i].startswith("<0x") for i in allowed)
    compiler.close()


REGEXES = [
    r"[a-z]{3}\d+", r"(a+)+b", r"^x?(yes|no)$", r"\w{1,4}@\w{1,4}\.(com|org)", "a.c",
    r"[^a-y\s]{2,4}", "\u65e5\u672c[\u3041-\u3096]{1,3}", r"\n\t\\ \"'\{\}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REGEXES)
def test_regex_answers_match_from_end_to_end(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, pattern: str
) -> None:
    for seed in range(4):
        answer = write(compiler.compile(Constraint("regex", pattern)), tokenizer, seed=seed)
        assert answer is not None
        assert re.fullmatch(pattern, answer), answer


def test_choices_are_written_exactly(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    choices = ["yes", "yes, but", 'a "quote" \\ and\n\x01', "\u00e9\U0001f600", "/", "${x}"]
    constraint = Constraint("choice", json.dumps(choices))
    answers = {write(compiler.compile(constraint), tokenizer, seed=seed) for seed in range(60)}
    assert answers == {*choices} - {"yes, but"}  # `write` ends where it may
    matcher = compiler.compile(constraint)
    for token_id in tokenizer.encode("yes"):
        matcher.accept(token_id)
    assert matcher.allowed_mask()[tokenizer.eos_id]
    assert not matcher.is_exhausted
    for token_id in tokenizer.encode(", but"):
        matcher.accept(token_id)
    assert matcher.is_exhausted


def test_grammar_answers_follow_the_rules(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    grammar = 'start: sum\nsum: sum "+" NUMBER | NUMBER "+" NUMBER\nNUMBER: /[1-9][0-9]{0,2}/'
    for seed in range(5):
        answer = write(compiler.compile(Constraint("grammar", grammar)), tokenizer, seed=seed)
        assert answer is not None
        assert re.fullmatch(r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2})+", answer)


def test_json_objects_have_one_layout(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Constraint("json_object"))
    for token_id in tokenizer.encode('{"a": [1, 2,3], "b":{}, "c": null}'):
        assert matcher.allowed_mask()[token_id]
        matcher.accept(token_id)
    assert matcher.is_exhausted
    matcher = compiler.compile(Constraint("json_object"))
    matcher.accept(tokenizer.encode("{")[0])
    with pytest.raises(RequestError, match="the json_object was not followed"):
        matcher.accept(tokenizer.encode("\n")[0])


def test_what_a_schema_says_about_layout_is_no_part_of_json_schema(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    schema = {"type": "array", "items": {"format": "unheard-of"}, "minItems": 1,
              "x-guidance": {"lenient": True, "whitespace_flexible": True}}  # fmt: skip
    with pytest.raises(RequestError, match="unheard-of"):
        compiler.compile(Constraint("json_schema", json.dumps(schema)))


def test_rollback_and_copies(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Constraint("regex", "ab(c|d)(e|f)"))
    a, b, c, d, e = (tokenizer.encode(letter)[0] for letter in "abcde")
    matcher.accept(a)
    before = matcher.allowed_mask()
    matcher.accept(b)
    fork = matcher.copy()
    matcher.accept(c)
    matcher.accept(e)
    assert matcher.is_exhausted
    assert not fork.is_exhausted
    assert fork.allowed_mask()[d]
    fork.accept(d)
    assert fork.allowed_mask()[e]
    late = matcher.copy()
    assert late.is_exhausted
    matcher.rollback(3)
    assert not matcher.is_exhausted
    assert torch.equal(matcher.allowed_mask(), before)
    matcher.rollback(0)
    matcher.rollback(1)
    start = compiler.compile(Constraint("regex", "ab(c|d)(e|f)"))
    assert torch.equal(matcher.allowed_mask(), start.allowed_mask())
    with pytest.raises(RequestError, match="rollback"):
        matcher.rollback(1)


def test_an_end_of_text_counts_as_a_token_to_take_back(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    a, end = tokenizer.encode("a")[0], tokenizer.eos_id
    for pattern in ("a+", "a"):  # the answer may end, and must end
        matcher = compiler.compile(Constraint("regex", pattern))
        matcher.accept(a)
        matcher.accept(end)
        assert matcher.is_exhausted
        matcher.rollback(2)
        assert matcher.allowed_mask()[a]
        assert not matcher.allowed_mask()[end]


def test_answers_of_one_grammar_do_not_disturb_each_other(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    """Far more of them than replies fit on the way."""
    constraint = Constraint("json_schema", json.dumps(PERSON))
    matchers = [compiler.compile(constraint) for _ in range(400)]
    for token_id in tokenizer.encode('{"name'):
        for matcher in matchers:
            matcher.accept(token_id)
    with pytest.raises(RequestError):
        matchers[0].accept(tokenizer.encode("}")[0])
    for matcher in matchers[1:]:
        matcher.accept(tokenizer.encode('"')[0])
    masks = torch.stack([matcher.allowed_mask() for matcher in matchers[1:]])
    assert (masks == masks[0]).all()
    del matchers, matcher
    answer = write(compiler.compile(constraint), tokenizer)
    assert answer is not None


WRONG = {
    '{"type":': ("json_schema", "not JSON: Expecting value: line 1 column 9"),
    "[1, 2]": ("json_schema", "is a JSON list; it must be an object"),
    '{"minimum": NaN}': ("json_schema", "NaN is no JSON number"),
    '{"type": "strin"}': ("json_schema", "strin"),
    '{"$ref": "#/$defs/a"}': ("json_schema", r"\$defs"),
    '{"$ref": "http://127.0.0.1/a.json"}': ("json_schema", "127.0.0.1"),
    '{"$ref": "file:///etc/passwd"}': ("json_schema", "file:///etc/passwd"),
    "(a": ("regex", "unclosed group"),
    "a{3,1}": ("regex", "invalid repetition"),
    "(?=a)b": ("regex", "look-around"),
    r"(a)\1": ("regex", "backreferences"),
    r"[^\x00-\U0010ffff]": ("regex", "nothing fits it"),
    "start: foo": ("grammar", 'at 1.8.: unknown name: "foo"'),
    "start: <[1]>": ("grammar", "only tokens that are not text"),
    "start: </s>": ("grammar", "the library failed"),
    "": ("grammar", "start"),
    '{"grammars": []}': ("grammar", "1.1."),
    "[]": ("choice", "a JSON list of one text or more"),
    '["a", ""]': ("choice", "choice 1 is ''"),
    '["a", 3]': ("choice", "choice 1 is 3"),
    '"a"': ("choice", "a JSON list"),
    "\ud800": ("regex", "character 0 of the regex is a lone surrogate"),
}


@pytest.mark.parametrize("source", WRONG, ids=ascii)
def test_a_wrong_source_is_named(compiler: ConstraintCompiler, source: str) -> None:
    kind, message = WRONG[source]
    for _ in range(2):  # the second time from memory
        with pytest.raises(RequestError, match=f"(?s){kind}.*{message}|{message}") as caught:
            compiler.compile(Constraint(kind, source))
        assert len(str(caught.value)) < 700


def test_without_llguidance_the_extra_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_process, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install tramontane\[serve\]"):
        build_compiler(tokenizer).compile(Constraint("json_object"))


def test_too_many_different_constraints_at_one_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tramontane.engine.constraints.MAX_GRAMMARS", 3)
    monkeypatch.setattr("tramontane.engine.constraints.MAX_CACHED", 0)
    compiler = build_compiler(tokenizer)
    held = [compiler.compile(Constraint("regex", f"a{i}")) for i in range(3)]
    with pytest.raises(OverloadError, match="3 different constraints are in use"):
        compiler.compile(Constraint("regex", "b"))
    assert compiler.compile(Constraint("regex", "a0")).allowed_mask().any()
    del held[1]
    assert compiler.compile(Constraint("regex", "b")).allowed_mask().any()
    compiler.close()


def test_a13_unique_sources_leave_nothing_behind(tokenizer: Tokenizer) -> None:
    """As many processes as may be kept, and none after the end."""
    compiler = build_compiler(tokenizer)
    for i in range(3 * MAX_CACHED):
        compiler.compile(Constraint("regex", f"{i}(a|b)"))
    assert len(compiler._cached) <= MAX_CACHED
    assert len(compiler._used) <= MAX_CACHED
    assert sum(kept.num_bytes for kept in compiler._cached.values()) > 0
    compiler.close()
    assert len(compiler._used) == 0
