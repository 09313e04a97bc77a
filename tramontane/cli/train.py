"""`tramontane train`: pre-train a model on text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from tramontane.errors import ConfigError

if TYPE_CHECKING:
    from tramontane.models.transformer import Transformer
    from tramontane.tokenizer.tokenizer import Tokenizer


def train(
    config: Path | None = None,
    /,
    *,
    source: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    data_dir: Path | None = None,
    out: Path | None = None,
    model: str | None = None,
    init_from: Path | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    steps: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    accumulation: int | None = None,
    optimizer: Literal["adamw", "muon"] | None = None,
    lr: float | None = None,
    warmup_steps: int | None = None,
    schedule: Literal["cosine", "wsd"] | None = None,
    decay_ratio: float | None = None,
    load_balancing_coef: float | None = None,
    dropout: float | None = None,
    average_start: float | None = None,
    dtype: Literal["auto", "bfloat16", "float32"] | None = None,
    device: str | None = None,
    seed: int | None = None,
    eval_every: int | None = None,
    sample_every: int | None = None,
    save_every: int | None = None,
    keep_checkpoints: int | None = None,
    tokens_dir: Path | None = None,
    peak_tflops: float | None = None,
    threads: int | None = None,
    resume: bool = False,
    override: bool = False,
) -> None:
    """Train a model on text, from a TOML file, from flags, or both (flags win).

    Example: tramontane train --source book.txt --model tramontane-23m --out runs/book

    Parameters
    ----------
    config
        TOML file, such as recipes/pretrain/stage1.toml; it can hold more than the flags.
    source
        Text files as [DOMAIN=]PATH[:WEIGHT]: .jsonl, .txt, .jsonl.gz or .txt.gz. Weights are shares
        of the tokens. Records whose "split" is "valid" are held out.
    data_dir
        Folder that source paths are relative to.
    out
        Folder of the run: tokenizer, checkpoints, log, and the finished model.
    model
        A preset, such as tramontane-23m.
    init_from
        Folder of a model to go on from, with its tokenizer; the optimizer begins anew.
    tokenizer
        Folder with a tokenizer.json; without it a vocabulary is learnt from the sources.
    vocab_size
        Tokens in the vocabulary.
    steps
        Updates of the weights.
    seq_len
        Tokens per row; documents share rows but do not see each other.
    batch_size
        Rows per batch.
    accumulation
        Batches per step.
    optimizer
        adamw, or muon for the matrices of attention and experts.
    lr
        Highest learning rate.
    warmup_steps
        Steps over which the learning rate rises.
    schedule
        cosine, or wsd: constant, with a linear fall over the last decay-ratio of the steps.
    decay_ratio
        Share of the steps that wsd falls over.
    load_balancing_coef
        Weight of the loss that keeps experts evenly used.
    dropout
        Share of the values that are dropped in training; 0.1 for text that is seen many times.
    average_start
        With init-from: weight of that model in the finished one, which is the mean of both.
    dtype
        Of the computation; master weights are always fp32. auto: bfloat16 where the processor has
        instructions for it.
    device
        auto, cpu, cuda, cuda:1, ...
    seed
        Of the weights and of the order of documents.
    eval_every
        Steps between held-out scores (bits per byte); 0 for none.
    sample_every
        Steps between samples of text; 0 for none.
    save_every
        Steps between checkpoints; 0 for one at the end.
    keep_checkpoints
        How many of them stay, beside the one with the best held-out score.
    tokens_dir
        Where the encoded text is kept, for several runs to share; by default in OUT.
    peak_tflops
        What the machine can do in this dtype, for the MFU; by default measured.
    threads
        CPU threads; by default all cores.
    resume
        Go on from the newest checkpoint in OUT.
    override
        With resume: accept a configuration that differs from that of the run.
    """
    import torch

    from tramontane.cli.machine import read_memory
    from tramontane.train.memory import keep_compiled_products, keep_freed_memory
    from tramontane.train.pretrain import pretrain
    from tramontane.train.pretrain_config import load_pretrain_config
    from tramontane.train.progress import ProgressPrinter

    flags: dict[str, Any] = {
        "sources": source, "data_dir": data_dir, "out": out, "init_from": init_from,
        "tokenizer": tokenizer, "vocab_size": vocab_size, "seq_len": seq_len,
        "batch_size": batch_size, "dtype": dtype, "device": device, "seed": seed,
        "dropout": dropout, "average_start": average_start, "tokens_dir": tokens_dir,
        "peak_tflops": peak_tflops,
        "model": {"preset": model},
        "loop": {
            "num_steps": steps, "accumulation": accumulation, "eval_every": eval_every,
            "sample_every": sample_every, "save_every": save_every,
            "load_balancing_coef": load_balancing_coef, "keep_checkpoints": keep_checkpoints,
        },
        "optimizer": {
            "kind": optimizer, "lr": lr, "warmup_steps": warmup_steps, "schedule": schedule,
            "decay_ratio": decay_ratio,
        },
    }  # fmt: skip
    resolved = load_pretrain_config(config, _drop_unset(flags))
    keep_freed_memory()
    keep_compiled_products()
    if threads is not None:
        torch.set_num_threads(threads)
    with ProgressPrinter(print_every=resolved.loop.log_every) as printer:
        done = pretrain(
            resolved,
            printer,
            resume=resume,
            override=override,
            sample=_write_sample,
            free_memory=read_memory()["free_bytes"],
        )
    if done is None:
        raise KeyboardInterrupt  # stopped and saved: the exit code says so


def _write_sample(model: "Transformer", tokenizer: "Tokenizer") -> str:
    """What the model makes of the beginning of a story; the same seed at each call.

    Or why it makes nothing of it: training goes on.
    """
    from tramontane.engine.llm import LLM
    from tramontane.engine.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=80, temperature=0.7, seed=0)
    try:
        return LLM.from_parts(model, tokenizer).generate("Once upon a time", params).text
    except ConfigError as error:
        return f"none ({error})"


def _drop_unset(flags: dict[str, Any]) -> dict[str, Any]:
    """Only what the user gave, with paths as text."""
    given: dict[str, Any] = {}
    for key, value in flags.items():
        if isinstance(value, dict):
            value = _drop_unset(value)
        if value is None or value == {}:
            continue
        given[key] = str(value) if isinstance(value, Path) else value
    return given
