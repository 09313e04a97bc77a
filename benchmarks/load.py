"""Loading speed: tramontane and transformers on the same folders, files in the page cache.

    python benchmarks/load.py [--layers 8] [--repeats 5] [--folder DIR]

A Mixtral of random bf16 weights (dim 1024, hidden 3584, 8 experts; 1.6 GB with 8 layers) is written
three times: with its tensors in the order of published checkpoints, the same in several files, of
which there are 19 for the 32 layers of Mixtral 8x7B, and as tramontane writes it. Each load runs in
a fresh process, in turn. "Ready" is the return of the loader; "all read" is when every weight has
been summed, matrix by matrix, because a mapped weight costs nothing before it is used. tramontane
checks before that all values are finite, which is another pass. The limit is one pass over the
bytes at the read rate of memory.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict
from machine import describe_machine, measure_read_rate, print_table, read_peak_memory
from transformers import AutoModelForCausalLM

from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.writer import save_model
from tramontane.config import ModelConfig, MoeConfig
from tramontane.models.transformer import build_model

FILES_PER_LAYER = 19 / 32
LOADERS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "tramontane": load_model,
    "tramontane, values not checked": lambda folder: load_model(folder, check_finite=False),
    "transformers": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16
    ),
}


def write_models(root: Path, *, num_layers: int) -> dict[str, Path]:
    """Folders with the same weights in another order, by what to call that."""
    config = ModelConfig(
        dim=1024, n_layers=num_layers, head_dim=64, hidden_dim=3584, n_heads=16, n_kv_heads=4,
        vocab_size=32000, moe=MoeConfig(),
    )  # fmt: skip
    model = build_model(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ours = root / "ours"
    save_model(model, ours)
    written = ours / "model.safetensors"
    tensors = safetensors.torch.load_file(written)
    tensors = {name: tensors[name] for name in sorted(tensors)}
    size = written.stat().st_size
    shard = int(size / (num_layers * FILES_PER_LAYER))
    folders = {}
    for order, max_bytes in (("as published", size), ("as published, in shards", shard)):
        folder = folders[order] = root / order
        folder.mkdir()
        save_torch_state_dict(tensors, folder, max_shard_size=max_bytes)
        (folder / "config.json").write_text((ours / "config.json").read_text())
    return folders | {"as tramontane writes": ours}


def time_load(name: str, folder: Path, pipe: "multiprocessing.connection.Connection") -> None:
    """In a process of its own: seconds until ready, until all is read, and peak memory."""
    before = read_peak_memory()
    started = time.perf_counter()
    model = LOADERS[name](folder)
    ready = time.perf_counter() - started
    read_all(model)
    all_read = time.perf_counter() - started
    pipe.send((ready, all_read, read_peak_memory() - before))


def read_all(model: torch.nn.Module) -> None:
    """Sum each matrix; threads of our own, which wait for none of the others in between.

    Two numbers of 16 bits are taken for one of 32, so that the sum is no slower than memory.
    """
    weights = [parameter.detach() for parameter in model.parameters()]
    matrices = [
        matrix.view(torch.float32)
        for weight in weights
        for matrix in (weight if weight.dim() == 3 else [weight])
    ]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(torch.sum, matrices))


def run_in_process(name: str, folder: Path) -> tuple[float, float, int]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=time_load, args=(name, folder, theirs))
    process.start()
    result: tuple[float, float, int] = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put three times that for a while")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        folders = write_models(Path(root), num_layers=arguments.layers)
        size = sum(file.stat().st_size for file in folders["as published"].iterdir())
        for folder in folders.values():
            for file in folder.iterdir():
                file.read_bytes()  # into the page cache
        cases = [(order, name) for order in folders for name in LOADERS]
        results: dict[tuple[str, str], list[tuple[float, float, int]]] = {c: [] for c in cases}
        for _ in range(arguments.repeats):
            for order, name in cases:
                results[order, name].append(run_in_process(name, folders[order]))
    limit = size / measure_read_rate()
    print(f"{describe_machine('transformers')}")
    print(f"{size / 1e9:.2f} GB, medians of {arguments.repeats}\n")
    rows = []
    for order, name in cases:
        ready, all_read, peak = (
            statistics.median(v) for v in zip(*results[order, name], strict=True)
        )
        theirs = statistics.median(r[1] for r in results[order, "transformers"])
        rows.append([
            order, name, f"{ready:.2f}", f"{all_read:.2f}", f"{theirs / all_read:.1f}x",
            f"{limit / all_read:.0%}", f"{peak / size:.2f}",
        ])  # fmt: skip
    print_table(
        ["tensors", "loader", "ready, s", "all read, s", "speed", "of the limit", "peak / size"],
        rows,
    )
    print(f"\nlimit: {limit:.2f} s = {size / 1e9:.2f} GB at {size / limit / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
