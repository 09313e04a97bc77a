"""The loss curve of the whole loop beside transformers' and torch's AdamW: 100 steps, fp32."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.oracles.hf import to_hf_model
from tests.tiny import make_config, make_model
from tests.train.trainers import Recorder
from tramontane.config import MoeConfig
from tramontane.data.packing import PackedBatch
from tramontane.models.transformer import Transformer
from tramontane.train.checkpoint import RunFolder
from tramontane.train.loop import LoopConfig, Trainer
from tramontane.train.losses import LossTerms, compute_next_token_loss
from tramontane.train.optim import MasterOptimizer, OptimizerConfig

STEPS, ROWS, LENGTH, VOCAB = 100, 4, 16, 128
LR, WARMUP, LAST = 1e-3, 10, 0.1
BALANCING = 0.01


@dataclass
class Chains:
    """Rows of a random Markov chain: each id has four followers. Batch i is a function of i."""

    position: int = 0

    def rows(self) -> torch.Tensor:
        """The next batch (ROWS, LENGTH)."""
        followers = np.random.default_rng(7).integers(0, VOCAB, (VOCAB, 4))
        rng = np.random.default_rng([1, self.position])
        rows = np.empty((ROWS, LENGTH), dtype=np.int64)
        rows[:, 0] = rng.integers(0, VOCAB, ROWS)
        for i in range(1, LENGTH):
            rows[:, i] = followers[rows[:, i - 1], rng.integers(0, 4, ROWS)]
        self.position += 1
        return torch.from_numpy(rows)

    def next_batch(self) -> PackedBatch:
        """As transformers counts: the last token of a row has no target."""
        rows = self.rows().numpy()
        targets = np.concatenate((rows[:, 1:], np.full((ROWS, 1), -100)), axis=1)
        return PackedBatch(rows.ravel(), targets.ravel(), (LENGTH,) * ROWS, ("a",) * ROWS)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def train_ours(model: Transformer, out: Path) -> tuple[list[float], float]:
    """The losses, and the least distance of a logit that was chosen to one that was not."""
    config = OptimizerConfig(lr=LR, warmup_steps=WARMUP, min_lr_ratio=LAST, weight_decay=0.1)
    recorder, gaps = Recorder(), [math.inf]

    def compute_loss(model: Transformer, batch: PackedBatch) -> LossTerms:
        terms = compute_next_token_loss(model, batch)
        for layer in terms.routing:
            ordered = layer.logits.detach().sort(descending=True).values
            gaps.append((ordered[:, 1] - ordered[:, 2]).min().item())
        return terms

    loop = {"save_every": 0, "load_balancing_coef": BALANCING, "router_z_coef": 0.0}
    trainer = Trainer(
        model=model,
        optimizer=MasterOptimizer(model, config),
        source=Chains(),
        compute_loss=compute_loss,
        config=LoopConfig(num_steps=STEPS, **loop),
        folder=RunFolder(out),
        observer=recorder,
    )
    assert trainer.run()
    return [report.loss for report in recorder.reports], min(gaps)


def train_theirs(hf_model: Any, *, num_experts: int | None) -> list[float]:
    """The loop that anyone would write, with the schedule's formula written here once more."""
    decayed = [p for p in hf_model.parameters() if p.dim() > 1]
    others = [p for p in hf_model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    source, losses = Chains(), []
    for step in range(STEPS):
        rows = source.rows()
        options = {"output_router_logits": True} if num_experts else {}
        output = hf_model(input_ids=rows, use_cache=False, **options)
        loss = hf_model.loss_function(output.logits, rows, vocab_size=VOCAB)
        losses.append(loss.item())
        if num_experts:  # transformers pools the layers; its own function, layer by layer
            layers = [load_balancing_loss_func((x,), num_experts, 2) for x in output.router_logits]
            loss = loss + BALANCING * sum(layers) / len(layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf_model.parameters(), 1.0)
        progress = (step - WARMUP) / (STEPS - WARMUP)
        cosine = LAST + (1 - LAST) * (1 + math.cos(math.pi * progress)) / 2
        for group in adamw.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP, cosine)
        adamw.step()
        adamw.zero_grad()
    return losses


@pytest.mark.parametrize("moe", [MoeConfig(), None], ids=["mixtral", "mistral"])
def test_the_curve_is_that_of_transformers(tmp_path: Path, moe: MoeConfig | None) -> None:
    """Within 1e-3 at each step. A choice of experts is a jump: where two are equal but for rounding
    the curves part, whoever computes them. So the routers are made decided, and it is checked that
    no token ever stood between two experts.
    """
    model = make_model(make_config(moe=moe), seed=7)
    for layer in model.layers if moe else ():
        layer.feed_forward.gate.weight.data *= 4
    hf_model = to_hf_model(model).train()
    theirs = train_theirs(hf_model, num_experts=moe and moe.num_experts)
    ours, gap = train_ours(model, tmp_path)
    assert gap > 1e-4
    assert np.abs(np.array(ours) - np.array(theirs)).max() <= 1e-3
    assert np.mean(ours[-5:]) < np.mean(ours[:5]) - 0.5  # it did learn
