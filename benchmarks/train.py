"""Training speed: tramontane and transformers in turn, from the same weights, on the same rows.

    python benchmarks/train.py [--steps 8] [--text FILE ...] [--part steps|experts]

Steps: each contender has a process of its own, set up as its users run it, and takes one step when
it is its turn, so that a slow minute hits all. The model is the bundled model's size, a batch 8
rows of 1,024 tokens. All use the same AdamW with fp32 master weights: their losses have to agree.
The limit is the rate of torch's own matrix product at the experts' shape, measured in the same run.
Experts: one layer under even and uneven loads, see expert_layer.py.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from expert_layer import LOADS, RUNS, count_dropped, measure_layers
from machine import describe_machine, measure_matmul_rate, print_table
from transformers import AutoModelForCausalLM

from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.writer import save_model
from tramontane.config import ModelConfig, get_preset
from tramontane.data.packing import PackedBatch, PackedStream
from tramontane.data.sources import parse_source
from tramontane.data.token_files import prepare_token_files
from tramontane.models.transformer import build_model
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.train.flops import count_flops_per_token
from tramontane.train.initialization import initialize_weights
from tramontane.train.losses import compute_load_balancing_loss, compute_next_token_loss
from tramontane.train.memory import keep_compiled_products, keep_freed_memory
from tramontane.train.optim import MasterOptimizer, OptimizerConfig

ROWS, SEQ_LEN, LR, BALANCING = 8, 1024, 1e-3, 0.01
WARMUP_STEPS = 2  # not timed: products are compiled, memory is mapped
BUNDLED = Path(__file__).parents[1] / "tramontane" / "assets"
STORIES = Path(__file__).parents[2] / "shared" / "data" / "pretrain" / "tinystories.jsonl.gz"

Backward = Callable[[PackedBatch], float]  # leaves gradients, returns the mean cross-entropy


def prepare_ours(folder: Path, dtype: torch.dtype) -> tuple[MasterOptimizer, Backward]:
    keep_freed_memory()
    keep_compiled_products()
    model = load_model(folder)
    optimizer = MasterOptimizer(model, OptimizerConfig())
    model.to(dtype).train()

    def backward(batch: PackedBatch) -> float:
        terms = compute_next_token_loss(model, batch)
        loss = terms.objective / terms.num_units
        (loss + BALANCING * compute_load_balancing_loss(terms.routing)).backward()
        return loss.item()

    return optimizer, backward


def prepare_theirs(
    folder: Path, dtype: torch.dtype, *, experts: str
) -> tuple[MasterOptimizer, Backward]:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts)
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = BALANCING
    optimizer = MasterOptimizer(model, OptimizerConfig())
    model.to(dtype).train()

    def backward(batch: PackedBatch) -> float:
        tokens = torch.from_numpy(batch.tokens).view(ROWS, SEQ_LEN)
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        return (output.loss - BALANCING * output.aux_loss).item()

    return optimizer, backward


CONTENDERS: dict[str, Callable[[Path], tuple[MasterOptimizer, Backward]]] = {
    "tramontane, bf16": lambda folder: prepare_ours(folder, torch.bfloat16),
    "transformers, bf16, grouped_mm": lambda folder: prepare_theirs(
        folder, torch.bfloat16, experts="grouped_mm"
    ),
    "transformers, bf16, eager": lambda folder: prepare_theirs(
        folder, torch.bfloat16, experts="eager"
    ),
    "tramontane, fp32": lambda folder: prepare_ours(folder, torch.float32),
    "transformers, fp32, grouped_mm": lambda folder: prepare_theirs(
        folder, torch.float32, experts="grouped_mm"
    ),
}


def serve_steps(name: str, folder: Path, batches: list[PackedBatch], pipe: Connection) -> None:
    """The life of a contender's process: a step each time it is asked, (seconds, loss) back."""
    optimizer, backward = CONTENDERS[name](folder)
    for step, batch in enumerate(batches, start=1):
        pipe.recv_bytes()
        started = time.perf_counter()
        loss = backward(batch)
        optimizer.accumulate()
        optimizer.average(1, step=step)
        optimizer.step(LR)
        pipe.send((time.perf_counter() - started, loss))


