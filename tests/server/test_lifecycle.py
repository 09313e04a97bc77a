"""A server process from its start to its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tramontane.errors import ConfigError
from tramontane.server.listener import open_socket
from tramontane.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]


class Process:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process, self.pid = process, process.pid
        self.port = int(process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for_health(self, status: int) -> httpx2.Response:
        end = time.monotonic() + 20
        while True:
            try:
                response = httpx2.get(self.url + "/health")
            except httpx2.HTTPError:
                response = None
            if response is not None and response.status_code == status:
                return response
            assert time.monotonic() < end, response
            time.sleep(0.02)


@contextmanager
def start(mode: str, *, seconds_per_token: float = 0.02) -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.serve_fake", str(seconds_per_token), mode],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


def open_streams(server: Process, number: int, max_tokens: int) -> list[socket.socket]:
    body = json.dumps({"prompt": "x", "max_tokens": max_tokens, "stream": True}).encode()
    clients = []
    for _ in range(number):
        client = socket.create_connection(("127.0.0.1", server.port), 20)
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        clients.append(client)
    for client in clients:
        received = b""
        while b"data:" not in received:
            received += client.recv(65536)
    return clients


def read_to_the_end(client: socket.socket) -> bytes:
    received = b""
    while part := client.recv(65536):
        received += part
    client.close()
    return received


def test_sigterm_ends_in_order():
    """E15: 50 live streams; the short ones end, the rest is told, the port is free."""
    with start("ready") as server:
        server.wait_for_health(200)
        short = open_streams(server, 25, max_tokens=20)
        long = open_streams(server, 25, max_tokens=500)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_health(503).json()["error"]["type"] == "unavailable_error"
        assert all(b"[DONE]" in read_to_the_end(client) for client in short)
        for client in long:
            text = read_to_the_end(client)
            assert b'"error":{' in text
            assert b"[DONE]" not in text
        assert server.process.wait(20) == 0
        socket.create_server(("127.0.0.1", server.port)).close()


def test_a_second_sigterm_ends_at_once():
    """E15"""
    with start("deaf") as server:
        server.wait_for_health(200)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_health(503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM


def test_ctrl_c_while_the_model_loads():
    with start("slow") as server:
        assert server.wait_for_health(503).json()["error"]["message"] == "Loading model"
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0


def test_a_model_that_cannot_be_loaded_ends_the_server():
    with start("broken") as server:
        server.wait_for_health(503)
        assert server.process.wait(10) == 1
        assert server.process.stderr is not None
        assert "a shard is missing" in server.process.stderr.read()


def list_sockets(pid: int) -> list[tuple[str, str]]:
    """(local address, state) of all TCP sockets of a process; addresses and states in hex."""
    mine = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(path)
        if target.startswith("socket:["):
            mine.add(target.removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in mine:
                found.append((fields[1], fields[3]))
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux")
def test_the_server_listens_on_this_machine_alone_and_calls_nobody():
    """D03"""
    with start("ready") as server:
        server.wait_for_health(200)
        body = {"messages": [{"role": "user", "content": "http://127.0.0.1:9/"}], "max_tokens": 3}
        httpx2.post(server.url + "/v1/chat/completions", json=body)
        here = f"0100007F:{server.port:04X}"
        sockets = list_sockets(server.pid)
        assert (here, "0A") in sockets  # listening
        assert {address for address, _ in sockets} == {here}


def test_an_address_in_use_is_named():
    with open_socket(ServerSettings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            open_socket(ServerSettings(port=port))
