"""The bundled model: an ordinary Hugging Face folder that answers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tramontane import LLM, SamplingParams
from tramontane.engine.bundled import BUNDLED_MODEL

FILES = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
         "README.md")  # fmt: skip
STORY = (
    "Once upon a time, there was a little girl. She said: \u00abl'\u00e9t\u00e9 \U0001f60a!\u00bb"
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype=torch.float32)


def test_all_files_are_there_and_small() -> None:
    assert all((BUNDLED_MODEL / name).is_file() for name in FILES)
    size = sum(path.stat().st_size for path in BUNDLED_MODEL.iterdir())
    assert size < 60_000_000
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["dtype"] == "bfloat16"


def test_transformers_gives_equal_logits(llm: LLM) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(BUNDLED_MODEL)(STORY).input_ids
    assert ids == llm.tokenizer.encode(STORY, bos=True)
    with torch.inference_mode():
        hidden = llm.model.forward_packed(torch.tensor(ids), [len(ids)]).hidden
        ours = llm.model.compute_logits(hidden)
        theirs = oracle(torch.tensor([ids])).logits[0]
    scale = theirs.abs().max()
    assert ((ours - theirs).abs().max() / scale).item() < 1e-5


def test_it_has_learnt_english_stories(llm: LLM) -> None:
    answer = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=40))
    assert answer.num_completion_tokens > 5
    assert len(set(answer.text.split())) > 8
    likely = llm.tokenizer.encode(" there was a little")
    first = llm.generate("Once upon a time,", SamplingParams(temperature=0.0, max_tokens=4))
    assert first.token_ids[0] in likely
