"""`tramontane upcycle`: a dense model into a mixture of experts that computes the same."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tramontane.cli.byte_bar import show_byte_bar
from tramontane.cli.notices import say
from tramontane.cli.side_files import find_side_files, load_model_tokenizer

if TYPE_CHECKING:
    from tramontane.checkpoint.intake import Checkpoint
    from tramontane.config import ModelConfig
    from tramontane.train.upcycle import UpcycleOptions

_HISTORY = "training.json"


def upcycle(
    dense: str,
    out: Path,
    /,
    *,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    layers: str = "all",
    router_init: Literal["normal", "zeros", "uniform"] = "normal",
    noise: float = 0.0,
    virtual_groups: int = 1,
    seed: int = 0,
) -> None:
    """Write a dense model as a mixture of experts, to be trained on; at first it answers the same.

    Each feed-forward network becomes copies of itself behind a new router. Both models are then run
    on fixed prompts in fp32, one layer at a time, and the largest change of a logit is printed.
    Example: tramontane upcycle dense moe && tramontane train run.toml --init-from moe

    Parameters
    ----------
    dense
        A folder or file in any layout, or the id of a model that has been pulled.
    out
        A new folder, in the layout of Hugging Face, or in ours if layers stay dense.
    num_experts
        Experts in each of the layers.
    num_experts_per_tok
        Experts that each token goes to.
    layers
        Those that get experts: all; every-2, that is 1, 3, 5, ...; last-4; or numbers such as
        0,2,5-7. If some stay dense the result is no Mixtral, and tramontane alone runs it.
    router_init
        normal or uniform, of deviation 0.02; with zeros all tokens begin at the first experts.
    noise
        Deviation of what is added to the weights of each copy, as a share of their own size: copies
        part sooner, and the start is no longer exact.
    virtual_groups
        Cut each network into so many shards, of which a token takes one copy each: experts are
        smaller, and there are more ways to combine them. Both numbers of experts are multiples.
    seed
        Of routers and noise.
    """
    from tramontane.checkpoint.intake import open_checkpoint
    from tramontane.errors import RequestError
    from tramontane.hub.cache import resolve_model
    from tramontane.train.upcycle import UpcycleOptions, plan_upcycled

    if out.exists():
        raise RequestError(f"{out} exists already; name a new one, or remove it first")
    options = UpcycleOptions(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        layers=layers,
        router_init=router_init,
        noise=noise,
        virtual_groups=virtual_groups,
        seed=seed,
    )
    checkpoint = open_checkpoint(resolve_model(dense))
    checkpoint.require_unquantized("upcycling")
    config = plan_upcycled(checkpoint.config, options)
    _write(checkpoint, out, config, options)
    before, after = (
        model.config.count_parameters() for model in (checkpoint, open_checkpoint(out))
    )
    say(
        f"wrote {out}: {before.total:,} parameters -> {after.total:,}, of which {after.active:,} "
        f"work on a token; tramontane train --init-from {out}"
    )
    change, largest = _measure_change(checkpoint, open_checkpoint(out))
    print(f"max |logits change| at step 0: {change:.1e} (logits up to {largest:.1f}, fp32)")


def _write(
    checkpoint: "Checkpoint", out: Path, config: "ModelConfig", options: "UpcycleOptions"
) -> None:
    from tramontane.checkpoint.parameters import StoredParameters
    from tramontane.checkpoint.writer import choose_table, write_hf
    from tramontane.engine.vocabulary import find_token_ids
    from tramontane.train.upcycle import UpcycledParameters

    parameters = StoredParameters(checkpoint.pairs)
    tokenizer = load_model_tokenizer(checkpoint)
    dtype, num_done = checkpoint.dtype, 0
    total = config.count_parameters().total * dtype.itemsize
    with show_byte_bar(f"{checkpoint.contents.path} -> {options.num_experts} experts") as on_bytes:

        def on_tensor(name: str, num_bytes: int) -> None:
            nonlocal num_done
            num_done += num_bytes
            on_bytes(num_done, max(total, num_done))

        write_hf(
            UpcycledParameters(parameters, checkpoint.config, options),
            config,
            out,
            dtype=dtype,
            tokenizer=tokenizer,
            token_ids=find_token_ids(checkpoint, tokenizer),
            extra_files=_add_stage(find_side_files(checkpoint), options),
            table=choose_table(config),
            on_tensor=on_tensor,
        )


def _add_stage(files: dict[str, bytes], options: "UpcycleOptions") -> dict[str, bytes]:
    """The side files, with this step in the model's history."""
    history = json.loads(files.get(_HISTORY, b'{"stages": []}'))
    stage = {"steps": 0, "tokens": 0, "upcycled": asdict(options)}
    history["stages"] = [*history.get("stages", []), stage]
    return files | {_HISTORY: json.dumps(history, indent=2).encode() + b"\n"}


def _measure_change(dense: "Checkpoint", sparse: "Checkpoint") -> tuple[float, float]:
    """The largest change of a logit, and the largest logit, on fixed prompts."""
    from tramontane.checkpoint.parameters import StoredParameters
    from tramontane.train.upcycle import compute_layered_logits, make_prompts

    prompts = make_prompts(dense.config.vocab_size)
    before, after = (
        compute_layered_logits(StoredParameters(model.pairs), model.config, prompts)
        for model in (dense, sparse)
    )
    return (after - before).abs().max().item(), before.abs().max().item()
