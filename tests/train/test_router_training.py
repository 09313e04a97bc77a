"""Routers in the loop: balance restored, alarms, exact resumption, logs and the page of plots."""

import json
import os
import signal
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import make_config, make_model
from tests.train.trainers import CountingSource, Recorder, assert_same_weights, read_log
from tramontane.config import MoeConfig
from tramontane.config.moe import ROUTERS, TopPOptions
from tramontane.errors import ConfigError
from tramontane.nn.draws import seed_draws
from tramontane.train.checkpoint import RunFolder
from tramontane.train.health_report import write_health_page
from tramontane.train.loop import LoopConfig, Trainer
from tramontane.train.losses import compute_next_token_loss
from tramontane.train.optim import MasterOptimizer, OptimizerConfig
from tramontane.train.router_health import RouterHealth
from tramontane.train.router_state import read_router_state

RANDOM = ["switch", "noisy_top_k", "st_moe", "sparse_mixer", "sparse_mixer_v2"]


def make_trainer(
    out: Path, *, moe: MoeConfig, lr: float = 1e-3, rows: int = 2, **loop: Any
) -> Trainer[Any]:
    model = make_model(make_config(moe=moe, dim=32, hidden_dim=32, head_dim=8), seed=3)
    seed_draws(model, 1)
    return Trainer(
        model=model,
        optimizer=MasterOptimizer(model, OptimizerConfig(lr=lr, warmup_steps=2)),
        source=CountingSource(rows=rows),
        compute_loss=compute_next_token_loss,
        config=LoopConfig(**({"save_every": 2, "log_every": 1, "tensorboard": False} | loop)),
        folder=RunFolder(out),
        observer=Recorder(),
    )


def make_moe(name: str) -> MoeConfig:
    return MoeConfig(8, ROUTERS[name].experts_per_tok or 2, router=name)


def force_to_one_expert(trainer: Trainer[Any], expert: int) -> None:
    """Every token has one direction in common, and the gates look for it."""
    with torch.no_grad():
        masters = trainer.optimizer.masters
        masters["tok_embeddings.weight"][:, 0] = 2.0
        for name, master in masters.items():
            if name.endswith("gate.weight"):
                master[:, 0] = 0.0
                master[expert] = 0.0
                master[expert, 0] = 2.0
    trainer.optimizer.write_back()


def run_forced(out: Path, *, steps: int, name: str = "top_k", **loop: Any) -> Trainer[Any]:
    trainer = make_trainer(
        out, moe=MoeConfig(8, 1, router=name), lr=5e-3, rows=4, num_steps=steps, save_every=0,
        log_every=0, dead_expert_steps=20, **loop,
    )  # fmt: skip
    force_to_one_expert(trainer, 5)
    trainer.run()
    return trainer


def list_top_loads(trainer: Trainer[Any]) -> list[float]:
    """The largest share of any layer, step by step."""
    records = read_log(trainer)
    return [max(max(load) for load in record["router"]["load"]) for record in records]


def test_a_forced_gate_recovers_with_balancing(tmp_path: Path) -> None:
    """T24: from all tokens at one expert to below 30 % within 200 steps."""
    trainer = run_forced(tmp_path, steps=200, load_balancing_coef=0.1)
    loads = list_top_loads(trainer)
    assert loads[0] > 0.95
    assert sum(loads[-10:]) / 10 < 0.3


def test_a_forced_gate_recovers_with_biases_alone(tmp_path: Path) -> None:
    """The balance without a loss: no gradient of it reaches the model."""
    trainer = run_forced(
        tmp_path, steps=120, name="biased_top_k", load_balancing_coef=0.0, router_z_coef=0.0,
        bias_update_rate=0.05,
    )  # fmt: skip
    loads = list_top_loads(trainer)
    assert loads[0] > 0.95
    assert min(loads) < 0.4
    assert trainer.model.layers[0].feed_forward.gate.expert_bias.abs().max() > 0.5


