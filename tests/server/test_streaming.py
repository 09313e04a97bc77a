"""Clients that leave, streams that are silent, and engines that die."""

import asyncio
import json
import socket
import time

import httpx2
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live import LiveServer, run_live
from tests.server.sse import read_events
from tramontane.server.listener import stop_engine


@pytest.fixture(scope="module")
def slow():
    with run_live(lambda: FakeEngine(seconds_per_token=0.02, max_running=8)) as live:
        yield live


def open_request(live: LiveServer, **fields) -> socket.socket:
    body = json.dumps({"prompt": "x", "max_tokens": 400, **fields}).encode()
    client = socket.create_connection(("127.0.0.1", live.port), 10)
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    return client


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["a", "b"]}])
def test_who_leaves_is_not_waited_for(slow, stream, fields):
    """E14: while the answer runs, streamed or not."""
    before = slow.engine.num_ended["abort"]
    client = open_request(slow, stream=stream, **fields)
    if stream:
        received = b""
        while b"data:" not in received:
            received += client.recv(65536)
    wait_for(lambda: slow.engine.running)
    client.close()
    slow.wait_idle()
    num_answers = fields.get("n", 1) * len(fields.get("prompt", "x"))
    assert slow.engine.num_ended["abort"] - before == num_answers


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_the_queue_is_forgotten(slow, stream):
    """E14: eight run, the ninth waits."""
    clients = [open_request(slow, stream=stream) for _ in range(9)]
    wait_for(lambda: len(slow.engine.running) == 8 and slow.engine.num_waiting == 1)
    for client in reversed(clients):
        client.close()
    slow.wait_idle()


def test_many_clients_leave_at_random(slow):
    """E14: 100 streams, half of them left; the rest end as they should."""

    async def ask(client: httpx2.AsyncClient, number: int) -> str:
        body = {"prompt": "x", "max_tokens": 3, "stream": True, "seed": number}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            text = ""
            async for line in response.aiter_lines():
                text += line + "\n"
                if number % 2 and "data" in line:
                    return ""
            return text

    async def ask_all() -> list[str]:
        limits = httpx2.Limits(max_connections=100)
        async with httpx2.AsyncClient(base_url=slow.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(100)))

    texts = asyncio.run(ask_all())
    assert (
        sum("data: [DONE]" in text and '"finish_reason":"length"' in text for text in texts) == 50
    )
    slow.wait_idle()


def test_a_silent_stream_gives_signs_of_life():
    with run_live(lambda: FakeEngine(seconds_per_token=0.3), heartbeat=0.05) as live:
        response = live.complete("x", max_tokens=1, stream=True)
        assert response.text.count(": still working\n\n") >= 3
        assert response.text.startswith("data: {")  # the headers did not wait for the first token
        _, last = read_events(response)
        assert last == "[DONE]"


def test_a_client_that_does_not_read_is_let_go():
    """The buffers are full, the connection is dropped, and the engine need not go on."""
    with run_live(lambda: FakeEngine(seconds_per_token=0.01), write_timeout=0.3) as live:
        client = open_request(live, n=64, stream=True, logprobs=20)
        wait_for(lambda: live.engine.running)
        live.wait_idle(20)
        assert live.engine.num_ended["abort"] == 64
        assert live.client.get("/health").status_code == 200
        client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_said(stream):
    """E17: who waits is told, and /health is not 200."""
    with run_live(lambda: FakeEngine(seconds_per_token=0.02)) as live:
        client = open_request(live, stream=stream)
        wait_for(lambda: live.engine.running)
        time.sleep(0.1)
        live.engine.is_alive = False
        assert live.client.get("/health").status_code == 503
        answer = b""
        while b"stopped answering" not in answer:
            part = client.recv(65536)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
        assert b"[DONE]" not in answer
        error = live.chat(stream=stream).json()["error"]
        assert (error["type"], error["code"]) == ("unavailable_error", 503)
        client.close()
        live.engine.is_alive = True
        live.wait_idle()


def test_what_runs_at_the_end_is_told():
    """E15: the rest is cut off after the time of grace, with an error; new requests are refused."""
    with run_live(lambda: FakeEngine(seconds_per_token=0.02), shutdown_timeout=1.0) as live:
        clients = [open_request(live, stream=True) for _ in range(5)]
        short = open_request(live, stream=True, max_tokens=2)
        wait_for(lambda: len(live.engine.running) == 6)
        stopping = asyncio.run_coroutine_threadsafe(stop_engine(live.state, live.engine), live.loop)
        wait_for(lambda: live.state.phase == "draining")
        assert live.client.get("/health").status_code == 503
        assert live.chat().json()["error"]["code"] == 503
        stopping.result(10)
        for client in clients:
            text = read_all(client)
            assert "the server is stopping" in text
            assert "[DONE]" not in text
        assert "[DONE]" in read_all(short)
        live.wait_idle()


def read_all(client: socket.socket) -> str:
    """Until the last chunk of the body."""
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        part = client.recv(65536)
        assert part, received
        received += part
    client.close()
    return received.decode()
