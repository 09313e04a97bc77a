"""lm-eval's own client (`local-completions`) runs a task against the server, whose vocabulary it
finds by itself: a conformance test that nobody here wrote.
"""

import json

import pytest

from tests.server.bundled import KEYS, serve_bundled
from tramontane import LLM, SamplingParams
from tramontane.engine.bundled import is_bundled_model_there
from tramontane.engine.request import Request

pytestmark = [
    pytest.mark.slow,  # importing lm_eval alone takes ten seconds
    pytest.mark.skipif(not is_bundled_model_there(), reason="no bundled model"),
]
QUESTIONS = [
    {"context": "Once upon a time, there was a little", "choices": [" girl", " tax"], "gold": 0},
    {"context": "The dog was happy and wagged his", "choices": [" opera", " tail"], "gold": 1},
    {"context": "She ate the cake because she was", "choices": [" hungry", " purple"], "gold": 0},
]
TASK = """
task: tramontane_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def score(llm: LLM, context: str, choice: str) -> float:
    """The logarithm of the chance of `choice`, from the Python interface; lm-eval sends no <s>."""
    start = len(llm.tokenizer.encode(context))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    request = Request(prompt_ids=llm.tokenizer.encode(context + choice), params=params)
    (completion,) = llm.run([request])
    return sum(entry.logprob for entry in completion.prompt_logprobs[start:])


def test_lm_eval_scores_what_the_model_scores(tmp_path, monkeypatch):
    """A31, A41"""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks" / "choices.yaml").write_text(TASK.format(file=file))
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"),
                        ("HF_DATASETS_CACHE", str(tmp_path / "cache")),
                        ("OPENAI_API_KEY", KEYS[0])):  # fmt: skip
        monkeypatch.setenv(name, value)
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    with serve_bundled(tmp_path / "keys") as served:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={"base_url": served.url + "/v1/completions", "model": "fox",
                        "auth_token": KEYS[0], "max_length": 1024},
            tasks=["tramontane_choices"], task_manager=manager, bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    assert results["results"]["tramontane_choices"]["acc,none"] == 1.0
    llm = LLM()
    for question, sample in zip(QUESTIONS, results["samples"]["tramontane_choices"], strict=True):
        for choice, (logprob, _) in zip(question["choices"], sample["filtered_resps"], strict=True):
            assert float(logprob) == pytest.approx(
                score(llm, question["context"], choice), abs=1e-4
            )