def test_without_balancing_the_alarm_names_what_died(tmp_path: Path) -> None:
    """T24: said once, and logged with its step."""
    trainer = run_forced(tmp_path, steps=45, load_balancing_coef=0.0)
    assert min(list_top_loads(trainer)) > 0.8
    alarms = [(r["step"], text) for r in read_log(trainer) for text in r.get("alarms", ())]
    named = {text for _, text in alarms}
    assert "layer 1: expert 0 has had no token for 20 steps" in named
    assert not any("expert 5 " in text for text in named)
    assert len(alarms) == len(named)
    assert min(step for step, _ in alarms) == 20
    notes = [note for note in trainer.observer.notes if "router: layer" in note]
    assert len(notes) == len(alarms)


@pytest.mark.parametrize("name", [*RANDOM, "biased_top_k"])
def test_runs_with_every_kind_of_router_resume_exactly(tmp_path: Path, name: str) -> None:
    """T01: SIGTERM after step 2; draws and biases go on as if nothing had happened, in bf16 too."""
    whole, parts, resumed = (
        make_trainer(tmp_path / out, moe=make_moe(name), num_steps=4)
        for out in ("whole", "parts", "parts")
    )
    for trainer in (whole, parts, resumed):
        trainer.model.bfloat16()
    assert whole.run()
    parts.observer.on_step = lambda report, num_steps: (
        os.kill(os.getpid(), signal.SIGTERM) if report.step == 2 else None
    )
    assert not parts.run()
    seed_draws(resumed.model, 77)  # the checkpoint knows better
    resumed.resume()
    assert resumed.run()
    assert_same_weights(resumed, whole)
    assert read_router_state(resumed.model) == read_router_state(whole.model)
    if name == "biased_top_k":
        assert all(map(any, read_router_state(whole.model)["biases"].values()))


@pytest.mark.parametrize("name", RANDOM)
def test_what_a_step_counts_is_what_it_then_routes(tmp_path: Path, name: str) -> None:
    """T06: the pass that only counts takes no random numbers from the one that learns."""
    trainer = make_trainer(tmp_path, moe=make_moe(name), num_steps=1, accumulation=3)
    trainer.model.train()
    batches = [trainer.source.next_batch() for _ in range(3)]
    totals = trainer._count(batches)
    assert totals is not None
    health = RouterHealth()
    for batch in batches:
        health.add(compute_next_token_loss(trainer.model, batch).routing)
    for load, counts in zip(totals.loads, health.counts(), strict=True):
        torch.testing.assert_close(load * totals.num_tokens, counts.float())


def test_the_best_checkpoint_has_its_own_biases(tmp_path: Path) -> None:
    """T22: not those of the last step."""
    trainer = make_trainer(tmp_path, moe=make_moe("biased_top_k"), num_steps=4, eval_every=1)
    seen = {}

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        seen[trainer.step] = read_router_state(model)
        return {"a": abs(trainer.step - 2) + 1.0}

    trainer.evaluate = evaluate
    trainer.run()
    assert seen[2] != seen[4]
    trainer.go_to_best()
    assert read_router_state(trainer.model) == seen[2]


@pytest.mark.parametrize("name", RANDOM)
def test_evaluation_draws_nothing(tmp_path: Path, name: str) -> None:
    """What is measured on the way changes nothing of the training."""
    plain = make_trainer(tmp_path / "plain", moe=make_moe(name), num_steps=3)
    plain.run()
    watched = make_trainer(tmp_path / "watched", moe=make_moe(name), num_steps=3, eval_every=1)
    modes = []

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        modes.append(model.training)
        compute_next_token_loss(model, CountingSource().next_batch())
        return {"a": 1.0}

    watched.evaluate = evaluate
    watched.run()
    assert modes == [False] * 3
    assert_same_weights(plain, watched)


