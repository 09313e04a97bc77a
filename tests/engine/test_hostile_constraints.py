"""A13: sources that are to take all time, memory or stack end alone, and nobody else notices.

They run in a process of their own, whose memory is then looked at.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.constraint_writing import write
from tramontane.engine import grammar_process
from tramontane.engine.bundled import BUNDLED_MODEL
from tramontane.engine.constraint import MAX_SOURCE_BYTES, Constraint
from tramontane.engine.constraints import ConstraintCompiler
from tramontane.errors import OverloadError, RequestError
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def chain_references(count: int) -> str:
    definitions = {str(i): {"properties": {"x": {"$ref": f"#/$defs/{i + 1}"}}}
                   for i in range(count)}  # fmt: skip
    return json.dumps({"$ref": "#/$defs/0", "$defs": definitions | {str(count): {}}},
                      separators=(",", ":"))  # fmt: skip


def chain_rules(count: int) -> str:
    rules = [f'r{i}:r{i + 1}"b"' for i in range(count)]
    return "\n".join(["start:r0", *rules, f'r{count}:"a"'])


def multiply(*divisors: int) -> str:
    return json.dumps({"allOf": [{"type": "integer", "multipleOf": n} for n in divisors]})


LIMIT = r"needs more than (1\.5 s or )?64 MiB"
# Source, and the error, or none where it does no harm.
HOSTILE = {
    "nested repeats": ("regex", "(a+)+b", None),
    "30,000 parentheses": ("regex", "(" * 30_000 + "a" + ")" * 30_000, "maximum number of nested"),
    "30,000 brackets": ("regex", "[" * 30_000, "maximum number of nested|unclosed"),
    "a billion repeats": ("regex", "a{1,1000000000}", None),
    "repeats of repeats": ("regex", "((a{1,1000}){1,1000}){1,1000}", None),
    "a state for each subset": ("regex", "(a|b)*a(a|b){24}", None),
    "bad pattern": ("regex", "(((", "unclosed group"),
    "bad pattern in a schema": ("json_schema", '{"type": "string", "pattern": "(("}', "unclosed"),
    "deep JSON": ("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000, "recursion"),
    "deep schema": ("json_schema", '{"items":' * 300 + "{}" + "}" * 300, "recursion limit"),
    "reference to itself": ("json_schema", '{"$ref": "#"}', "nothing fits it"),
    "references in a ring": ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": '
                             '"#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}', "nothing fits it"),
    "references in a row": ("json_schema", chain_references(1300), LIMIT),
    "rules in a row": ("grammar", chain_rules(4000), LIMIT),
    "a long division": ("json_schema", multiply(1_000_003), LIMIT),
    "many divisions": ("json_schema", multiply(2, 3, 5, 7, 11, 13, 17, 19, 23), LIMIT),
    "intersections": ("grammar", "start: X\nX: " + " & ".join(
        f"/(.*a.{{{i}}}b.*)/" for i in range(60)), LIMIT),
    "doubling": ("grammar", "start: X0\n" + "\n".join(
        f"X{i}: X{i + 1} X{i + 1}" for i in range(60)) + '\nX60: "a"', f"too big|{LIMIT}"),
    "3,000 parentheses in a grammar": ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000,
                                       "too deeply nested"),
    "a thousand properties": ("json_schema", json.dumps(
        {"properties": {f"k{i}": {"type": "string"} for i in range(1000)}}), None),
}  # fmt: skip

_RUN_ALL = """
import resource, sys
from tests.engine.constraint_writing import write
from tests.engine.test_hostile_constraints import HOSTILE, build_compiler
from tramontane.engine.constraint import Constraint
from tramontane.errors import RequestError

tokenizer, compiler = build_compiler()
bystander = compiler.compile(Constraint("regex", "[ab]{300}"))

def count_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = count_kib()
for name, (kind, source, _) in HOSTILE.items():
    try:
        compiler.compile(Constraint(kind, source)).allowed_mask()
        print(name, "|ok")
    except RequestError as error:
        print(name, "|", error)
    bystander.accept(tokenizer.encode("a")[0])
for i in range(int(sys.argv[1])):
    schema = '{"properties": {"%s": {"type": "string", "maxLength": 9}}}' % i
    compiler.compile(Constraint("json_schema", schema)).allowed_mask()
print("grown by|", count_kib() - before)
print("bystander|", write(bystander, tokenizer))
"""


def build_compiler() -> tuple[Tokenizer, ConstraintCompiler]:
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    return tokenizer, ConstraintCompiler(tokenizer, [tokenizer.eos_id], tokenizer.vocab_size)


@pytest.mark.parametrize(
    "num_unique", [100, pytest.param(10_000, marks=pytest.mark.slow)], ids=["hundred", "all"]
)
def test_a13_hostile_sources_are_refused_and_others_go_on(num_unique: int) -> None:
    assert all(len(source) <= MAX_SOURCE_BYTES for _, source, _ in HOSTILE.values())
    result = subprocess.run(
        [sys.executable, "-c", _RUN_ALL, str(num_unique)], cwd=ROOT, capture_output=True,
        text=True, timeout=1200, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = dict(line.split("|", 1) for line in result.stdout.splitlines())
    grown, bystander = int(said.pop("grown by")), said.pop("bystander").strip()
    for (name, (kind, _, message)), answer in zip(HOSTILE.items(), said.values(), strict=True):
        if message is None:
            assert answer == "ok", name
        else:
            assert re.search(f"the {kind} .*({message})", answer), name
    assert len(bystander) == 300 - len(HOSTILE)
    assert grown <= 64 * 1024  # KiB


def test_a_token_that_takes_too_long_ends_its_own_answers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, compiler = build_compiler()
    bystander = compiler.compile(Constraint("regex", "[ab]{20}"))
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "STEP_SECONDS", 1e-6)
        slow = compiler.compile(Constraint("json_object"))
    fork = slow.copy()
    for matcher in (slow, fork):
        with pytest.raises(RequestError, match=r"the json_object needs more than .* for one token"):
            matcher.allowed_mask()
        with pytest.raises(RequestError, match="for one token"):
            matcher.accept(5)
    assert write(bystander, tokenizer) is not None
    again = compiler.compile(Constraint("json_object"))  # compiled anew
    assert again.allowed_mask().any()
    compiler.close()


def test_answers_go_on_and_new_ones_begin_after_the_host_has_ended() -> None:
    tokenizer, compiler = build_compiler()
    bystander = compiler.compile(Constraint("regex", "[ab]{20}"))
    host = compiler._start_host()
    os.kill(host._process.pid, signal.SIGKILL)
    host._process.wait()
    assert write(bystander, tokenizer) is not None
    assert write(compiler.compile(Constraint("regex", "[ab]{9}")), tokenizer) is not None
    compiler.close()


def test_a_cached_grammar_whose_process_has_ended_is_compiled_anew() -> None:
    tokenizer, compiler = build_compiler()
    compiler.compile(Constraint("regex", "[ab]{9}"))
    [process] = compiler._cached.values()
    process._connection.close()
    assert write(compiler.compile(Constraint("regex", "[ab]{9}")), tokenizer) is not None
    compiler.close()


def test_no_more_than_two_are_compiled_at_one_time() -> None:
    _, compiler = build_compiler()
    compiler._compile_seconds = 0.01
    message = "other constraints are being compiled"
    with compiler._compiling, compiler._compiling, pytest.raises(OverloadError, match=message):
        compiler.compile(Constraint("json_object"))
