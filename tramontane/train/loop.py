"""The training loop: fetch, compute, step; now and then report, evaluate, sample, save.

It knows neither text nor tokens: a batch source and a loss function are given to it, so that
pre-training, instruction tuning and preference tuning are the same loop.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Generic, Literal, NoReturn, Protocol, TypeVar

import torch

from tramontane.config import require_positive
from tramontane.errors import ConfigError, DivergenceError
from tramontane.models.transformer import Transformer
from tramontane.nn.draws import read_draws, restore_draws
from tramontane.train.accumulation import StepTotals
from tramontane.train.checkpoint import Best, RunFolder
from tramontane.train.diagnosis import find_bad_tensor
from tramontane.train.event_log import EventLog
from tramontane.train.health_report import write_health_page
from tramontane.train.losses import (
    CONVENTIONS,
    Convention,
    LossTerms,
    compute_load_balancing_loss,
    compute_router_entropy,
    compute_router_z_loss,
)
from tramontane.train.optim import MasterOptimizer, compute_lr
from tramontane.train.router_health import RouterHealth, RouterWatch, describe_layers
from tramontane.train.router_state import move_biases, read_router_state, restore_router_state

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


class BatchSource(Protocol[BatchT_co]):
    """Where batches come from; the order of all batches follows from its state."""

    def next_batch(self) -> BatchT_co:
        """The batch that follows."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the source stands, as JSON values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """How long, and how often what. Intervals are in steps; 0 means never.

    `balance_over` says what the load-balancing loss is a mean of where a step has several batches:
    with `step` their gradients are those of one large batch, at the price of a second forward pass;
    with `batch` each balances for itself. `keep_best` keeps the checkpoint with the lowest mean of
    the held-out scores beside the last `keep_checkpoints`.

    The router's losses are explained in losses.py; `bias_update_rate` is the step of the biases of
    the router biased_top_k. An expert without a token for `dead_expert_steps` raises an alarm.
    """

    num_steps: int = 1000
    accumulation: int = 1  # batches per step
    balance_over: Literal["step", "batch"] = "step"
    load_balancing_coef: float = 0.01
    load_balancing: Convention = "hf"
    router_z_coef: float = 0.001
    router_entropy_coef: float = 0.0
    bias_update_rate: float = 0.001
    dead_expert_steps: int = 50
    health_every: int = 1
    tensorboard: bool = True
    log_every: int = 10
    eval_every: int = 250
    sample_every: int = 500
    save_every: int = 500
    keep_checkpoints: int = 2
    keep_best: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "accumulation", "keep_checkpoints", "dead_expert_steps")
        if self.load_balancing not in CONVENTIONS:
            raise ConfigError(
                f"load_balancing is {self.load_balancing!r}; choose {' or '.join(CONVENTIONS)}"
            )
        if self.balance_over not in ("step", "batch"):
            raise ConfigError(f"balance_over is {self.balance_over!r}; choose step or batch")


@dataclass(frozen=True)
class StepReport:
    """What one step did. Losses are means over the step; `seconds` is its wall time.

    `mfu` is the share of the peak that the model's own operations took; None if no peak is known.
    """

    step: int
    loss: float
    load_balancing_loss: float
    router_z_loss: float
    grad_norm: float
    lr: float
    num_units: int
    seconds: float
    router_entropy: float = 0.0
    mfu: float | None = None


class Observer(Protocol):
    """Sees the run: a progress bar, a printer, a test."""

    def on_step(self, report: StepReport, num_steps: int) -> None:
        """After each step."""
        ...

    def on_note(self, text: str) -> None:
        """Something a person should read."""
        ...


@dataclass
class Trainer(Generic[BatchT]):
    """One run. `evaluate` and `sample` are called with the model at their intervals.

    `seconds_per_unit` is what a unit would take at the peak of the machine, for the reports' `mfu`.
    """

    model: Transformer
    optimizer: MasterOptimizer
    source: BatchSource[BatchT]
    compute_loss: Callable[[Transformer, BatchT], LossTerms]
    config: LoopConfig
    folder: RunFolder
    observer: Observer
    evaluate: Callable[[Transformer], dict[str, float]] | None = None
    sample: Callable[[Transformer], str] | None = None
    seconds_per_unit: float | None = None
    step: int = 0
    num_units_seen: int = 0
    saved_step: int | None = None  # of the newest checkpoint
    _events: EventLog | None = field(default=None, init=False)

    def resume(self) -> None:
        """Go back to the newest checkpoint of the folder."""
        self._go_to(self.folder.load(self.optimizer))
        self.observer.on_note(f"resumed after step {self.step} of {self.config.num_steps}")

    def go_to_best(self) -> None:
        """Go back to the best checkpoint of the folder, which is there, to export it."""
        self._go_to(self.folder.load_best(self.optimizer))

    def run(self) -> bool:
        """Train to the last step, or until asked to stop (Ctrl-C or SIGTERM); save; True if done.

        Raises DivergenceError if a loss or gradient is not finite: that step is not applied, and
        nothing is saved after it.
        """
        watch = RouterWatch(self.config.dead_expert_steps)
        with _stop_on_signal(self.observer.on_note) as stop, self._write_events():
            while self.step < self.config.num_steps and not stop.is_set:
                health = RouterHealth()
                report = self._run_step(health)
                self.observer.on_step(report, self.config.num_steps)
                self._log(report, health, watch)
                self._run_periodic()
            self._save_once()
        write_health_page(self.folder.log_path, self.folder.path / "router_health.html")
        return self.step >= self.config.num_steps

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        progress = {
            "step": self.step,
            "num_units_seen": self.num_units_seen,
            "source": self.source.state(),
            "routers": read_router_state(self.model),
        }
        self.folder.save(self.optimizer, progress, keep=self.config.keep_checkpoints)
        self.saved_step = self.step

    def _go_to(self, progress: dict[str, Any]) -> None:
        """All that a checkpoint restores beside the optimizer and its model's parameters."""
        self.step, self.num_units_seen = progress["step"], progress["num_units_seen"]
        self.source.load_state(progress["source"])
        if "routers" in progress:  # not in checkpoints of earlier versions
            restore_router_state(self.model, progress["routers"])
        self.saved_step = self.step

    def _save_once(self) -> None:
        if self.saved_step != self.step:
            self.save()

    def _run_step(self, health: RouterHealth) -> StepReport:
        started = time.perf_counter()
        self.model.train()  # some routers draw random numbers then
        names = ("loss", "load_balancing_loss", "router_z_loss", "router_entropy")
        sums = dict.fromkeys(names, 0.0)
        num_units = 0
        batches = [self.source.next_batch() for _ in range(self.config.accumulation)]
        totals = self._count(batches)
        for batch in batches:
            terms = self.compute_loss(self.model, batch)
            num_units += terms.num_units
            values = self._backward(terms, totals or StepTotals.add_up([terms]), batch)
            for name, value in values.items():
                sums[name] += value
            health.add(terms.routing, mask=terms.token_mask)
        grad_norm = self.optimizer.average(max(1, num_units), step=self.step + 1)
        lr = compute_lr(self.step, num_steps=self.config.num_steps, config=self.optimizer.config)
        self.optimizer.step(lr)
        move_biases(self.model, health.counts(), rate=self.config.bias_update_rate)
        self.step += 1
        self.num_units_seen += num_units
        means = {name: value / max(1, num_units) for name, value in sums.items()}
        seconds = time.perf_counter() - started
        at_peak = self.seconds_per_unit
        return StepReport(
            step=self.step,
            grad_norm=grad_norm,
            lr=lr,
            num_units=num_units,
            seconds=seconds,
            mfu=None if at_peak is None else num_units * at_peak / seconds,
            **means,
        )

    def _count(self, batches: Sequence[BatchT]) -> StepTotals | None:
        """What the router's losses have to know of the whole step, if that is more than a batch."""
        config = self.config
        coefs = (config.load_balancing_coef, config.router_z_coef, config.router_entropy_coef)
        if len(batches) == 1 or config.balance_over == "batch" or not any(coefs):
            return None
        if self.model.config.moe is None:
            return None
        draws = read_draws(self.model)
        totals = StepTotals.add_up(self.compute_loss(self.model, batch) for batch in batches)
        restore_draws(self.model, draws)  # so that what is counted is what will be routed
        return totals

    def _backward(self, terms: LossTerms, totals: StepTotals, batch: BatchT) -> dict[str, float]:
        """Gradients of the objective and the router terms, both as sums over the step's units."""
        weight, mask, config = totals.weigh(terms), terms.token_mask, self.config
        balancing = compute_load_balancing_loss(
            terms.routing, loads=totals.loads, convention=config.load_balancing, mask=mask
        )
        values = {
            "loss": terms.objective,
            "load_balancing_loss": balancing * weight,
            "router_z_loss": compute_router_z_loss(terms.routing, mask=mask) * weight,
            "router_entropy": compute_router_entropy(terms.routing, mask=mask) * weight,
        }
        total = values["loss"] + config.load_balancing_coef * values["load_balancing_loss"]
        total = total + config.router_z_coef * values["router_z_loss"]
        total = total + config.router_entropy_coef * values["router_entropy"]
        named = {name: value.item() for name, value in values.items()}
        if not torch.isfinite(total):
            self._refuse(named, batch)
        total.backward()
        self.optimizer.accumulate()
        return named

    def _refuse(self, values: dict[str, float], batch: BatchT) -> NoReturn:
        """Stop before a step whose loss is not finite; the sums in `values` say which."""
        self.optimizer.clear()
        bad = find_bad_tensor(self.model, lambda: self.compute_loss(self.model, batch))
        sums = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise DivergenceError(
            f"step {self.step + 1}: the loss is not finite (sums over the batch: {sums}); the "
            f"first tensor that is not finite is {bad or 'the loss itself'}. The step was not "
            "applied. Lower the learning rate, or look at the data of this step"
        )

    def _run_periodic(self) -> None:
        if self._is_due(self.config.save_every):  # first: what follows may fail
            self.save()
        self.model.eval()
        is_last = self.step == self.config.num_steps and self.config.eval_every > 0
        if self.evaluate and (self._is_due(self.config.eval_every) or is_last):
            scores = self.evaluate(self.model)
            self._write({"step": self.step, "held_out_bits_per_byte": scores})
            shown = "  ".join(f"{domain} {bits:.3f}" for domain, bits in scores.items())
            best = "  (best so far)" if self._keep_if_best(fmean(scores.values())) else ""
            self.observer.on_note(f"step {self.step} held-out bits per byte: {shown}{best}")
        if self.sample and self._is_due(self.config.sample_every):
            text = self.sample(self.model)
            self._write({"step": self.step, "sample": text})
            self.observer.on_note(f"step {self.step} sample: {text}")

    def _keep_if_best(self, score: float) -> bool:
        """Whether `score` is the lowest so far; its checkpoint then outlives the newer ones."""
        best = self.folder.find_best()
        if not self.config.keep_best or (best is not None and best.score <= score):
            return False
        self._save_once()
        self.folder.mark_best(Best(self.step, score))
        return True

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    def _log(self, report: StepReport, health: RouterHealth, watch: RouterWatch) -> None:
        record: dict[str, Any] = {"step": report.step}
        layers = health.layers()
        if layers and self._is_due(self.config.health_every):
            record["router"] = describe_layers(layers)
        if alarms := watch.observe(layers):
            record["alarms"] = alarms
        for alarm in alarms:
            self.observer.on_note(f"step {report.step} router: {alarm}")
        if self._is_due(self.config.log_every):
            record |= vars(report) | {"num_units_seen": self.num_units_seen}
        if len(record) > 1:
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        """A line in the log, and its numbers in TensorBoard's."""
        self.folder.log(record)
        if self._events is not None:
            self._events.write(record)

    @contextmanager
    def _write_events(self) -> Iterator[None]:
        """Keep TensorBoard's log open, if it is wanted."""
        if not self.config.tensorboard:
            yield
            return
        folder = self.folder.path / "tensorboard"
        self._events = EventLog(folder, first_step=self.step + 1, say=self.observer.on_note)
        try:
            yield
        finally:
            self._events.close()
            self._events = None


@dataclass
class _StopRequest:
    is_set: bool = False


@contextmanager
def _stop_on_signal(say: Callable[[str], None]) -> Iterator[_StopRequest]:
    """The first Ctrl-C or SIGTERM asks the loop to finish its step and save; a second one kills."""
    request = _StopRequest()

    def ask(signum: int, _frame: object) -> None:
        if request.is_set:
            raise KeyboardInterrupt
        request.is_set = True
        say("finishing this step, then saving; once more to stop at once")

    previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
