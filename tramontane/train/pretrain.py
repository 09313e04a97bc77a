"""Pre-training: text files of several domains become a model in the Hugging Face layout.

OUT/tokenizer/   the vocabulary, learnt from the same mixture unless one is given
OUT/tokens/      the encoded text
OUT/model/       the model after the last step; training.json tells how it came to be
OUT/best/        the model with the lowest held-out score, if that is another one
OUT/router_health.html, OUT/tensorboard/   what log.jsonl says, as pictures
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tramontane.atomic import atomic_folder
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.writer import save_model
from tramontane.data.packing import PackedBatch, PackedStream
from tramontane.data.sampling import sample_documents
from tramontane.data.token_files import TokenFile, prepare_token_files
from tramontane.errors import CheckpointError, ConfigError
from tramontane.models.transformer import Transformer, build_model
from tramontane.nn.draws import seed_draws
from tramontane.nn.dropout import set_dropout
from tramontane.tokenizer.loading import load_tokenizer
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import train_tokenizer
from tramontane.train.checkpoint import RunFolder
from tramontane.train.estimate import (
    TrainingMemory,
    estimate_training_memory,
    require_memory,
)
from tramontane.train.flops import count_flops_per_token, measure_peak_flops
from tramontane.train.held_out import measure_held_out
from tramontane.train.initialization import initialize_weights
from tramontane.train.loop import Observer, Trainer
from tramontane.train.losses import compute_next_token_loss
from tramontane.train.optim import MasterOptimizer
from tramontane.train.pretrain_config import PretrainConfig, load_pretrain_config

HISTORY_FILE = "training.json"
TOKENIZER_SAMPLE_CHARS = 60_000_000
# What suits a small model that has not been aligned; a model's folder carries its defaults.
GENERATION_DEFAULTS = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 200}


def pretrain(
    config: PretrainConfig,
    observer: Observer,
    *,
    resume: bool = False,
    override: bool = False,
    sample: Callable[[Transformer, Tokenizer], str] | None = None,
    free_memory: int | None = None,
) -> Path | None:
    """Run or resume a pre-training; returns the model's folder, or None if it was interrupted.

    `free_memory` is how many bytes this process may still take, if that is known. Raises
    ConfigError, DataError, TrainingError, CapacityError; finished work stays on disk.
    """
    folder = RunFolder(config.out)
    device = _choose_device(config.device)
    dtype = _choose_dtype(config.dtype, device)
    if resume and not override:
        saved = load_pretrain_config(None, folder.read_config())  # what is new has its default
        folder.compare(asdict(saved), asdict(config))
    with folder.lock():
        if not resume:
            folder.start(asdict(config))
            _remove_tokenizer(folder)
        observer.on_note(f"configuration: {json.dumps(asdict(config))}")
        if device.type == "cuda":
            free_memory = torch.cuda.mem_get_info(device)[0]
        observer.on_note(require_memory(_estimate_memory(config, dtype), free_memory))
        tokenizer = _prepare_tokenizer(config, folder.path / "tokenizer", observer)
        stages = _read_stages(config.init_from)
        tokens = config.tokens_dir or folder.path / "tokens"
        files = prepare_token_files(config.parse_sources(), tokenizer, tokens)
        trainer = _build_trainer(config, folder, observer, files=files, device=device, dtype=dtype)
        if sample is not None:
            trainer.sample = lambda model: sample(model, tokenizer)
        if resume:
            trainer.resume()
            folder.write_config(asdict(config))
        if not trainer.run():
            observer.on_note(f"stopped after step {trainer.step}; go on with --resume")
            return None
        out = _export(config, trainer, tokenizer, folder.path / "model", stages=stages)
        if (folder.path / "best").exists():
            shutil.rmtree(folder.path / "best")  # of the run before it was made longer
        if (best := folder.find_best()) is not None and best.step != trainer.step:
            observer.on_note(f"step {best.step} had the best score: {best.score:.4f} bits per byte")
            trainer.go_to_best()
            _export(config, trainer, tokenizer, folder.path / "best", stages=stages)
        return out


def _estimate_memory(config: PretrainConfig, dtype: torch.dtype) -> TrainingMemory:
    return estimate_training_memory(
        config.model,
        rows=config.batch_size,
        seq_len=config.seq_len,
        bytes_per_value=dtype.itemsize,
        optimizer=config.optimizer.kind,
    )


def _remove_tokenizer(folder: RunFolder) -> None:
    """That of a run that ended before its first checkpoint: it may come from other text."""
    if (folder.path / "tokenizer").exists():
        shutil.rmtree(folder.path / "tokenizer")


def _prepare_tokenizer(config: PretrainConfig, folder: Path, observer: Observer) -> Tokenizer:
    """The tokenizer of the run: kept in its folder, so that a resumed run has the same one."""
    if not folder.exists():
        if (source := config.tokenizer or config.init_from) is not None:
            tokenizer = load_tokenizer(source)
        else:
            observer.on_note(f"learning a vocabulary of {config.model.vocab_size} tokens")
            texts = sample_documents(config.parse_sources(), max_chars=TOKENIZER_SAMPLE_CHARS)
            tokenizer = train_tokenizer(texts, vocab_size=config.model.vocab_size)
        with atomic_folder(folder) as temporary:
            tokenizer.save(temporary)
    tokenizer = load_tokenizer(folder)
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
    device: torch.device,
    dtype: torch.dtype,
) -> Trainer[PackedBatch]:
    train_files = {domain: f for (domain, split), f in files.items() if split == "train"}
    valid_files = {domain: f for (domain, split), f in files.items() if split == "valid"}
    weights = {source.domain: source.weight for source in config.parse_sources()}
    if config.init_from is not None:
        model = load_model(config.init_from, use_views=False)  # its weights will be written
    else:
        model = build_model(config.model)
        initialize_weights(model, seed=config.seed)
    seed_draws(model, config.seed)
    set_dropout(model, config.dropout)
    model.to(device)
    optimizer = MasterOptimizer(model, config.optimizer)
    model.to(dtype)
    total, active = (getattr(config.model.count_parameters(), k) for k in ("total", "active"))
    observer.on_note(
        f"{total:,} parameters, {active:,} of them active per token, {dtype} computation"
    )
    peak = config.peak_tflops and config.peak_tflops * 1e12
    peak = peak or measure_peak_flops(dtype, device)
    flops = count_flops_per_token(config.model, seq_len=config.seq_len)
    observer.on_note(f"MFU is of {peak / 1e12:.2f} TFLOP/s; {flops / 1e6:.1f} MFLOP per token")
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
        seconds_per_unit=flops / peak,
    )  # fmt: skip


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for an unusable device
        raise ConfigError(f"device is {name!r}, which torch cannot use: {error}") from None


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Without instructions for bfloat16 a processor takes up to four times as long as in fp32."""
    if name == "auto":
        names = ("avx512_bf16", "amx_bf16", "bf16")
        has_bf16 = device.type != "cpu" or any(map(torch.cpu.get_capabilities().get, names))
        name = "bfloat16" if has_bf16 else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _score(
    config: PretrainConfig, model: Transformer, files: dict[str, TokenFile]
) -> dict[str, float]:
    """Held-out bits per byte of each domain."""
    scores = measure_held_out(model, files, seq_len=config.seq_len, max_tokens=config.eval_tokens)
    return {domain: score.bits_per_byte for domain, score in scores.items()}


