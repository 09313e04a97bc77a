import json

import pytest

from tramontane.engine.generation_config import load_generation_config
from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import ConfigError


def load(folder, values):
    content = values if isinstance(values, str) else json.dumps(values)
    path = folder / "generation_config.json"
    path.write_text(content)
    return load_generation_config(path, eos_ids=frozenset({2}))


def test_no_file_means_our_defaults():
    config = load_generation_config(None, eos_ids=frozenset({2}))
    assert config.params == SamplingParams()
    assert config.overrides == {}
    assert config.eos_ids == {2}


def test_values_override_defaults(tmp_path):
    values = {"temperature": 0.6, "max_new_tokens": 30, "top_k": None, "transformers_version": "5"}
    config = load(tmp_path, values)
    assert config.params == SamplingParams(temperature=0.6, max_tokens=30)
    assert config.overrides == {"temperature": 0.6, "max_tokens": 30}


def test_do_sample_false_is_greedy_and_absent_is_not(tmp_path):
    assert load(tmp_path, {"do_sample": False, "temperature": 0.6}).params.temperature == 0
    assert load(tmp_path, {"eos_token_id": 2}).params.temperature == SamplingParams().temperature


def test_several_eos_ids(tmp_path):
    assert load(tmp_path, {"eos_token_id": [2, 7]}).eos_ids == {2, 7}


@pytest.mark.parametrize(
    "values",
    [
        "{",
        "[]",
        {"temperature": -1},
        {"top_p": "much"},
        {"eos_token_id": "2"},
        {"eos_token_id": [-1]},
        {"bos_token_id": True},
    ],
)
def test_errors_name_the_file(tmp_path, values):
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load(tmp_path, values)