@dataclass
class Contender:
    """A process that trains, and what it answered."""

    name: str
    pipe: Connection
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One timed update."""
        self.pipe.send_bytes(b"step")
        try:
            seconds, loss = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: the process ended; see its message above") from None
        self.seconds.append(seconds)
        self.losses.append(loss)

    @property
    def rate(self) -> float:
        """Tokens per second, by the median step."""
        return ROWS * SEQ_LEN / statistics.median(self.seconds[WARMUP_STEPS:])


@contextmanager
def start_contenders(folder: Path, batches: list[PackedBatch]) -> Iterator[list[Contender]]:
    """All contenders, each waiting in a fresh process."""
    context = multiprocessing.get_context("spawn")
    contenders, processes = [], []
    for name in CONTENDERS:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_steps, args=(name, folder, batches, theirs))
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        processes.append(process)
        contenders.append(Contender(name, ours))
    try:
        yield contenders
    finally:
        for process in processes:
            process.terminate()


def read_batches(paths: list[str], count: int) -> list[PackedBatch]:
    """Rows as transformers sees them: one segment per row, its last token without a target."""
    sources = [parse_source(path) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_token_files(sources, load_tokenizer(BUNDLED), folder)
        files = {domain: file for (domain, split), file in prepared.items() if split == "train"}
        weights = {source.domain: source.weight for source in sources}
        stream = PackedStream(files, weights, seq_len=SEQ_LEN, batch_size=ROWS, seed=0)
        return [_make_rows(stream.next_batch()) for _ in range(count)]


def _make_rows(batch: PackedBatch) -> PackedBatch:
    rows = batch.tokens.reshape(ROWS, SEQ_LEN)
    targets = np.concatenate((rows[:, 1:], np.full((ROWS, 1), -100)), axis=1)
    return PackedBatch(batch.tokens, targets.ravel(), (SEQ_LEN,) * ROWS, ("text",) * ROWS)


def compare_steps(config: ModelConfig, batches: list[PackedBatch]) -> None:
    """Print the table of training steps."""
    rates = []
    with tempfile.TemporaryDirectory() as name:
        model = build_model(config)
        initialize_weights(model, seed=0)
        save_model(model, Path(name) / "model", dtype=torch.float32)
        with start_contenders(Path(name) / "model", batches) as contenders:
            for _ in batches:
                rates.append(measure_matmul_rate(2048, config.dim, config.hidden_dim))
                for contender in contenders:
                    contender.step()
    flops = count_flops_per_token(config, seq_len=SEQ_LEN)
    limit = statistics.median(rates) / flops
    print(f"{ROWS} x {SEQ_LEN} tokens, median of {len(batches) - WARMUP_STEPS} steps")
    print_table(
        ["training", "tokens/s", "ratio", "of the limit", "loss of each step"],
        [
            [
                c.name,
                f"{c.rate:,.0f}",
                f"{contenders[0].rate / c.rate:.2f}x",
                f"{c.rate / limit:.0%}",
                " ".join(f"{loss:.3f}" for loss in c.losses),
            ]
            for c in contenders
        ],
    )
    print(
        f"limit: {limit:,.0f} tokens/s = {statistics.median(rates) / 1e12:.2f} TFLOP/s (bf16 "
        f"product 2048 x {config.dim} x {config.hidden_dim}) / {flops / 1e6:.1f} MFLOP per token"
    )


def compare_experts(config: ModelConfig, dtype: torch.dtype, *, repeats: int) -> None:
    """Print the table of one layer of experts."""
    keep_freed_memory()
    keep_compiled_products()
    num_tokens = ROWS * SEQ_LEN
    seconds = measure_layers(config, num_tokens=num_tokens, dtype=dtype, repeats=repeats)
    fastest = seconds["grouped, dropless", LOADS[0]]
    print(f"one layer, {num_tokens} tokens, {dtype}, forward and backward, median of {repeats}")
    rows = [
        [
            run,
            load,
            f"{1000 * seconds[run, load]:.0f}",
            f"{seconds[run, load] / fastest:.2f}x",
            f"{count_dropped(config, run, load, num_tokens=num_tokens):.0%}",
        ]
        for run in RUNS
        for load in LOADS
    ]
    print_table(["experts", "load", "ms", "of grouped, uniform", "slots dropped"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--preset", default="tramontane-23m")
    parser.add_argument("--text", nargs="+", default=[str(STORIES)], metavar="FILE")
    parser.add_argument("--part", choices=["steps", "experts"], help="one table of the two")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="of the experts' table")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be above {WARMUP_STEPS}, the steps that are not timed")
    config = get_preset(arguments.preset)
    print(f"{describe_machine('transformers')}; {arguments.preset}")
    if arguments.part != "experts":
        compare_steps(config, read_batches(arguments.text, arguments.steps))
    if arguments.part != "steps":
        repeats = arguments.steps - WARMUP_STEPS
        compare_experts(config, getattr(torch, arguments.dtype), repeats=repeats)


if __name__ == "__main__":
    main()
