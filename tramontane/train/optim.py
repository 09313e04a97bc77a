"""fp32 master weights under a lower-precision model, updated by AdamW or Muon, and schedules."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tramontane.errors import ConfigError, DivergenceError
from tramontane.train.muon import Muon


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated, and the learning rate's schedule.

    `adamw` (arXiv:1711.05101) updates all of them. `muon` (arXiv:2502.16982) turns the update of
    each matrix of attention and experts into an orthogonal one, of AdamW's size, and leaves all
    else to AdamW: fewer tokens to the same loss, a fifth more time per step at the bundled size.
    `cosine` falls from `lr` to `lr * min_lr_ratio` over the whole run; `wsd` stays at `lr` and
    falls linearly over the last `decay_ratio` of the steps, so that a run can be lengthened.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    warmup_steps: int = 200
    schedule: Literal["cosine", "wsd"] = "cosine"
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.2

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr is {self.lr}; it must be above zero")
        for name in ("eps", "max_grad_norm", "min_lr_ratio", "weight_decay", "warmup_steps"):
            value = getattr(self, name)
            if not value >= 0 or (value == 0 and name in ("eps", "max_grad_norm")):
                raise ConfigError(f"optimizer.{name} is {value}; it must be above zero")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {self.betas}; it must be two numbers in [0, 1)")
        if self.kind not in ("adamw", "muon"):
            raise ConfigError(f"optimizer.kind is {self.kind!r}; choose adamw or muon")
        if self.schedule not in ("cosine", "wsd"):
            raise ConfigError(f"optimizer.schedule is {self.schedule!r}; choose cosine or wsd")
        if not 0 <= self.min_lr_ratio <= 1 or not 0 < self.decay_ratio <= 1:
            raise ConfigError("optimizer.min_lr_ratio and decay_ratio are shares, from 0 to 1")


def compute_lr(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the step that follows `step` finished ones."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = min(1.0, (num_steps - step) / max(1.0, num_steps * config.decay_ratio))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


class MasterOptimizer:
    """Keeps an fp32 copy of each parameter, updates that, and writes it back in the model's dtype.

    Gradients of several batches add up in fp32. Matrices decay; norms do not. With `muon`, the
    matrices of attention and experts are updated by Muon, all else by AdamW.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.masters = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()
        }
        self.moments: dict[str, Tensor] = {}
        self._muon_names: list[str] = []
        if config.kind == "muon":
            self._muon_names = [
                name
                for name, master in self.masters.items()
                if name.startswith("layers.") and master.dim() > 1
                and ".gate." not in name and ".mix." not in name
            ]  # fmt: skip
        self._optimizers: list[torch.optim.Optimizer] = [self._build_adamw()]
        if self._muon_names:
            self._optimizers.append(self._build_muon())

    def _build_adamw(self) -> torch.optim.Optimizer:
        """AdamW for all that Muon does not take, its moments in `moments`."""
        names = [name for name in self.masters if name not in self._muon_names]
        config = self.config
        decays = {True: config.weight_decay, False: 0.0}
        groups = [
            {
                "params": [
                    self.masters[n] for n in names if (self.masters[n].dim() > 1) == is_matrix
                ],
                "weight_decay": decay,
            }
            for is_matrix, decay in decays.items()
        ]
        adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        for name in names:
            master = self.masters[name]
            state = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
            self.moments |= {f"{key}.{name}": moment for key, moment in state.items()}
            adamw.state[master] = {"step": torch.zeros((), device=master.device), **state}
        return adamw

    def _build_muon(self) -> torch.optim.Optimizer:
        """Muon for the matrices of attention and experts, its momentum in `moments`."""
        masters = {name: self.masters[name] for name in self._muon_names}
        muon = Muon(masters.values(), lr=self.config.lr, weight_decay=self.config.weight_decay)
        for name, master in masters.items():
            self.moments[f"momentum.{name}"] = muon.state[master]["momentum_buffer"]
        return muon

    def accumulate(self) -> None:
        """Add the model's gradients to those of the masters, and clear them."""
        for name, parameter in self.parameters.items():
            master, grad = self.masters[name], parameter.grad
            if grad is None:
                continue
            if master.grad is None:
                master.grad = grad.float()
            else:
                master.grad.add_(grad)
            parameter.grad = None

    def average(self, num_units: int, *, step: int) -> float:
        """Divide the gathered gradients by `num_units` and clip them; returns their norm between.

        Raises DivergenceError that names the last parameter whose gradient is not finite: backward,
        such a gradient makes all those before it so too.
        """
        gradients = {n: w.grad for n, w in self.masters.items() if w.grad is not None}
        norm = torch.nn.utils.get_total_norm(gradients.values()).item() / num_units
        if not math.isfinite(norm):
            bad = [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
            self.clear()
            raise DivergenceError(
                f"step {step}: the gradient of {bad[-1] if bad else 'the model'} is not finite "
                f"({len(bad)} such); the step was not applied. Lower the learning rate, or look at "
                "the data of this step"
            )
        factor = min(1.0, self.config.max_grad_norm / (norm + 1e-6)) / num_units
        torch._foreach_mul_(list(gradients.values()), factor)  # in one pass over all of them
        return norm

    def step(self, lr: float) -> None:
        """Update the masters at learning rate `lr`, and the model from them."""
        dtype = next(iter(self.parameters.values())).dtype
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"], group["dtype"] = lr, dtype
            optimizer.step()
        self.clear()
        self.write_back()

    def clear(self) -> None:
        """Forget the gathered gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters into the model."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything to continue bit by bit: master weights and moments, by parameter name."""
        return {f"master.{name}": master for name, master in self.masters.items()} | self.moments

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Take back what `state_tensors` gave, after `num_steps` updates."""
        for name, tensor in self.state_tensors().items():
            tensor.copy_(tensors[name])
        for state in self._optimizers[0].state.values():
            state["step"].fill_(num_steps)
        self.write_back()
