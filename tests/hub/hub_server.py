"""A hub on this machine, as much of it as the real huggingface_hub library asks for a model."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]


@dataclass
class Repository:
    """`files` by name; `refused` is an HTTP status and X-Error-Code for every download."""

    files: dict[str, bytes]
    branch: str = "main"
    refused: tuple[int, str] | None = None

    @property
    def commit(self) -> str:
        state = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            state.update(name.encode() + b"\0" + content)
        return state.hexdigest()

    def describe(self, model: str) -> dict:
        siblings = []
        for name, content in self.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": hash_git_blob(content)}
            if is_large(name):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": model, "sha": self.commit, "siblings": siblings}


@dataclass
class Hub:
    """`requests` are (method, path, Range); `breaks` drops a connection once, at that byte."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)  # file -> HTTP status of its GET
    needs_token: bool = False
    url: str = ""

    def list_fetched(self) -> list[str]:
        return [
            p.split("/")[-1]
            for method, p, _ in self.requests
            if method == "GET" and "/resolve/" in p
        ]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))


def hash_git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def respond(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            if hub.needs_token and self.headers.get("Authorization") != "Bearer let-me-in":
                self.refuse(401, "")
            elif parts[:2] == ["api", "models"] and len(parts) >= 4:
                self.describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else None)
            elif len(parts) >= 5 and parts[2] == "resolve":
                self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
            else:
                self.refuse(404, "EntryNotFound")

        def describe(self, model: str, revision: str | None) -> None:
            repository = hub.repositories.get(model)
            if repository is None:
                self.refuse(404, "RepoNotFound")
            elif revision not in (None, repository.branch, repository.commit):
                self.refuse(404, "RevisionNotFound")
            else:
                self.send(200, json.dumps(repository.describe(model)).encode())

        def send_file(self, model: str, revision: str, name: str, with_body: bool) -> None:
            repository = hub.repositories[model]
            assert revision in (repository.branch, repository.commit)
            if repository.refused is not None:
                return self.refuse(*repository.refused)
            if with_body and name in hub.failures:
                return self.refuse(hub.failures[name], "")
            content = repository.files[name]
            digest = (
                hashlib.sha256(content).hexdigest() if is_large(name) else hash_git_blob(content)
            )
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": repository.commit}
            start, status = 0, 200
            if given := self.headers.get("Range"):
                start, status = int(given.removeprefix("bytes=").split("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            stop = hub.breaks.pop(name, None) if with_body else None
            self.send(status, content[start:], headers, with_body=with_body, stop=stop)
            return None

        def send(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            *,
            with_body: bool = True,
            stop: int | None = None,
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body[:stop])
                self.close_connection = self.close_connection or stop is not None

        def refuse(self, status: int, code: str) -> None:
            self.send(status, b"", {"X-Error-Code": code} if code else {})

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def run_tramontane(
    *arguments: str, home: Path, url: str = "http://127.0.0.1:9", before: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as the library reads the environment on import."""
    code = f"{before}\nfrom tramontane.cli.main import main\nmain()"
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=inherited | settings | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
