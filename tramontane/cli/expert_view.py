"""Which experts worked: tokens coloured by expert, and a picture of the load of each layer."""

import numpy as np

from tramontane.engine.completion import TextPiece
from tramontane.errors import RequestError

# Foreground codes of eight colours that differ on a dark and on a light background.
_COLORS = (31, 32, 33, 34, 35, 36, 90, 95)
_RESET = "\x1b[0m"
_BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BARS = " .:-=+*#@"
_MAX_EXPERTS_SPACED = 16


class ExpertPainter:
    """Marks each token with its first expert at one layer, by colour or as `[e3]text`.

    Without `layer`, the middle one. Raises RequestError if there is no such layer.
    """

    def __init__(
        self, layer: int | None, *, n_layers: int, num_experts: int, use_color: bool
    ) -> None:
        self._layer = n_layers // 2 if layer is None else layer
        if not 0 <= self._layer < n_layers:
            raise RequestError(
                f"--experts is {layer}; this model has the layers 0 to {n_layers - 1}"
            )
        self._num_experts = num_experts
        self._use_color = use_color

    def paint(self, piece: TextPiece) -> str:
        """The piece with its mark; the last token of an answer has no expert and stays plain."""
        expert = -1  # as where a router's capacity dropped a token
        if piece.selected_experts is not None:
            expert = int(piece.selected_experts[self._layer, 0])
        if expert < 0:
            return piece.text if self._use_color else f"[e-]{piece.text}"
        return self._mark(expert, piece.text)

    def build_legend(self) -> str:
        """One line that says what the marks mean."""
        if not self._use_color:
            return (
                f"[e3] before a token: its first expert at layer {self._layer} is 3; [e-]: not run"
            )
        names = " ".join(self._mark(e, str(e)) for e in range(self._num_experts))
        repeated = "; colours repeat" if self._num_experts > len(_COLORS) else ""
        return f"first expert of each token at layer {self._layer}: {names}{repeated}"

    def _mark(self, expert: int, text: str) -> str:
        if not self._use_color:
            return f"[e{expert}]{text}"
        return f"\x1b[{_COLORS[expert % len(_COLORS)]}m{text}{_RESET}"


def count_expert_load(selected_experts: np.ndarray, *, num_experts: int) -> np.ndarray:
    """Experts (T, L, K) of T tokens -> how many tokens each expert of each layer saw, (L, E).

    Slots of -1 were not used.
    """
    layers = selected_experts.transpose(1, 0, 2).reshape(selected_experts.shape[1], -1)
    return np.stack([np.bincount(layer[layer >= 0], minlength=num_experts) for layer in layers])


def draw_expert_load(load: np.ndarray, *, use_unicode: bool) -> str:
    """A bar for each expert (columns) of each layer (rows) of load (L, E); the highest is full."""
    share = load / np.maximum(1, load.sum(1, keepdims=True))
    bars = _BARS if use_unicode else _ASCII_BARS
    heights = np.ceil(share / max(share.max(), 1e-9) * (len(bars) - 1)).astype(int)
    is_spaced = load.shape[1] <= _MAX_EXPERTS_SPACED
    lines = [
        f"experts per layer, tallest bar {share.max():.0%} of a layer's choices, "
        f"even {1 / load.shape[1]:.1%}"
    ]
    if is_spaced:
        lines.append("          " + " ".join(f"{expert:<2}" for expert in range(load.shape[1])))
    for layer, row in enumerate(heights):
        cells = [bars[height] for height in row]
        picture = " ".join(cell * 2 for cell in cells) if is_spaced else "".join(cells)
        busiest = share[layer].argmax()
        lines.append(f"layer {layer:>2}  {picture}  most: {busiest} ({share[layer, busiest]:.0%})")
    return "\n".join(lines)
