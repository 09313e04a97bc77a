"""A13: requests that are to take all time or memory are refused; who is answered beside them gets
what he would get alone. The server is a process of its own, whose memory is then looked at.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_hostile_constraints import HOSTILE
from tests.model_folder import save_tiny_model
from tests.server.bundled import ROOT, Served

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
CONTEXT = 4096
MIB = 2**20
NOT_FITTING, TOO_LARGE = "context_length_exceeded", "request_too_large"
MILLIONS = "a" * 4_100_000  # nearly the 4 MiB that a body may have
IDS = [5] * 2_000_000
BYSTANDER = {"prompt": "Hello", "max_tokens": 600, "temperature": 0, "ignore_eos": True}
# The path, the body, and the error's code and field.
REQUESTS: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "a long text": ("completions", {"prompt": MILLIONS}, NOT_FITTING, "prompt"),
    "one character, four bytes": (
        "completions", {"prompt": "\U0001f600" * 340_000}, NOT_FITTING, "prompt"),
    "control text": ("completions", {"prompt": "</s>" * 1_000_000}, NOT_FITTING, "prompt"),
    "a long text among others": ("completions", {"prompt": ["a", MILLIONS]}, NOT_FITTING, "prompt"),
    "a long text to be cut": (
        "completions", {"prompt": MILLIONS, "truncate_prompt_tokens": 9}, TOO_LARGE, "prompt"),
    "many ids": ("completions", {"prompt": IDS}, NOT_FITTING, "prompt"),
    "many lists of ids": ("completions", {"prompt": [[5]] * 500_000}, None, "prompt"),
    "empty lists": ("completions", {"prompt": [[]] * 1_000_000}, None, "prompt.0"),
    "a long message": (
        "chat/completions", {"messages": [{"role": "user", "content": MILLIONS}]}, NOT_FITTING,
        "messages"),
    "many parts": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 24}] * 4096},
        NOT_FITTING, "messages"),
    "a long role": (
        "chat/completions", {"messages": [{"role": MILLIONS, "content": "a"}]}, None,
        "messages.0.role"),
    "a long text to embed": ("embeddings", {"input": MILLIONS}, NOT_FITTING, "input"),
    "a long text to encode": ("/tokenize", {"prompt": MILLIONS}, TOO_LARGE, "prompt"),
    "a long message to encode": (
        "/tokenize", {"messages": [{"role": "user", "content": MILLIONS}]}, TOO_LARGE, "messages"),
    "many ids to decode": ("/detokenize", {"tokens": IDS}, None, "tokens"),
    "many stops": ("completions", {"prompt": "x", "stop": ["ab"] * 500_000}, None, "stop"),
    "a long stop": ("completions", {"prompt": "x", "stop": MILLIONS}, None, "stop"),
    "a huge logit_bias": (
        "completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(300_000)}}, None,
        "logit_bias"),
    "a long regex": (
        "completions", {"prompt": "x", "structured_outputs": {"regex": MILLIONS}}, None,
        "structured_outputs.regex"),
    "an enormous schema": (
        "completions", {"prompt": "x", "guided_json": {"enum": ["a" * 100] * 38_000}}, None,
        "guided_json"),
    "long choices": (
        "completions", {"prompt": "x", "guided_choice": ["a" * 3900] * 1024}, None,
        "guided_choice"),
    "many likeliest tokens of many prompts": (
        "completions", {"prompt": [[5] * 3000] * 250, "max_tokens": 1, "prompt_logprobs": 20}, None,
        "prompt_logprobs"),
    "the experts of many prompts": (
        "completions", {"prompt": [[5] * 4000] * 256, "max_tokens": 1, "return_routing": "all"},
        None, "return_routing"),
}  # fmt: skip
DEEP = {"lists": ("[", "]"), "objects": ('{"items":', "}")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_seq_len=CONTEXT)


@contextmanager
def serve(folder: Path, log: Path) -> Iterator[Served]:
    """`tramontane serve FOLDER`; afterwards it is healthy and has said nothing of a failure."""
    code = "from tramontane.cli.main import main; main()"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--no-log-requests"],
            stderr=file, env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(log.parent)},
        )  # fmt: skip
    try:
        while not (found := re.search(r"http://\S+", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        server = Served(found[0], process.pid)
        while server.client.get("/health").status_code != 200:
            time.sleep(0.05)
        yield server
        assert server.client.get("/health").status_code == 200
        server.require_idle()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def read_peak_bytes(server: Served) -> int:
    text = Path(f"/proc/{server.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found, text
    return int(found[1]) * 1024


def read_written_bytes(server: Served) -> int:
    found = re.search(r"^write_bytes: (\d+)", Path(f"/proc/{server.pid}/io").read_text(), re.M)
    assert found
    return int(found[1])


def dump(body: dict[str, Any]) -> str:
    """Compact: the most that a body may hold."""
    return json.dumps(body, separators=(",", ":"))


def send(server: Served, path: str, body: str) -> tuple[int, dict[str, Any]]:
    path = path if path.startswith("/") else "/v1/" + path
    headers = {"content-type": "application/json"}
    response = server.client.post(path, content=body.encode(), headers=headers)
    answer = response.json()
    if response.status_code != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"]) < 1100
    return response.status_code, answer


def ask_beside(server: Served) -> str:
    response = server.client.post("/v1/completions", json=BYSTANDER)
    return response.json()["choices"][0]["text"]


def test_a13_too_much_is_refused_before_it_is_built(folder, tmp_path):
    with serve(folder, tmp_path / "log") as server, ThreadPoolExecutor(1) as pool:
        expected, before = ask_beside(server), read_peak_bytes(server)
        for name, (path, body, code, param) in REQUESTS.items():
            beside = pool.submit(ask_beside, server)
            status, answer = send(server, path, dump(body))
            assert status == 400, name
            assert (answer["error"]["code"], answer["error"]["param"]) == (code, param), name
            assert beside.result() == expected, name
        assert read_peak_bytes(server) - before < 192 * MIB


def test_a13_long_texts_that_are_wanted_hold_up_nobody(folder, tmp_path):
    """As much as is encoded at a time, several at once: each is answered, the memory bounded."""
    requests = {
        "/tokenize": {"prompt": "a" * MIB, "return_token_strs": True},
        "/detokenize": {"tokens": [70] * MIB},
        "completions": {"prompt": "a" * MIB, "truncate_prompt_tokens": 9, "max_tokens": 1},
    }
    with serve(folder, tmp_path / "log") as server, ThreadPoolExecutor(7) as pool:
        expected, before = ask_beside(server), read_peak_bytes(server)
        sent = [
            pool.submit(send, server, path, dump(body))
            for path, body in requests.items()
            for _ in range(2)
        ]
        assert pool.submit(ask_beside, server).result() == expected
        assert [future.result()[0] for future in sent] == [200] * 6
        assert sent[0].result()[1]["count"] == MIB + 1
        assert read_peak_bytes(server) - before < 768 * MIB


def test_a13_json_of_any_depth_is_an_answer(folder, tmp_path):
    """In fields that are read, ignored, unknown, and handed on."""
    with serve(folder, tmp_path / "log") as server:
        before = read_peak_bytes(server)
        for depth in (100, 250, 500, 900, *range(940, 1001, 10), 5000, 300_000):
            for begin, end in DEEP.values():
                nested = begin * depth + "1" + end * depth
                for field in ("user", "frobnicate", "tools", "prompt", "logit_bias", "stop",
                              "response_format", "guided_json"):  # fmt: skip
                    body = f'{{"max_tokens":1,"prompt":"x","{field}":{nested}}}'
                    status, _ = send(server, "completions", body)
                    assert status in (200, 400), (field, depth)
                    assert status == 400 or field in ("user", "frobnicate", "tools", "guided_json")
        assert read_peak_bytes(server) - before < 192 * MIB


@pytest.mark.parametrize(
    "num_unique", [50, pytest.param(10_000, marks=pytest.mark.slow)], ids=["fifty", "all"]
)
def test_a13_hostile_forms_of_answers_are_refused(folder, tmp_path, num_unique):
    """Those of the engine's test, in each field that takes one; then schemas without number."""
    pytest.importorskip("llguidance")
    fields = {"regex": "guided_regex", "json_schema": "guided_json", "grammar": "guided_grammar"}
    with serve(folder, tmp_path / "log") as server, ThreadPoolExecutor(1) as pool:
        expected = ask_beside(server)
        warm = {"prompt": "x", "max_tokens": 2, "structured_outputs": {"regex": "[a-z]+"}}
        assert send(server, "completions", dump(warm))[0] == 200
        before, written = read_peak_bytes(server), read_written_bytes(server)
        for name, (kind, source, message) in HOSTILE.items():
            body = {"prompt": "x", "max_tokens": 2, fields[kind]: source}
            beside = pool.submit(ask_beside, server)
            status, answer = send(server, "completions", dump(body))
            assert status == (200 if message is None else 400), (name, answer)
            if message is not None:
                assert re.search(f"the {kind} .*({message})", answer["error"]["message"]), name
            assert beside.result() == expected, name
        for number in range(num_unique):
            schema = {"properties": {str(number): {"type": "string", "maxLength": 9}}}
            outputs = {"type": "json_schema", "json_schema": {"schema": schema}}
            body = {"prompt": "x", "max_tokens": 2, "response_format": outputs}
            assert send(server, "completions", dump(body))[0] == 200
        assert read_peak_bytes(server) - before <= 64 * MIB
        assert read_written_bytes(server) == written
