"""`tramontane convert`: a checkpoint into another layout, one tensor at a time."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from tramontane.cli.byte_bar import show_byte_bar
from tramontane.cli.notices import say
from tramontane.cli.side_files import find_side_files, load_model_tokenizer
from tramontane.hub.meter import OnBytes

if TYPE_CHECKING:
    from tramontane.checkpoint.intake import Checkpoint
    from tramontane.tokenizer.tokenizer import Tokenizer

_BYTES_PER_VALUE = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPE = Parameter(converter=lambda _, tokens: _parse_type(tokens[0].value))


def convert(
    source: str,
    out: Path,
    /,
    *,
    to: Literal["hf", "mistral", "gguf"],
    type: Annotated[Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"] | None, _TYPE] = None,
) -> None:
    """Write a model in another layout, with its tokenizer. Memory: that of its largest tensor.

    Parameters
    ----------
    source
        A folder or file in any layout, or the id of a model that has been pulled.
    out
        A new folder; for gguf the file to write.
    to
        hf: what transformers reads. mistral: params.json and consolidated.safetensors. gguf: one
        file for llama.cpp.
    type
        How weights are stored; by default as they are, and BF16 where they are packed. Q8_0 and
        Q4_0 for gguf alone.
    """
    from tramontane.checkpoint.intake import open_checkpoint
    from tramontane.errors import RequestError
    from tramontane.hub.cache import resolve_model

    if to != "gguf" and type is not None and type not in _DTYPES:
        raise RequestError(f"--type {type} is for --to gguf; {to} holds {', '.join(_DTYPES)}")
    if out.exists():
        raise RequestError(f"{out} exists already; name a new one, or remove it first")
    checkpoint = open_checkpoint(resolve_model(source))
    checkpoint.require_unquantized("convert")
    stored = type or _name_dtype(checkpoint)
    tokenizer = load_model_tokenizer(checkpoint)
    files = find_side_files(checkpoint)
    count = checkpoint.config.count_parameters().total
    with show_byte_bar(f"{source} -> {to} {stored}") as on_bytes:
        lost = _write(checkpoint, out, tokenizer, files, to=to, stored=stored, on_bytes=on_bytes)
    if lost:
        say(f"not kept, as {to} has no place for it: {', '.join(lost)}")
    say(f"wrote {out}: {count:,} parameters as {stored}; tramontane run {out}")


def _write(
    checkpoint: "Checkpoint",
    out: Path,
    tokenizer: "Tokenizer | None",
    files: dict[str, bytes],
    *,
    to: str,
    stored: str,
    on_bytes: OnBytes,
) -> list[str]:
    """Write the model; what of it is lost."""
    import torch

    from tramontane.checkpoint.gguf_writer import write_gguf
    from tramontane.checkpoint.parameters import StoredParameters
    from tramontane.checkpoint.writer import write_hf, write_mistral
    from tramontane.engine.companions import describe_companions, list_lost_in_folder
    from tramontane.engine.generation_config import FILE_NAME
    from tramontane.engine.vocabulary import find_token_ids

    config, num_done = checkpoint.config, 0
    total = math.ceil(config.count_parameters().total * _BYTES_PER_VALUE[stored])

    def on_tensor(name: str, num_bytes: int) -> None:
        nonlocal num_done
        num_done += num_bytes
        on_bytes(num_done, max(total, num_done))

    parameters = StoredParameters(checkpoint.pairs)
    if to == "gguf":
        metadata, lost = describe_companions(checkpoint, tokenizer)
        write_gguf(parameters, config, out, encoding=stored, metadata=metadata, on_tensor=on_tensor)
        return lost
    lost = list_lost_in_folder(checkpoint, tokenizer)
    dtype = getattr(torch, _DTYPES[stored])
    token_ids = find_token_ids(checkpoint, tokenizer)
    if to == "hf":
        write_hf(parameters, config, out, dtype=dtype, tokenizer=tokenizer, token_ids=token_ids,
                 extra_files=files, on_tensor=on_tensor)  # fmt: skip
        return lost
    if token_ids:  # params.json has no place for them
        files = {FILE_NAME: json.dumps(token_ids, indent=2).encode() + b"\n"} | files
    write_mistral(parameters, config, out, dtype=dtype, tokenizer=tokenizer,
                  extra_files=files, on_tensor=on_tensor)  # fmt: skip
    return lost


def _parse_type(value: str) -> str:
    if value.upper() not in _BYTES_PER_VALUE:
        raise ValueError(f"it must be one of {', '.join(_BYTES_PER_VALUE)}")
    return value.upper()


def _name_dtype(checkpoint: "Checkpoint") -> str:
    from tramontane.checkpoint.files.stored_tensor import DTYPE_NAMES

    return DTYPE_NAMES[checkpoint.dtype]
