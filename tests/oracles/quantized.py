"""Packed weights as docs/quantization.md describes them: each value by its indices."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from tramontane.kernels.packing import PackedWeight
from tramontane.models.transformer import Transformer, build_model
from tramontane.nn.experts import GroupedExperts
from tramontane.nn.router import Routing
from tramontane.quant.modules import PackedMatrix


def read_values(weight: PackedWeight) -> np.ndarray:
    """(N, K) in fp32 of one matrix, (E, N, K) of a stack."""
    if weight.qweight.ndim == 5:
        count = len(weight.qweight)
        return np.stack([read_values(weight.select(expert)) for expert in range(count)])
    row, column = np.indices((weight.out_features, weight.in_features))
    block, lane, group = row // 16, row % 16, column // weight.group_size
    if weight.bits == 8:
        q = weight.qweight.numpy()[block, column // 4, lane, column % 4]
    else:
        byte = weight.qweight.numpy()[block, column // 8, lane, column % 4]
        q = np.where(column % 8 >= 4, byte >> 4, byte & 15)
    zero = 128 if weight.bits == 8 else 8
    if weight.zeros is not None:
        zero = weight.zeros.numpy()[block, group, lane].astype(np.int64)
    steps = (q.astype(np.int64) - zero).astype(np.float32)
    return weight.scales.numpy()[block, group, lane].astype(np.float32) * steps


def round_activations(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each group of each row to the nearest of 255 steps, in fp32."""
    rounded = np.empty(x.shape, dtype=np.float32)
    for row, values in enumerate(x.float().numpy()):
        for begin in range(0, len(values), group_size):
            group = values[begin : begin + group_size]
            scale = np.abs(group).max() / np.float32(127)
            steps = np.rint(group / scale) if scale else np.zeros_like(group)
            rounded[row, begin : begin + group_size] = steps * scale
    return torch.from_numpy(rounded)


def dequantize_model(model: Transformer, *, rounds: bool = False) -> Transformer:
    """A plain fp32 model with the values of a quantised one.

    With `rounds` its layers round what they multiply, as the quantised ones do.
    """
    plain = build_model(replace(model.config, tie_embeddings=False)).eval()
    state = plain.state_dict()
    values = {name: tensor.float() for name, tensor in model.state_dict().items() if name in state}
    groups = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            key = f"{name}.weight" if f"{name}.weight" in state else name
            values[key] = torch.from_numpy(read_values(module.packed))
            groups[name] = module.format.group_size
    plain.load_state_dict(values)
    for name, module in list(plain.named_modules()) if rounds else []:
        if name in groups:
            module.register_forward_pre_hook(_RoundInput(groups[name]))
        if f"{name}.w1" in groups and isinstance(module, GroupedExperts):
            plain.get_submodule(name.rpartition(".")[0]).experts = _RoundingExperts(
                module, [groups[f"{name}.{w}"] for w in ("w1", "w2", "w3")]
            )
    return plain


class _RoundInput:
    """A hook before a layer."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (round_activations(inputs[0], self._group_size),)


class _RoundingExperts(nn.Module):
    """One token and one slot at a time."""

    def __init__(self, experts: GroupedExperts, group_sizes: list[int]) -> None:
        super().__init__()
        self._weights = [w.detach() for w in (experts.w1, experts.w2, experts.w3)]
        self._group_sizes = group_sizes

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        y = torch.zeros_like(x)
        for token, chosen in enumerate(routing.experts.tolist()):
            for slot, expert in enumerate(chosen):
                one, two, three = (weight[expert] for weight in self._weights)
                gate = self._round(x[token], 0) @ one.t()
                hidden = gate * torch.sigmoid(gate) * (self._round(x[token], 2) @ three.t())
                y[token] += routing.weights[token, slot] * (self._round(hidden, 1) @ two.t())
        return y

    def _round(self, values: torch.Tensor, matrix: int) -> torch.Tensor:
        return round_activations(values[None], self._group_sizes[matrix])[0]
