"""AdamW with fp32 master weights under a lower-precision model, and learning-rate schedules."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tramontane.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) and its schedule.

    `cosine` falls from `lr` to `lr * min_lr_ratio` over the whole run; `wsd` stays at `lr` and
    falls linearly over the last `decay_ratio` of the steps, so that a run can be lengthened.
    """

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


class MasterAdamW:
    """Keeps an fp32 copy of each parameter, updates that, and writes it back in the model's dtype.

    Gradients of several batches add up in fp32. Matrices decay; norms do not.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.masters = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()
        }
        decayed = [w for w in self.masters.values() if w.dim() > 1]
        plain = [w for w in self.masters.values() if w.dim() == 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )

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

        Raises TrainingError that names the first parameter whose gradient is not finite.
        """
        gradients = {n: w.grad for n, w in self.masters.items() if w.grad is not None}
        norm = torch.nn.utils.get_total_norm(gradients.values()).item() / num_units
        if not math.isfinite(norm):
            bad = [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
            self.clear()
            raise TrainingError(
                f"step {step}: the gradient of {bad[0] if bad else 'the model'} is not finite; the "
                "step was not applied. Lower the learning rate, or look at the data of this step"
            )
        factor = min(1.0, self.config.max_grad_norm / (norm + 1e-6)) / num_units
        torch._foreach_mul_(list(gradients.values()), factor)  # in one pass over all of them
        return norm

    def step(self, lr: float) -> None:
        """Update the masters at learning rate `lr`, and the model from them."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.clear()
        self.write_back()

    def clear(self) -> None:
        """Forget the gathered gradients."""
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters into the model."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything to continue bit by bit: master weights and both moments, by parameter name."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"master.{name}"] = master
            for moment in ("exp_avg", "exp_avg_sq"):
                state = self.adamw.state.get(master)
                tensors[f"{moment}.{name}"] = state[moment] if state else torch.zeros_like(master)
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Take back what `state_tensors` gave, after `num_steps` updates."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            self.adamw.state[master] = {
                "step": torch.tensor(float(num_steps)),
                "exp_avg": tensors[f"exp_avg.{name}"].to(master.device, copy=True),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device, copy=True),
            }
        self.write_back()
