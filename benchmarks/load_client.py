"""The other side of `serve.py`: so many streams at a time, in a process of its own.

    python benchmarks/load_client.py PORT MODEL STREAMS REQUESTS MAX_TOKENS ROUND

Prints one JSON object: tokens, wall seconds, and the seconds of each first text and each gap
between two texts. It speaks HTTP itself: a client library would take a share of the machine that is
measured.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field

OPENING = "Once upon a time there was a little girl who lived near the sea. "
WORDS = (8, 16, 32, 64, 128)  # of prompts; with 1.3 tokens a word, 10 to 170 tokens


@dataclass
class Result:
    """What all streams saw together."""

    num_tokens: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


async def run_load(
    port: int, model: str, streams: int, requests: int, max_tokens: int, round_number: int
) -> Result:
    """`requests` in all, from `streams` clients that each send the next when one has ended."""
    result, waiting = Result(), list_prompts(requests, round_number)
    started = time.perf_counter()

    async def work() -> None:
        while waiting:
            body = {"model": model, "prompt": waiting.pop(), "max_tokens": max_tokens,
                    "temperature": 0, "stream": True,
                    "stream_options": {"include_usage": True}}  # fmt: skip
            await ask(port, body, result)

    await asyncio.gather(*(work() for _ in range(streams)))
    result.seconds = time.perf_counter() - started
    return result


def list_prompts(count: int, round_number: int) -> list[str]:
    """Texts of mixed lengths, none the beginning of another; the same for each server.

    Those of another round begin otherwise: what a server keeps of a prompt is of no use then.
    """
    generator = random.Random(0)
    words = (OPENING * 10).split()
    return [
        f"Story {round_number}.{number}: " + " ".join(words[: generator.choice(WORDS)])
        for number in range(count)
    ]


async def ask(port: int, body: dict[str, object], result: Result) -> None:
    """One stream. Its tokens are those of `usage`, or without one its events with text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    started = time.perf_counter()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    last, is_whole, num_tokens, num_events = None, False, 0, 0
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            is_whole = True
            break
        event = json.loads(line[6:]) if line.startswith(b"data: ") else {}
        if usage := event.get("usage"):
            num_tokens = usage["completion_tokens"]
        if any(choice["text"] for choice in event.get("choices", ())):
            now = time.perf_counter()
            if last is None:
                result.first.append(now - started)
            else:
                result.gaps.append(now - last)
            last = now
            num_events += 1
    result.num_tokens += num_tokens or num_events
    result.num_failed += not is_whole
    writer.close()


if __name__ == "__main__":
    port, model, *numbers = sys.argv[1:]
    print(json.dumps(asdict(asyncio.run(run_load(int(port), model, *map(int, numbers))))))
