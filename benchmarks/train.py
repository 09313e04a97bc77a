"""Training speed: tramontane and transformers in turn, from the same weights, on the same rows.

    python benchmarks/train.py [--steps 8] [--text FILE ...]

Each trains the bundled model's size on rows of 8 x 1024 tokens, one step of each in turn, so that a
slow minute hits all. All use the same AdamW with fp32 master weights: their losses have to agree.
The limit is the rate of torch's own matrix product at the experts' shape, measured in the same run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine, measure_matmul_rate, print_table
from transformers import AutoModelForCausalLM

from tramontane.checkpoint.writer import save_model
from tramontane.config import ModelConfig, get_preset
from tramontane.data.packing import PackedBatch, PackedStream
from tramontane.data.sources import parse_source
from tramontane.data.token_files import prepare_token_files
from tramontane.models.transformer import build_model
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.train.losses import compute_load_balancing, compute_next_token_loss
from tramontane.train.memory import keep_compiled_products, keep_freed_memory
from tramontane.train.optim import MasterAdamW, OptimizerConfig
from tramontane.train.pretrain import initialize_weights

ROWS, SEQ_LEN, LR, BALANCING = 8, 1024, 1e-3, 0.01
WARMUP_STEPS = 2  # not timed: products are compiled, memory is mapped
BUNDLED = Path(__file__).parents[1] / "tramontane" / "assets"
STORIES = Path(__file__).parents[2] / "shared" / "data" / "pretrain" / "tinystories.jsonl.gz"


@dataclass
class Contender:
    """One way to train: `backward` leaves gradients and returns the mean cross-entropy."""

    name: str
    backward: Callable[[PackedBatch], float]
    optimizer: MasterAdamW
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, batch: PackedBatch) -> None:
        """One timed update."""
        started = time.perf_counter()
        self.losses.append(self.backward(batch))
        self.optimizer.accumulate()
        self.optimizer.clip(step=len(self.losses))
        self.optimizer.step(LR)
        self.seconds.append(time.perf_counter() - started)

    @property
    def rate(self) -> float:
        """Tokens per second, by the median step."""
        return ROWS * SEQ_LEN / statistics.median(self.seconds[WARMUP_STEPS:])


def build_ours(folder: Path, config: ModelConfig, *, dtype: torch.dtype) -> Contender:
    model = build_model(config)
    initialize_weights(model, seed=0)
    save_model(model, folder, dtype=torch.float32)
    optimizer = MasterAdamW(model, OptimizerConfig())
    model.to(dtype)

    def backward(batch: PackedBatch) -> float:
        terms = compute_next_token_loss(model, batch)
        loss = terms.objective / terms.num_units
        (loss + BALANCING * compute_load_balancing(terms.routing)).backward()
        return loss.item()

    return Contender(f"tramontane, {_name(dtype)}", backward, optimizer)


def build_theirs(folder: Path, *, dtype: torch.dtype, experts: str) -> Contender:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts)
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = BALANCING
    optimizer = MasterAdamW(model, OptimizerConfig())
    model.to(dtype).train()

    def backward(batch: PackedBatch) -> float:
        tokens = torch.from_numpy(batch.tokens).view(ROWS, SEQ_LEN)
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        return (output.loss - BALANCING * output.aux_loss).item()

    return Contender(f"transformers, {_name(dtype)}, {experts}", backward, optimizer)


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def read_batches(paths: list[str], count: int) -> list[PackedBatch]:
    """Rows as transformers sees them: one segment per row, its last token without a target."""
    sources = [parse_source(path) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_token_files(sources, Tokenizer.from_folder(BUNDLED), folder)
        files = {domain: file for (domain, split), file in prepared.items() if split == "train"}
        weights = {source.domain: source.weight for source in sources}
        stream = PackedStream(files, weights, seq_len=SEQ_LEN, batch_size=ROWS, seed=0)
        return [_make_rows(stream.next_batch()) for _ in range(count)]


def _make_rows(batch: PackedBatch) -> PackedBatch:
    rows = batch.tokens.reshape(ROWS, SEQ_LEN)
    targets = np.concatenate((rows[:, 1:], np.full((ROWS, 1), -100)), axis=1)
    return PackedBatch(batch.tokens, targets.ravel(), (SEQ_LEN,) * ROWS, ("text",) * ROWS)


def count_flops_per_token(config: ModelConfig) -> float:
    """Of a training step: 6 per weight in a product, and causal attention's two products."""
    weights = config.count_parameters().active - config.vocab_size * config.dim
    attention = 2 * 2 * config.n_layers * config.n_heads * config.head_dim * SEQ_LEN / 2
    return 6 * weights + 3 * attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--preset", default="tramontane-23m")
    parser.add_argument("--text", nargs="+", default=[str(STORIES)], metavar="FILE")
    arguments = parser.parse_args()
    keep_freed_memory()
    keep_compiled_products()
    config = get_preset(arguments.preset)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        contenders = [
            build_ours(folder, config, dtype=torch.bfloat16),
            build_theirs(folder, dtype=torch.bfloat16, experts="grouped_mm"),
            build_theirs(folder, dtype=torch.bfloat16, experts="eager"),
            build_theirs(folder, dtype=torch.float32, experts="grouped_mm"),
        ]
    rates = []
    for batch in read_batches(arguments.text, arguments.steps):
        rates.append(measure_matmul_rate(2048, config.dim, config.hidden_dim))
        for contender in contenders:
            contender.step(batch)
    flops = count_flops_per_token(config)
    limit = statistics.median(rates) / flops
    print(describe_machine("transformers"))
    timed = arguments.steps - WARMUP_STEPS
    print(f"{arguments.preset}, {ROWS} x {SEQ_LEN} tokens, median of {timed} steps")
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


if __name__ == "__main__":
    main()
