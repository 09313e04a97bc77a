"""The server over the engine itself: a pass that hangs, and the counts of both."""

import gc
import itertools
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.sequences import count_pool_bytes
from tests.model_folder import save_tiny_model
from tests.server.live import LiveServer, run_real
from tests.server.sse import read_events
from tramontane import LLM
from tramontane.engine import grammar_process
from tramontane.engine.engine import Engine
from tramontane.engine.pulse import Patience
from tramontane.server import state
from tramontane.server.generation import Generation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def wait_for_health(live: LiveServer, status: int) -> dict:
    for _ in range(2000):
        response = live.client.get("/health")
        if response.status_code == status:
            return response.json()
        time.sleep(0.02)
    pytest.fail(f"/health never became {status}")


def test_e17_a_pass_that_hangs_is_known_and_those_who_wait_are_told(folder, monkeypatch, caplog):
    """Streaming or not; who comes later is refused at once; afterwards all is as before."""
    hangs, goes_on = threading.Event(), threading.Event()
    step, num_passes = Engine.step, itertools.count()

    def hang(self):
        if self.num_unfinished and next(num_passes) == 1:
            hangs.set()
            goes_on.wait(60)
        return step(self)

    fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with run_real(folder) as live, ThreadPoolExecutor(2) as pool:
        expected = live.complete("Hello", **fields).json()["choices"]
        monkeypatch.setattr(Engine, "step", hang)
        streamed = pool.submit(live.complete, "Hello", stream=True, **fields)
        assert hangs.wait(20)
        whole = pool.submit(live.complete, "Hello", **fields)
        assert wait_for_health(live, 503)["error"]["type"] == "unavailable_error"
        assert whole.result().status_code == 503
        assert whole.result().headers["retry-after"]
        events, last = read_events(streamed.result())
        assert last is None
        assert events[-1]["error"]["type"] == "unavailable_error"
        assert live.complete("Hello", **fields).status_code == 503
        goes_on.set()
        wait_for_health(live, 200)
        assert live.complete("Hello", **fields).json()["choices"] == expected
    said = [record.getMessage() for record in caplog.records]
    assert "the engine has died or hangs; 2 requests wait" in said


def test_e17_a_stopped_process_of_a_grammar_is_known_too(folder, monkeypatch):
    """Its answer waits for it, and so does the engine; in the end that answer alone fails."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(grammar_process, "_PATIENCE", 5.0)
    fields = {"max_tokens": 200, "temperature": 0, "guided_regex": "[ab]{190}"}
    with run_real(folder) as live, ThreadPoolExecutor(1) as pool:
        expected = live.complete("Hello", **fields).json()["choices"]
        grammar = find_child(live.engine._builder._compiler._host._process.pid)
        os.kill(grammar, signal.SIGSTOP)
        waiting = pool.submit(live.complete, "Hello", **fields)
        wait_for_health(live, 503)
        assert waiting.result().status_code == 503
        wait_for_health(live, 200)
        os.kill(grammar, signal.SIGKILL)
        assert live.complete("Hello", **fields).json()["choices"] == expected


def find_child(host: int) -> int:
    """The only one that it has."""
    (child,) = Path(f"/proc/{host}/task/{host}/children").read_text().split()
    return int(child)


def test_e17_a_hanging_pass_is_known_within_five_seconds():
    """The bound that the defaults keep; whoever looks, the server does so itself."""
    assert Patience().hang_seconds + 2 * state.CHECK_SECONDS < 5


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"guided_regex": "[ab]{4}"}])
def test_an_ended_request_is_not_left_to_the_collector(folder, fields):
    """It would keep its sequences, and a constraint's process, until Python's collector comes."""
    if "guided_regex" in fields:
        pytest.importorskip("llguidance")
    with run_real(folder) as live:
        live.complete("Hello", max_tokens=4)
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                assert live.complete("Hello", max_tokens=4, **fields).status_code == 200
            until = time.monotonic() + 20
            while count_generations() and time.monotonic() < until:
                time.sleep(0.02)
            assert count_generations() == 0
        finally:
            gc.enable()


def test_prompts_without_an_answer_are_scored_for_each_choice(folder):
    fields = {"max_tokens": 0, "n": 2, "echo": True, "logprobs": 1, "return_routing": "all"}
    with run_real(folder, enable_return_routed_experts=True) as live:
        first, second = live.complete("Hello", **fields).json()["choices"]
    assert first["logprobs"]["token_logprobs"][1:] != []
    assert {**first, "index": 1} == second


def test_the_context_is_what_the_cache_holds(folder):
    """An answer without max_tokens takes the room that there is, not what no cache could hold."""
    size = count_pool_bytes(LLM(folder).model, 4)
    with run_real(folder, limits={"kv_cache_memory_bytes": size}) as live:
        (card,) = live.client.get("/v1/models").json()["data"]
        assert card["max_model_len"] == 64
        answer = live.chat("Hello", max_tokens=None, ignore_eos=True).json()
        assert answer["usage"]["total_tokens"] == 64
        error = live.complete("x" * 60, max_tokens=9).json()["error"]
        assert error["code"] == "context_length_exceeded"


def test_what_is_wrong_with_a_constraint_is_said_of_its_field(folder):
    pytest.importorskip("llguidance")
    with run_real(folder) as live:
        for fields, param in [
            ({"structured_outputs": {"regex": "((("}}, "structured_outputs.regex"),
            ({"guided_regex": "((("}, "guided_regex"),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}},
             "response_format"),
        ]:  # fmt: skip
            response = live.complete("Hello", **fields)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == param


def count_generations() -> int:
    return sum(type(thing) is Generation for thing in gc.get_objects())


def test_the_metrics_are_the_engines(folder):
    with run_real(folder, limits={"max_num_batched_tokens": 16, "max_num_seqs": 2}) as live:
        live.complete("x" * 39, max_tokens=5, temperature=0, ignore_eos=True)
        text = live.client.get("/metrics").text
    labels = r'engine="0",.*model_name="real"'
    for name, value in {
        r'iteration_tokens_total_bucket\{engine="0",le="1.0",model_name="real"\}': 4,
        r'iteration_tokens_total_bucket\{engine="0",le="8.0",model_name="real"\}': 5,
        rf"iteration_tokens_total_count\{{{labels}\}}": 7,
        rf"iteration_tokens_total_sum\{{{labels}\}}": 40 + 4,
        r'cache_config_info\{block_size="16",cache_dtype="float32",enable_prefix_caching="True",'
        r'engine="0",kv_cache_memory_bytes="\d+",model_name="real",num_gpu_blocks="32",'
        r'sliding_window="None"\}': 1,
    }.items():
        found = re.search(rf"^tramontane:{name} (\S+)$", text, re.MULTILINE)
        assert found, (name, text)
        assert float(found[1]) == value, name