def _export(
    config: PretrainConfig,
    trainer: Trainer[PackedBatch],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    stages: list[Any],
) -> Path:
    """Write the model as it is now, or its mean with the start; `stages` are those before."""
    if config.init_from is not None and config.average_start > 0:
        _average(trainer.model, load_model(config.init_from), share=config.average_start)
        if trainer.evaluate is not None and config.loop.eval_every > 0:
            score = fmean(trainer.evaluate(trainer.model.eval()).values())
            trainer.observer.on_note(
                f"the mean with the model it began with, which has {config.average_start:.0%} in "
                f"it: {score:.4f} held-out bits per byte"
            )
    stages = [*stages, _describe_stage(config, trainer)]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    save_model(
        trainer.model,
        folder,
        tokenizer=tokenizer,
        dtype=torch.bfloat16,
        extra_files={
            "generation_config.json": json.dumps(ids | GENERATION_DEFAULTS, indent=2) + "\n",
            HISTORY_FILE: json.dumps({"stages": stages}, indent=2) + "\n",
        },
    )
    trainer.observer.on_note(f"saved the model to {folder}")
    return folder


@torch.no_grad()
def _average(model: Transformer, other: Transformer, *, share: float) -> None:
    """Move all weights of `model` by `share` towards those of `other`."""
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.lerp_(theirs[name].to(tensor), share)


def _read_stages(init_from: str | None) -> list[Any]:
    """How the model that this run began with came to be, as far as its folder tells."""
    path = Path(init_from or "", HISTORY_FILE)
    if init_from is None or not path.exists():
        return []
    try:
        stages: list[Any] = json.loads(path.read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}); remove it to go on without the model's history"
        ) from None
    return stages


def _describe_stage(config: PretrainConfig, trainer: Trainer[PackedBatch]) -> dict[str, Any]:
    return {
        "steps": trainer.step,
        "tokens": trainer.num_units_seen,
        "tokens_per_step": config.seq_len * config.batch_size * config.loop.accumulation,
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "seed": config.seed,
        "dropout": config.dropout,
        "average_start": config.average_start,
        "load_balancing_coef": config.loop.load_balancing_coef,
        "optimizer": asdict(config.optimizer),
        "sources": list(config.sources),
    }
