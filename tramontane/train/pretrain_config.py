"""What a pre-training run is asked for: a TOML file, flags, or both."""

import math
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tramontane.checkpoint.loader import load_config
from tramontane.config import ModelConfig, build_config, get_preset, require_positive
from tramontane.data.sources import Source, parse_source
from tramontane.errors import ConfigError
from tramontane.train.loop import LoopConfig
from tramontane.train.optim import OptimizerConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that a pre-training run depends on; saved with it.

    `sources` are `[DOMAIN=]PATH[:WEIGHT]`, relative to `data_dir`. `tokenizer` is a folder with a
    tokenizer.json; without one, `vocab_size` tokens are learnt. `dtype` is that of the computation
    (auto: bfloat16 where the device has instructions for it);
    the optimizer keeps fp32 weights. `dropout` is the share of values that each part of a layer
    loses on its way to the residual stream, against learning by heart a text that is seen many
    times. `init_from` is the folder of a model to go on from, with its tokenizer; without it the
    weights are random. `average_start` is the weight of that model in the finished one, which is
    the mean of both (arXiv:2109.01903). `tokens_dir` keeps the encoded text, so that several runs
    share it; by default OUT/tokens. `peak_tflops` is what the machine can do, for the MFU; by
    default torch's own product is measured.
    """

    out: str
    sources: tuple[str, ...]
    model: ModelConfig
    data_dir: str = "."
    init_from: str | None = None
    tokenizer: str | None = None
    seq_len: int = 1024
    batch_size: int = 8  # rows of seq_len tokens
    seed: int = 1
    dropout: float = 0.0
    average_start: float = 0.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "auto"  # a GPU where there is one
    eval_tokens: int = 8192  # per domain, at each evaluation
    tokens_dir: str | None = None
    peak_tflops: float | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        require_positive(self, "seq_len", "batch_size", "eval_tokens")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if not 0 <= self.average_start < 1:
            raise ConfigError(
                f"average_start is {self.average_start}; it must be at least 0 and below 1"
            )
        if self.average_start > 0 and self.init_from is None:
            raise ConfigError(
                f"average_start is {self.average_start}, but the run begins with random weights; "
                "name the model to go on from, init_from"
            )
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ConfigError(f"dtype is {self.dtype!r}; choose auto, bfloat16 or float32")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ConfigError(f"peak_tflops is {self.peak_tflops}; it must be above zero")
        if self.seq_len > self.model.max_seq_len:
            raise ConfigError(
                f"seq_len is {self.seq_len}, above the model's max_seq_len {self.model.max_seq_len}"
            )

    def parse_sources(self) -> list[Source]:
        """The sources, with paths from the working directory."""
        parsed = [parse_source(spec) for spec in self.sources]
        return [replace(s, path=str(Path(self.data_dir) / s.path)) for s in parsed]


def load_pretrain_config(path: Path | None, changes: dict[str, Any]) -> PretrainConfig:
    """Read a TOML file, if any, and lay `changes` ({"optimizer": {"lr": 1e-3}, ...}) over it.

    `vocab_size` may stand at the top, where it becomes the model's. Raises ConfigError.
    """
    values = _merge(_read_toml(path) if path else {}, changes)
    for table in ("model", "loop", "optimizer"):
        if not isinstance(values.get(table, {}), dict):
            raise ConfigError(f"{table} is {values[table]!r}; write a table, [{table}]")
    if not isinstance(values.get("sources", []), list | tuple):
        raise ConfigError(f"sources is {values['sources']!r}; write a list of texts")
    vocab_size = values.pop("vocab_size", None)
    values["model"] = _choose_model_config(
        values.get("model", {}), vocab_size, init_from=values.get("init_from")
    )
    values["loop"] = build_config(LoopConfig, values.get("loop", {}), where="[loop]")
    optimizer = dict(values.get("optimizer", {}))
    if "betas" in optimizer:
        optimizer["betas"] = tuple(optimizer["betas"])
    values["optimizer"] = build_config(OptimizerConfig, optimizer, where="[optimizer]")
    values["sources"] = tuple(values.get("sources", ()))
    config: PretrainConfig = build_config(PretrainConfig, values, where=str(path or "the flags"))
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a TOML file, see recipes/") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _choose_model_config(
    values: dict[str, Any], vocab_size: int | None, *, init_from: str | None
) -> ModelConfig:
    """What is written, or what the model to go on from has; both, if they agree."""
    if init_from is None:
        return _build_model_config(values, vocab_size)
    found = load_config(init_from)
    if values and (asked := _build_model_config(values, vocab_size)) != found:
        theirs, ours = found.to_dict(), asked.to_dict()
        changes = [f"{k}: {theirs[k]!r} -> {ours[k]!r}" for k in ours if theirs[k] != ours[k]]
        raise ConfigError(
            f"the model in {init_from} is not the one asked for ({'; '.join(changes)}); leave out "
            "the model's settings, or init_from"
        )
    return found


def _build_model_config(values: dict[str, Any], vocab_size: int | None) -> ModelConfig:
    """`{"preset": name, ...}` with single fields changed, or all fields."""
    values = dict(values)
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    if "preset" in values:
        values = _merge(get_preset(values.pop("preset")).to_dict(), values)
    return ModelConfig.from_dict(values)
