"""The server under load: tramontane beside llama-cpp-python's, on the same weights.

    python benchmarks/serve.py [--model bundled M] [--server NAME ...] [--streams 1 8 32 128]

Each server is a process, the clients are another; the servers are asked in turn, the figures are
medians over the rounds. A request is a prompt of 10 to 170 tokens and a greedy answer of up to 64.
llama-cpp-python's server answers one request at a time (llama.cpp's own `llama-server`, which can
batch, does not come with it); it takes part if `llama_cpp.server` can be imported. Tokens are
those of `usage`; a server that sends none has a token in each event. "offline" are the same
requests through the Python interface, so many under way: what is between the two is the server.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
from load_client import Result
from machine import describe_machine, print_table
from random_models import SIZES, write_model
from workers import find_folder

BUNDLED = Path(__file__).parents[1] / "tramontane" / "assets"
CLIENT = Path(__file__).parent / "load_client.py"
OFFLINE = Path(__file__).parent / "offline_client.py"
MAX_TOKENS = 64
REQUESTS_PER_STREAM = 3
START_SECONDS = 300


class ServerKind(NamedTuple):
    """`option`: how we round the weights, or which GGUF llama.cpp reads."""

    program: str
    option: str


SERVERS = {
    "tramontane bf16": ServerKind("tramontane", ""),
    "tramontane int4": ServerKind("tramontane", "int4"),
    "tramontane bf16, offline": ServerKind("offline", ""),
    "tramontane int4, offline": ServerKind("offline", "int4"),
    "llama.cpp BF16": ServerKind("llama.cpp", "BF16"),
    "llama.cpp Q4_0": ServerKind("llama.cpp", "Q4_0"),
}


class Server:
    """A process that listens on a port of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        kind = SERVERS[name]
        command = (
            build_tramontane_command(folder, kind.option, self.port)
            if kind.program == "tramontane"
            else build_llama_command(folder, kind.option, self.port)
        )
        self._said = TemporaryFile("w+")  # noqa: SIM115 (as long as the process lives)
        self._process = subprocess.Popen(
            [sys.executable, *command], stdout=self._said, stderr=self._said
        )
        self._wait()

    def measure(self, streams: int, round_number: int) -> Result:
        """One round of so many streams."""
        return run_client(CLIENT, str(self.port), "bench", streams, round_number)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models"):
                    return
            except OSError:
                time.sleep(0.2)
        self._said.seek(0)
        raise SystemExit(f"{self.name} did not start: {self._said.read()[-2000:]}")


class Offline:
    """The Python interface, in a process for each round."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._model = name, str(folder / "hf")

    def measure(self, streams: int, round_number: int) -> Result:
        """One round with so many requests under way."""
        return run_client(OFFLINE, self._model, SERVERS[self.name].option, streams, round_number)

    def close(self) -> None:
        """Nothing runs between the rounds."""


def run_client(script: Path, place: str, option: str, streams: int, round_number: int) -> Result:
    numbers = (streams, streams * REQUESTS_PER_STREAM, MAX_TOKENS, round_number)
    done = subprocess.run(
        [sys.executable, str(script), place, option, *map(str, numbers)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return Result(**json.loads(done.stdout))


def build_tramontane_command(folder: Path, quant: str, port: int) -> list[str]:
    code = "from tramontane.cli.main import main; main()"
    flags = ["--port", str(port), "--served-model-name", "bench", "--no-log-requests"]
    return ["-c", code, "serve", str(folder / "hf"), *flags, *(["--quant", quant] if quant else [])]


def build_llama_command(folder: Path, encoding: str, port: int) -> list[str]:
    threads = str(torch.get_num_threads())
    flags = {"--model": str(folder / f"{encoding}.gguf"), "--model_alias": "bench",
             "--port": str(port), "--n_ctx": "1024", "--n_threads": threads,
             "--n_threads_batch": threads, "--interrupt_requests": "False",
             "--verbose": "False"}  # fmt: skip
    return ["-m", "llama_cpp.server", *(part for pair in flags.items() for part in pair)]


def run_size(
    size: str, folder: Path, names: Sequence[str], streams: list[int], repeats: int
) -> None:
    servers = [
        (Offline if SERVERS[name].program == "offline" else Server)(name, folder / size)
        for name in names
    ]
    results: dict[tuple[str, int], list[Result]] = {}
    try:
        for server in servers:
            server.measure(1, 0)  # warm
        for round_number in range(1, repeats + 1):
            for number in streams:
                for server in servers:
                    result = server.measure(number, round_number)
                    results.setdefault((server.name, number), []).append(result)
    finally:
        for server in servers:
            server.close()
    print(f"\n{size}: prompts of 10 to 170 tokens, answers of up to {MAX_TOKENS}\n")
    header = ["server", "streams", "tokens/s", "first token p50 / p99, ms", "gap p50 / p99, ms",
              "failed"]  # fmt: skip
    print_table(header, [describe(name, number, runs) for (name, number), runs in results.items()])


def describe(name: str, streams: int, runs: Sequence[Result]) -> list[object]:
    """A row: medians over the rounds."""
    rate = statistics.median(run.num_tokens / run.seconds for run in runs)
    return [
        name, streams, f"{rate:,.1f}",
        " / ".join(middle_quantile([run.first for run in runs], q) for q in (0.5, 0.99)),
        " / ".join(middle_quantile([run.gaps for run in runs], q) for q in (0.5, 0.99)),
        sum(run.num_failed for run in runs),
    ]  # fmt: skip


def middle_quantile(rounds: Sequence[list[float]], share: float) -> str:
    """The median over the rounds of a quantile, in ms."""
    values = [quantile(sorted(seconds), share) for seconds in rounds if seconds]
    return f"{1000 * statistics.median(values):,.1f}" if values else "-"


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def choose_servers(wanted: list[str] | None) -> list[str]:
    """Those that were asked for, or all that can run here."""
    needed = ("llama_cpp", "starlette_context", "pydantic_settings", "sse_starlette")
    has_llama = all(find_spec(name) for name in needed)
    if not has_llama:
        print("without llama.cpp: pip install 'llama-cpp-python[server]'", file=sys.stderr)
    return [name for name in wanted or SERVERS if has_llama or SERVERS[name].program != "llama.cpp"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=["bundled", *SIZES], default=["bundled", "M"])
    parser.add_argument("--server", nargs="+", choices=list(SERVERS))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    names = choose_servers(arguments.server)
    with find_folder(arguments.folder) as folder:
        print(describe_machine("fastapi", "uvicorn"))
        for size in arguments.model:
            write_model(size, folder, bundled=BUNDLED)
            run_size(size, folder, names, arguments.streams, arguments.repeats)


if __name__ == "__main__":
    main()
