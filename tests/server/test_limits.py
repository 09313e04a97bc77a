"""What one client may ask, send and leave undone."""

import asyncio
import socket
import time

import httpx2
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live import run_live
from tramontane.errors import ConfigError
from tramontane.server.errors import ApiError
from tramontane.server.limits import KeyLimits
from tramontane.server.settings import ServerSettings


def send(port: int, data: bytes, *, seconds: float = 10) -> bytes:
    """All that comes back until the other end closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        client.sendall(data)
        received = b""
        while part := client.recv(65536):
            received += part
        return received


def test_long_headers_are_refused(server):
    """A17: 1 MB in one header, and 10,000 of them."""
    begin = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for more in (b"X: " + b"a" * 40_000, b"".join(b"X%d: 1\r\n" % i for i in range(10_000))):
        answer = send(server.port, begin + more)
        assert answer.startswith(b"HTTP/1.1 431"), answer[:80]
        assert b'"error":{"message"' in answer
    few = b"".join(b"X%d: 1\r\n" % i for i in range(120)) + b"Connection: close\r\n\r\n"
    assert send(server.port, begin + few).startswith(b"HTTP/1.1 431")
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n"])
def test_what_is_no_http_is_refused(server, data):
    answer = send(server.port, data + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"error":{"message"' in answer


def test_slow_clients_are_let_go():
    """A17: headers or a body that do not come; others are answered meanwhile."""
    starts = [b"", b"GET /health HT", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: "]
    body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    with run_live(read_timeout=0.5) as live:
        slow = [socket.create_connection(("127.0.0.1", live.port), 10) for _ in range(100)]
        for number, client in enumerate(slow):
            client.sendall([*starts, body][number % 4])
        assert live.client.get("/health").status_code == 200
        for client in slow:
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408"), answer
            client.close()
        assert live.client.get("/health").status_code == 200


def test_a_second_request_of_a_connection_must_come_in_time_too():
    with run_live(read_timeout=0.4) as live:
        client = socket.create_connection(("127.0.0.1", live.port), 10)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while b'{"status":"ok"}' not in received:
            received += client.recv(65536)
        client.sendall(b"GET /health HT")
        assert client.recv(65536).startswith(b"HTTP/1.1 408")
        client.close()


def test_bodies_are_bounded():
    with run_live(max_body_bytes=10_000) as live:
        for content in (b"x" * 10_001, iter([b"x" * 6_000] * 2)):
            response = live.client.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        assert live.complete("x" * 400).status_code == 200
        packed = live.client.post("/v1/completions", content=b"x",
                                  headers={"content-encoding": "gzip"})  # fmt: skip
        assert packed.status_code == 415


def test_who_sends_all_before_it_reads_sees_the_refusal():
    """And not a connection that breaks while it sends."""
    begin = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body = b"x" * 8_000_000
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    with run_live(max_body_bytes=10_000) as live:
        for rest in (b"Content-Length: 8000000\r\n\r\n" + body,
                     b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"):  # fmt: skip
            answer = send(live.port, begin + rest)
            assert answer.startswith(b"HTTP/1.1 413")
            assert answer.endswith(b"}")
        asked = begin + b"Content-Length: 8000000\r\nExpect: 100-continue\r\n\r\n"
        assert send(live.port, asked).startswith(b"HTTP/1.1 413")


def test_there_is_a_most_of_connections():
    with run_live(max_connections=3) as live:
        held = [socket.create_connection(("127.0.0.1", live.port), 10) for _ in range(3)]
        time.sleep(0.05)  # until the server has them
        answer = send(live.port, b"")
        assert answer.startswith(b"HTTP/1.1 503")
        for client in held:
            client.close()


def test_a_rate_is_a_bucket_that_fills_up():
    now = [0.0]
    limits = KeyLimits(rate_limit=3, max_concurrency=None, clock=lambda: now[0])

    def ask(tenant: str) -> float | None:
        """Seconds to wait, if it is refused."""
        try:
            with limits.admit(tenant):
                return None
        except ApiError as error:
            return float(error.headers["retry-after-ms"]) / 1000

    assert [ask("a") for _ in range(3)] == [None] * 3
    assert ask("a") == 20
    assert ask("b") is None
    now[0] += 19
    assert ask("a") == pytest.approx(1)
    now[0] += 1
    assert ask("a") is None
    now[0] += 1000
    assert [ask("a") is None for _ in range(4)] == [True, True, True, False]


def test_a_key_has_its_own_limits():
    keys = ("key-one-0123456789", "key-two-0123456789")
    with run_live(api_keys=keys, rate_limit=2) as live:
        answers = [live.complete("x", max_tokens=1) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert answers[-1].json()["error"]["type"] == "rate_limit_error"
        assert live.client.get("/v1/models").status_code == 200  # reading is free
        other = httpx2.post(live.url + "/v1/completions", json={"prompt": "x"},
                            headers={"authorization": f"Bearer {keys[1]}"})  # fmt: skip
        assert other.status_code == 200


def test_concurrency_of_a_key_counts_until_the_end_of_the_answer():
    async def ask(url: str, number: int) -> list[int]:
        async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
            body = {"prompt": "x", "max_tokens": 20, "stream": True}
            posts = (client.post("/v1/completions", json=body) for _ in range(number))
            return sorted(r.status_code for r in await asyncio.gather(*posts))

    with run_live(lambda: FakeEngine(seconds_per_token=0.01), max_concurrency=2) as live:
        assert asyncio.run(ask(live.url, 5)) == [200, 200, 429, 429, 429]
        assert asyncio.run(ask(live.url, 2)) == [200, 200]


def test_a_full_queue_is_said_and_spoils_nothing():
    """A18: what was accepted is answered, the rest is told when to come again."""

    async def ask(url: str) -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            body = {"prompt": "x", "max_tokens": 3}
            return await asyncio.gather(
                *(client.post("/v1/completions", json=body) for _ in range(200))
            )

    def make() -> FakeEngine:
        return FakeEngine(seconds_per_token=0.02, max_running=4, max_waiting=16)

    with run_live(make) as live:
        responses = asyncio.run(ask(live.url))
        assert {r.status_code for r in responses} == {200, 429}
        for response in responses:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["code"] == "overloaded"
            else:
                assert len(response.json()["choices"][0]["text"]) == 3
        live.wait_idle()


@pytest.mark.parametrize(
    "settings",
    [{"port": 70_000}, {"rate_limit": 0}, {"max_body_bytes": -1}, {"shutdown_timeout": -1.0},
     {"price_per_hour": float("nan")}, {"safe_prompt": "sometimes"}, {"max_concurrency": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        ServerSettings(**settings)
