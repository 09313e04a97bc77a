"""T01: a run that is killed again and again ends with the bits of the unbroken one."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 40


def start(out: Path, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    arguments = [
        "train", str(folder / "run.toml"), "--source", str(folder / "tales.jsonl"),
        "--out", str(out), "--vocab-size", "262", "--seq-len", "32", "--batch-size", "2",
        "--steps", str(STEPS), "--dtype", "float32", "--eval-every", "0", "--sample-every", "0",
        "--save-every", "3", "--threads", "1", *flags,
    ]  # fmt: skip
    program = "import sys; from tramontane.cli.main import main; main()"
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE)


def write_inputs(folder: Path) -> None:
    texts = [f"One day {i} cats met the sun." for i in range(80)]
    records = [
        {"text": text, "split": "valid" if i % 8 == 0 else "train"} for i, text in enumerate(texts)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "tales.jsonl").write_text(lines)
    (folder / "run.toml").write_text(
        "[model]\ndim = 32\nn_layers = 2\nhead_dim = 16\nhidden_dim = 32\nn_heads = 2\n"
        "n_kv_heads = 1\nmax_seq_len = 64\n[model.moe]\nnum_experts = 4\n"
    )


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_t01_sigkill_at_random_times(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    assert start(tmp_path / "whole", tmp_path).wait() == 0
    killed = tmp_path / "killed"
    rng = random.Random(0)
    for _ in range(12):
        resume = ("--resume",) if list(killed.glob("checkpoints/step-*")) else ()
        process = start(killed, tmp_path, *resume)
        deadline = time.monotonic() + rng.uniform(2, 8)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if not (killed / "model").exists():
        assert start(killed, tmp_path, "--resume").wait() == 0
    assert digest(killed) == digest(tmp_path / "whole")
    log = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(10, STEPS + 1, 10))
