import dataclasses
import math
import subprocess
import sys

import pytest

from tramontane.engine.sampling_params import PARAM_NAMES, SamplingParams
from tramontane.errors import RequestError

OUT_OF_RANGE = [
    ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", None),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
    ("temperature", "1"),
    ("top_k", -2), ("top_k", 2.0), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
    ("min_p", -0.01), ("min_p", 1.5), ("repetition_penalty", 0), ("repetition_penalty", math.nan),
    ("seed", -1), ("seed", 2**63), ("seed", 1.0),
    ("stop", ""), ("stop", ("",)), ("stop", (1,)), ("stop", 5), ("stop", "x" * 257),
    ("stop", ["a"] * 17),
    ("min_tokens", 201), ("n", 0), ("n", 129), ("logprobs", 21), ("prompt_logprobs", -1),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("experts_per_token", 0),
    ("logit_bias", {1: 101}), ("logit_bias", {-1: 1}), ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ("stop_token_ids", [-1]), ("stop_token_ids", 5), ("allowed_token_ids", [True]),
    ("allowed_token_ids", range(1025)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_errors_name_field_value_and_range(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "must be" in str(caught.value)


def test_bounds_are_allowed():
    SamplingParams(max_tokens=0, temperature=0, top_k=-1, top_p=1, min_p=1, seed=0)
    SamplingParams(top_k=0, top_p=1e-9, min_p=0, seed=2**63 - 1, repetition_penalty=1)


def test_stop_takes_a_text_or_a_list():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("top-p", "0.5", 0.5),
        ("top_k", "40", 40),
        ("seed", "12", 12),
        ("seed", "none", None),
        ("stop", "The end", ("The end",)),
        ("stop", "\\n\\n", ("\n\n",)),
        ("stop", "none", ()),
    ],
)
def test_with_setting_reads_text(name, text, value):
    params = SamplingParams(seed=3, stop="x").with_setting(name, text)
    assert getattr(params, name.replace("-", "_")) == value


@pytest.mark.parametrize(
    ("name", "text"), [("temperature", "warm"), ("top_k", "1.5"), ("seed", "")]
)
def test_with_setting_refuses_what_is_no_number(name, text):
    with pytest.raises(RequestError, match=rf"{name} is '{text}'; it must be a"):
        SamplingParams().with_setting(name, text)


def test_with_setting_refuses_nan_and_lists_known_names():
    with pytest.raises(RequestError, match="temperature is nan"):
        SamplingParams().with_setting("temperature", "nan")
    with pytest.raises(RequestError, match=r"no setting 'temp'.*temperature, top_k"):
        SamplingParams().with_setting("temp", "1")


def test_names_are_fields():
    assert set(PARAM_NAMES) <= {field.name for field in dataclasses.fields(SamplingParams)}


def test_request_modules_need_no_torch():
    modules = (
        "sampling_params generation_config text_output completion sequence bundled request".split()
    )
    code = "import sys\n" + "\n".join(f"import tramontane.engine.{m}" for m in modules)
    code += "\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
