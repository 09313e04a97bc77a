"""A server that says what a test tells it to: faults and texts that the real one would not produce.

It serves the page's own files under the real policy, and answers /v1/* from a script.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tramontane.server import page

KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript",
         ".svg": "image/svg+xml"}  # fmt: skip
POLICY = page.POLICY  # the server's own

Event = dict[str, Any] | str  # a string is sent as it is, without `data: `
Answer = Iterable[Event]


@dataclass
class Script:
    """What the server says. `answer` maps a request's body to its events.

    `status` other than 200 refuses every request of /v1 with `error`.
    """

    models: list[dict[str, Any]]
    answer: Callable[[dict[str, Any]], Answer]
    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


def describe_model(name: str, **facts: Any) -> dict[str, Any]:
    """A model card with the fields that the page reads."""
    known = {"chat_format": False, "n_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
             "default_params": {"temperature": 0.7, "max_tokens": 200}}  # fmt: skip
    return {"id": name, "max_model_len": 1024, "tramontane": known | facts}


def say(text: str, *, is_chat: bool, routing: list[dict[str, Any]] | None = None) -> Event:
    """A chunk of a stream that carries some text."""
    content = {"delta": {"content": text}} if is_chat else {"text": text}
    extra = {} if routing is None else {"routing": routing}
    return {"choices": [{"index": 0, "finish_reason": None, **content, **extra}]}


def end_stream(num_tokens: int) -> Iterator[Event]:
    """What closes every whole stream."""
    yield {"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "stop"}]}
    usage = {"prompt_tokens": 5, "completion_tokens": num_tokens,
             "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip
    yield {"choices": [], "usage": usage}
    yield "data: [DONE]\n\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that leaves breaks its connections; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve_script(script: Script, *, port: int = 0) -> Iterator[Script]:
    """Run it in a thread; `script.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.note()
            if self.path.startswith("/v1/models"):
                self.send_json({"object": "list", "data": script.models})
            else:
                self.send_file("index.html" if self.path == "/" else self.path)

        def do_POST(self) -> None:
            self.note()
            length = int(self.headers["Content-Length"])
            script.bodies.append(json.loads(self.rfile.read(length)))
            if script.status != 200:
                self.send_json({})
                return
            self.begin(200, "text/event-stream")
            for event in script.answer(script.bodies[-1]):
                text = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
                self.wfile.write(text.encode())
                self.wfile.flush()

        def note(self) -> None:
            script.requests.append((self.command, self.path, dict(self.headers)))

        def send_json(self, content: dict[str, Any]) -> None:
            is_fine = script.status == 200
            self.begin(script.status, "application/json")
            self.wfile.write(json.dumps(content if is_fine else {"error": script.error}).encode())

        def send_file(self, path: str) -> None:
            file = page.STATIC_FOLDER / Path(path).name
            if file.is_file():
                self.begin(200, KINDS[file.suffix])
                self.wfile.write(file.read_bytes())
            else:
                self.send_error(404)

        def begin(self, status: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = _Server(("127.0.0.1", port), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