def test_top_p_learns_to_use_fewer_experts(tmp_path: Path) -> None:
    """S-40: the entropy term lowers the mean number of experts; the loss stays within 5 %."""
    found = {}
    for coef in (0.0, 0.1):
        moe = MoeConfig(8, 8, router="top_p", router_options=TopPOptions(top_p=0.5))
        trainer = make_trainer(
            tmp_path / str(coef), moe=moe, lr=5e-3, rows=4, num_steps=80, save_every=0,
            router_entropy_coef=coef,
        )  # fmt: skip
        trainer.run()
        last = read_log(trainer)[-20:]
        counts = [count for record in last for count in record["router"]["experts_per_token"]]
        found[coef] = (fmean(counts), fmean(record["loss"] for record in last))
    assert found[0.1][0] < found[0.0][0] - 0.15
    assert found[0.1][1] < found[0.0][1] * 1.05


def test_each_step_is_logged_with_its_routers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, moe=make_moe("switch"), num_steps=4, log_every=2)
    trainer.run()
    records = read_log(trainer)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert ["loss" in record for record in records] == [False, True, False, True]
    router = records[0]["router"]
    assert set(router) == {
        "load", "entropy", "max_over_mean", "dead", "dropped", "experts_per_token",
    }  # fmt: skip
    assert [len(load) for load in router["load"]] == [8, 8]
    assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in router["load"])
    assert all(0 < share < 1 for share in router["dropped"])


def test_a_dense_model_has_no_health(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, moe=None, num_steps=2, log_every=2)
    trainer.run()
    assert [record["step"] for record in read_log(trainer)] == [2]
    assert not (tmp_path / "router_health.html").exists()


class PageReader(HTMLParser):
    """The texts of a page, its elements, and every attribute that would fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.fetches: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetches += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_shows_each_layer_and_fetches_nothing(tmp_path: Path) -> None:
    trainer = run_forced(tmp_path, steps=25, load_balancing_coef=0.0)
    page = (tmp_path / "router_health.html").read_text()
    reader = PageReader()
    reader.feed(page)
    assert reader.fetches == []
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert {"layer 0", "layer 1"} <= set(reader.texts)
    alarm = "layer 1: expert 0 has had no token for 20 steps"
    assert f"step 20: {alarm}" in "".join(reader.texts)
    # Two layers of 8 experts and 25 steps, all cells black but for the experts in use.
    assert reader.tags.count("rect") == 2 * 8 * 25
    used = sum(
        load > 0 for r in read_log(trainer) for loads in r["router"]["load"] for load in loads
    )
    assert page.count('fill="#000"') == 2 * 8 * 25 - used


def test_the_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    router = {
        "load": [[0.5, 0.5, 0.0]] * 3, "entropy": [0.6] * 3, "max_over_mean": [1.5] * 3,
        "dead": [1] * 3, "dropped": [0.0] * 3, "experts_per_token": [2.0] * 3,
    }  # fmt: skip
    lines = [json.dumps({"step": step, "router": router}) for step in range(1, 5001)]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines) + '\n{"step": 5001, "rou')  # cut by a kill
    assert write_health_page(log, tmp_path / "page.html")
    reader = PageReader()
    reader.feed((tmp_path / "page.html").read_text())
    assert reader.tags.count("rect") <= 3 * 3 * 120
    assert "step 5,000" in reader.texts
    assert not write_health_page(tmp_path / "none.jsonl", tmp_path / "other.html")


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, moe=make_moe("switch"), num_steps=3, tensorboard=True)
    trainer.run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "router/entropy/layer_1", "router/load/layer_0/expert_7"} <= tags
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({r["step"]: r["loss"] for r in read_log(trainer)})


def test_without_tensorboard_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    trainer = make_trainer(tmp_path, moe=make_moe("top_k"), num_steps=3, tensorboard=True)
    trainer.run()
    notices = [note for note in trainer.observer.notes if "TensorBoard" in note]
    assert len(notices) == 1
    assert "pip install tensorboard" in notices[0]
    assert len(read_log(trainer)) == 3


def test_unknown_conventions_are_refused() -> None:
    with pytest.raises(ConfigError, match="load_balancing is 'mean'; choose hf or megablocks"):
        LoopConfig(load_balancing="mean")
