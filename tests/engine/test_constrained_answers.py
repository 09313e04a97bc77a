"""The bundled model's constrained answers, each judged by a library: jsonschema, regex."""

import json
from collections.abc import Iterable
from datetime import date

import jsonschema
import pytest
import regex

from tests.engine.schemas import build_schema
from tramontane import LLM, SamplingParams
from tramontane.engine.completion import Completion
from tramontane.engine.constraint import Constraint
from tramontane.errors import RequestError

FORMATS = jsonschema.FormatChecker(jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers)
PROMPT = "Once upon a time there was a girl. What we know of her:\n"


@FORMATS.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    """As docs/sampling.md has it: any year, 0000 too, may have a 29th of February."""
    return not isinstance(value, str) or bool(date.fromisoformat("2000" + value[4:]))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def answer(llm: LLM, kind: str, source: str, **params) -> Completion:
    settings = {"temperature": 0.8, "top_p": 1.0, "seed": 0, "max_tokens": 120} | params
    constraint = Constraint(kind, source)
    return llm.generate(PROMPT, SamplingParams(constraint=constraint, **settings))


def count_valid_answers(llm: LLM, seeds: Iterable[int]) -> int:
    """How many ended by themselves; each of those is what its schema asks for."""
    num_ended = 0
    for seed in seeds:
        schema = build_schema(seed)
        jsonschema.Draft202012Validator.check_schema(schema)
        completion = answer(llm, "json_schema", json.dumps(schema), seed=seed,
                            temperature=seed % 3 / 2)  # fmt: skip
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), schema, format_checker=FORMATS)
            num_ended += 1
        else:
            assert completion.finish_reason == "length"
    return num_ended


def test_answers_satisfy_their_schemas(llm: LLM) -> None:
    assert count_valid_answers(llm, range(24)) >= 20


@pytest.mark.slow
def test_answers_satisfy_some_hundred_schemas(llm: LLM) -> None:
    assert count_valid_answers(llm, range(1000, 1400)) >= 360


def test_an_object_of_any_kind(llm: LLM) -> None:
    # A model that has read stories ends no text of its own accord.
    bias = {llm.tokenizer.encode(mark)[-1]: 6.0 for mark in ('"', "}")}
    completions = [answer(llm, "json_object", "", seed=s, logit_bias=bias) for s in range(8)]
    ended = [one for one in completions if one.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(one.text), dict) for one in ended)


@pytest.mark.parametrize(
    "pattern",
    [r"Her name is [A-Z][a-z]{1,9}\.", r"(\d{1,3}, ){2}\d{1,4}!", r"(yes|no)( \w{1,8})?\."],
)
def test_regex_answers_match(llm: LLM, pattern: str) -> None:
    completions = [answer(llm, "regex", pattern, seed=seed) for seed in range(3)]
    ended = [one for one in completions if one.finish_reason == "stop"]
    assert ended
    assert all(regex.fullmatch(pattern, one.text) for one in ended)


def test_choices_and_grammars(llm: LLM) -> None:
    choices = ["Lily", "Tom", "a big red dog"]
    for seed in range(3):
        completion = answer(llm, "choice", json.dumps(choices), seed=seed)
        assert completion.text in choices
        assert completion.finish_reason == "stop"
    grammar = 'start: who " " does "."\nwho: "She" | "He"\ndoes: "ran" | "sat" | "saw " who'
    completion = answer(llm, "grammar", grammar)
    assert regex.fullmatch(r"(She|He) (ran|sat|saw (She|He))\.", completion.text)


def test_the_best_tokens_are_taken_of_those_allowed(llm: LLM) -> None:
    """Greedy answers of one constraint are equal, and the first is the model's favourite."""
    first, again = (answer(llm, "choice", '["there", "zzz"]', temperature=0) for _ in range(2))
    assert first.token_ids == again.token_ids
    assert first.text == "there"


def test_one_bad_constraint_is_refused_and_the_next_request_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="unclosed group"):
        answer(llm, "regex", "(a")
    assert answer(llm, "regex", "a").text == "a"
