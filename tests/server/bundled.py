"""`tramontane serve` as people run it, with the bundled model and two keys."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
KEYS = ("key-of-one-0123456789", "key-of-two-0123456789")


class Served:
    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid = url, pid
        self.client = httpx2.Client(
            base_url=url, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=60
        )

    def post(self, path: str, **body) -> httpx2.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt, **fields) -> httpx2.Response:
        return self.post("/v1/completions", prompt=prompt, **fields)

    def read_metric(self, name: str) -> float:
        text = self.client.get("/metrics").text
        match = re.search(rf"^tramontane:{name}\{{.*\}} (.*)$", text, re.MULTILINE)
        assert match, name
        return float(match[1])

    def require_idle(self) -> None:
        """Nothing runs, nothing waits, no block is held."""
        for _ in range(500):
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            held = [self.read_metric(name) for name in names]
            if held == [0, 0, 0]:
                return
        pytest.fail(f"running, waiting, usage: {held}")


@contextmanager
def serve_bundled(keys: Path, *flags: str) -> Iterator[Served]:
    """`keys` is where the file of keys is written. Afterwards: idle, exit code 0, no traceback."""
    keys.write_text("# two\n" + "\n".join(KEYS))
    keys.chmod(0o600)
    code = "from tramontane.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--port", "0", "--api-key-file", str(keys),
         "--served-model-name", "fox", "--shutdown-timeout", "5", "--no-log-requests", *flags],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    while not (said and said[-1].startswith("settings")):
        line = process.stderr.readline()
        assert line, said
        said.append(line)
    url = re.search(r"http://\S+", said[0])
    assert url
    server = Served(url[0], process.pid)
    try:
        yield server
        server.require_idle()
        server.client.close()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in rest
    text = "".join(said) + rest
    assert "API keys: 2" in text
    assert "temperature 0.7" in text  # what generation_config.json set is announced
    assert not any(key in text for key in KEYS)
