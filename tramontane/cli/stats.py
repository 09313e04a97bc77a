"""What `--stats` and `/stats` say about an answer."""

import sys

from tramontane.cli.expert_view import count_expert_load, draw_expert_load
from tramontane.cli.machine import format_bytes, read_peak_memory
from tramontane.cli.notices import say
from tramontane.config import ModelConfig
from tramontane.engine.completion import Completion
from tramontane.engine.generation_config import GenerationConfig
from tramontane.engine.sampling_params import PARAM_NAMES, SamplingParams

_ENDINGS = {
    "stop": "ended by itself",
    "length": "cut at max_tokens or a full context",
    "abort": "stopped",
}


def print_stats(completion: Completion, config: ModelConfig) -> None:
    """Say on standard error how an answer of this model went."""
    text = format_stats(
        completion,
        num_experts=config.moe.num_experts if config.moe else 0,
        peak_bytes=read_peak_memory(),
        use_unicode=(sys.stderr.encoding or "").lower().startswith("utf"),
    )
    say(text)


def format_stats(
    completion: Completion, *, num_experts: int, peak_bytes: int, use_unicode: bool
) -> str:
    """Speed, memory, and the experts' load where routing was collected; several lines."""
    lines = [
        f"prompt       {completion.num_prompt_tokens} tokens, time to first token "
        f"{completion.timings.time_to_first_token:.3f} s "
        f"({completion.prefill_tokens_per_second:.1f} tokens/s)",
        f"answer       {completion.num_completion_tokens} tokens, "
        f"{completion.decode_tokens_per_second:.1f} tokens/s, {_ENDINGS[completion.finish_reason]}",
        f"peak memory  {format_bytes(peak_bytes)}",
    ]
    if completion.selected_experts is not None:
        load = count_expert_load(completion.selected_experts, num_experts=num_experts)
        lines.append(draw_expert_load(load, use_unicode=use_unicode))
    return "\n".join(lines)


def format_params(params: SamplingParams) -> str:
    """Every setting with its value, in one line."""
    return ", ".join(f"{name} {_format_value(getattr(params, name))}" for name in PARAM_NAMES)


def format_overrides(config: GenerationConfig) -> str:
    """Which defaults the model's folder changes; empty if none."""
    if not config.overrides:
        return ""
    changes = ", ".join(f"{name} {value}" for name, value in config.overrides.items())
    return f"defaults     {changes} (from the model's generation_config.json)"


def _format_value(value: object) -> str:
    if value is None or value == ():
        return "none"
    return " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
