"""`tramontane quantize`: a model with weights of few bits, one matrix at a time."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from tramontane.cli.byte_bar import show_byte_bar
from tramontane.cli.notices import say
from tramontane.cli.side_files import find_side_files, load_model_tokenizer
from tramontane.hub.meter import OnBytes

if TYPE_CHECKING:
    from torch import Tensor

    from tramontane.checkpoint.intake import Checkpoint
    from tramontane.checkpoint.quantized_plan import FolderPlan, Unit
    from tramontane.checkpoint.quantized_writer import QuantizedFolder
    from tramontane.quant.formats import QuantRecipe


def quantize(
    model: str,
    out: Path,
    /,
    *,
    bits: Literal[4, 8],
    group: Literal[32, 64, 128] = 32,
    asymmetric: Annotated[bool, Parameter(negative=())] = False,
    head: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write a model whose experts and attention have 4 or 8 bits per weight, for tramontane to run.

    Router, norms and embeddings stay in 16 bits. One matrix is in memory at a time; a run that was
    stopped goes on where it was when it is called again.

    Parameters
    ----------
    model
        A folder or file in any layout, or the id of a model that has been pulled.
    out
        A new folder.
    bits
        Of each weight, beside the scales.
    group
        Neighbouring weights that share a scale: fewer are more exact and larger.
    asymmetric
        Give each group a zero point of its own: more exact, 8 bits per group larger.
    head
        Quantise the output matrix too, in 8 bits.
    """
    from tramontane.checkpoint.intake import open_checkpoint
    from tramontane.checkpoint.quantized_writer import QuantizedFolder
    from tramontane.engine.vocabulary import find_token_ids
    from tramontane.errors import RequestError
    from tramontane.hub.cache import resolve_model
    from tramontane.quant.formats import QuantFormat, QuantRecipe

    if out.exists():
        raise RequestError(f"{out} exists already; name a new one, or remove it first")
    checkpoint = open_checkpoint(resolve_model(model))
    checkpoint.require_unquantized("quantize")
    format = QuantFormat(bits, group, not asymmetric)
    plan = _plan_folder(checkpoint, QuantRecipe.from_format(format, head=head))
    tokenizer = load_model_tokenizer(checkpoint)
    token_ids, files = find_token_ids(checkpoint, tokenizer), find_side_files(checkpoint)
    with QuantizedFolder(out, plan, origin=_describe_source(checkpoint)).open() as folder:
        if folder.num_finished:
            say(f"going on: {folder.num_finished} of {len(plan.units)} parts are there")
        try:
            with show_byte_bar(f"{model} -> {format.name}") as on_bytes:
                _write_units(checkpoint, folder, on_bytes)
        except KeyboardInterrupt:
            say(f"stopped with {folder.num_finished} of {len(plan.units)} parts; call again")
            raise
        folder.publish(tokenizer=tokenizer, token_ids=token_ids, extra_files=files)
    _report(checkpoint, folder, out)


def _plan_folder(checkpoint: "Checkpoint", recipe: "QuantRecipe") -> "FolderPlan":
    """What is plain stays in fp16 where most of the model is, and is bfloat16 otherwise."""
    import torch

    from tramontane.checkpoint.quantized_plan import FolderPlan
    from tramontane.checkpoint.writer import MAX_SHARD_BYTES

    dtype = torch.float16 if checkpoint.dtype == torch.float16 else torch.bfloat16
    return FolderPlan(checkpoint.config, recipe, dtype, MAX_SHARD_BYTES)


def _describe_source(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What must not have changed when a run goes on."""
    stats = {file.name: file.stat() for file in checkpoint.contents.files}
    return {
        "source": str(checkpoint.contents.path.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "fit": "round to nearest",
    }


def _write_units(checkpoint: "Checkpoint", folder: "QuantizedFolder", on_bytes: OnBytes) -> None:
    """Read, round and write what is not there yet."""
    from tramontane.checkpoint.parameters import StoredParameters

    parameters = StoredParameters(checkpoint.pairs)
    total, num_done = sum(unit.num_bytes for unit in folder.plan.units), 0
    for unit in folder.plan.units:
        if not folder.is_finished(unit):
            _write_unit(unit, parameters.read(unit.source, unit.expert), folder)
        num_done += unit.num_bytes
        on_bytes(num_done, total)


def _write_unit(unit: "Unit", values: "Tensor", folder: "QuantizedFolder") -> None:
    from tramontane.checkpoint.assembly import convert_values
    from tramontane.errors import CheckpointError, ConfigError
    from tramontane.quant.fitting import measure_relative_error, quantize_weight

    format = folder.plan.formats.get(unit.parameter)
    if format is None:
        plain = convert_values(values, folder.plan.find_dtype(unit.parameter), name=unit.key)
        folder.write(unit, {"": plain}, error=None)
        return
    try:
        packed = quantize_weight(values, format)
    except ConfigError as error:
        raise CheckpointError(f"{unit.key}: {error}; a damaged file?") from None
    folder.write(unit, packed._asdict(), error=measure_relative_error(values, packed))


def _report(checkpoint: "Checkpoint", folder: "QuantizedFolder", out: Path) -> None:
    before = sum(file.stat().st_size for file in checkpoint.contents.files)
    worst = max(folder.errors, key=folder.errors.__getitem__)
    mean = sum(folder.errors.values()) / len(folder.errors)
    num_bits = 8 * sum(unit.num_bytes for unit in folder.plan.units)
    bits = num_bits / checkpoint.config.count_parameters().total
    say(f"{before:,} bytes -> {folder.num_bytes:,} bytes, {bits:.2f} bits per weight")
    say(f"relative error of a matrix {mean:.4f} in the mean, {folder.errors[worst]:.4f} of {worst}")
    say(f"wrote {out}; tramontane run {out}")
