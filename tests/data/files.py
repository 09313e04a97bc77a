"""Small text files for the data tests."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

WORDS = "the girl boy rain sun house tree said went big \u00e9t\u00e9 \u65e5\u672c 7".split()


def make_stories(count: int, *, seed: int = 0, max_words: int = 40) -> list[str]:
    """Random stories of 1 to `max_words` words; each starts with its own number."""
    choose = random.Random(seed)
    lengths = [choose.randint(1, max_words) for _ in range(count)]
    return [
        f"{seed}-{number} " + " ".join(choose.choices(WORDS, k=length))
        for number, length in enumerate(lengths)
    ]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes JSON Lines, compressed if the name says so."""
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = content.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
