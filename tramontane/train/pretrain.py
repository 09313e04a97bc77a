"""Pre-training: text files of several domains become a model in the Hugging Face layout.

OUT/tokenizer/   the vocabulary, learnt from the same mixture unless one is given
OUT/tokens/      the encoded text
OUT/model/       the model after the last step
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tramontane.atomic import atomic_folder
from tramontane.checkpoint.writer import save_model
from tramontane.config import ModelConfig, build_config, get_preset, require_positive
from tramontane.data.packing import PackedBatch, PackedStream
from tramontane.data.sampling import sample_documents
from tramontane.data.sources import Source, parse_source
from tramontane.data.token_files import TokenFile, prepare_token_files
from tramontane.errors import ConfigError
from tramontane.models.transformer import Transformer, build_model
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import train_tokenizer
from tramontane.train.checkpoint import RunFolder
from tramontane.train.held_out import measure_held_out
from tramontane.train.loop import LoopConfig, Observer, Trainer
from tramontane.train.losses import compute_next_token_loss
from tramontane.train.optim import MasterAdamW, OptimizerConfig

TOKENIZER_SAMPLE_CHARS = 60_000_000
# What suits a small model that has not been aligned; a model's folder carries its defaults.
GENERATION_DEFAULTS = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 200}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that a pre-training run depends on; saved with it.

    `sources` are `[DOMAIN=]PATH[:WEIGHT]`, relative to `data_dir`. `tokenizer` is a folder with a
    tokenizer.json; without one, `vocab_size` tokens are learnt. `dtype` is that of the computation;
    the optimizer keeps fp32 weights.
    """

    out: str
    sources: tuple[str, ...]
    model: ModelConfig
    data_dir: str = "."
    tokenizer: str | None = None
    seq_len: int = 1024
    batch_size: int = 8  # rows of seq_len tokens
    seed: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eval_tokens: int = 8192  # per domain, at each evaluation
    loop: LoopConfig = field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        require_positive(self, "seq_len", "batch_size", "eval_tokens")
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype is {self.dtype!r}; choose bfloat16 or float32")
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
    vocab_size = values.pop("vocab_size", None)
    values["model"] = _build_model_config(values.get("model", {}), vocab_size)
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


def _build_model_config(values: dict[str, Any], vocab_size: int | None) -> ModelConfig:
    """`{"preset": name, ...}` with single fields changed, or all fields."""
    values = dict(values)
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    if "preset" in values:
        values = _merge(get_preset(values.pop("preset")).to_dict(), values)
    return ModelConfig.from_dict(values)


def pretrain(
    config: PretrainConfig,
    observer: Observer,
    *,
    resume: bool = False,
    override: bool = False,
    sample: Callable[[Transformer, Tokenizer], str] | None = None,
) -> Path | None:
    """Run or resume a pre-training; returns the model's folder, or None if it was interrupted.

    Raises ConfigError, DataError, TrainingError, CapacityError; finished work stays on disk.
    """
    folder = RunFolder(config.out)
    with folder.lock():
        if resume:
            folder.continue_with(asdict(config), override=override)
        else:
            folder.start(asdict(config))
        tokenizer = _prepare_tokenizer(config, folder.path / "tokenizer", observer)
        files = prepare_token_files(config.parse_sources(), tokenizer, folder.path / "tokens")
        trainer = _build_trainer(config, folder, observer, files=files)
        if sample is not None:
            trainer.sample = lambda model: sample(model, tokenizer)
        if resume:
            trainer.resume()
        if not trainer.run():
            observer.on_note(f"stopped after step {trainer.step}; go on with --resume")
            return None
        return _export(trainer, tokenizer, folder.path / "model")


def _prepare_tokenizer(config: PretrainConfig, folder: Path, observer: Observer) -> Tokenizer:
    """The tokenizer of the run: kept in its folder, so that a resumed run has the same one."""
    if not folder.exists():
        if config.tokenizer is not None:
            tokenizer = Tokenizer.from_folder(config.tokenizer)
        else:
            observer.on_note(f"learning a vocabulary of {config.model.vocab_size} tokens")
            texts = sample_documents(config.parse_sources(), max_chars=TOKENIZER_SAMPLE_CHARS)
            tokenizer = train_tokenizer(texts, vocab_size=config.model.vocab_size)
        with atomic_folder(folder) as temporary:
            tokenizer.save(temporary)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is "
            f"{config.model.vocab_size}; make them equal"
        )
    return tokenizer


def _build_trainer(
    config: PretrainConfig,
    folder: RunFolder,
    observer: Observer,
    *,
    files: dict[tuple[str, Any], TokenFile],
) -> Trainer[PackedBatch]:
    train_files = {domain: f for (domain, split), f in files.items() if split == "train"}
    valid_files = {domain: f for (domain, split), f in files.items() if split == "valid"}
    weights = {source.domain: source.weight for source in config.parse_sources()}
    model = build_model(config.model)
    initialize_weights(model, seed=config.seed)
    optimizer = MasterAdamW(model, config.optimizer)
    model.to(getattr(torch, config.dtype))
    total, active = (getattr(config.model.count_parameters(), k) for k in ("total", "active"))
    observer.on_note(f"{total:,} parameters, {active:,} of them active per token")
    return Trainer(
        model=model,
        optimizer=optimizer,
        source=PackedStream(
            train_files, weights,
            seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed,
        ),
        compute_loss=compute_next_token_loss,
        config=config.loop,
        folder=folder,
        observer=observer,
        evaluate=lambda model: _score(config, model, valid_files),
    )  # fmt: skip


def _score(
    config: PretrainConfig, model: Transformer, files: dict[str, TokenFile]
) -> dict[str, float]:
    """Held-out bits per byte of each domain."""
    scores = measure_held_out(model, files, seq_len=config.seq_len, max_tokens=config.eval_tokens)
    return {domain: score.bits_per_byte for domain, score in scores.items()}


@torch.no_grad()
def initialize_weights(model: Transformer, *, seed: int) -> None:
    """Normal weights of deviation 0.02; those that write to the residual stream / sqrt(2 layers).

    Source: GPT-2. Norms start at one. The generator is private, so nothing else shifts the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / (2 * model.config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        writes_to_residual = name.endswith(("attention.wo.weight", "w2", "w2.weight"))
        std = residual_std if writes_to_residual else 0.02
        nn.init.normal_(parameter, std=std, generator=generator)


def _export(trainer: Trainer[PackedBatch], tokenizer: Tokenizer, folder: Path) -> Path:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    generation = json.dumps(ids | GENERATION_DEFAULTS, indent=2) + "\n"
    save_model(
        trainer.model,
        folder,
        tokenizer=tokenizer,
        dtype=torch.bfloat16,
        extra_files={"generation_config.json": generation},
    )
    trainer.observer.on_note(f"saved the model to {folder}")
    return folder
