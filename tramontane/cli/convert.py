"""`tramontane convert`: a checkpoint into another layout, one tensor at a time."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tramontane.cli.byte_bar import show_byte_bar
from tramontane.cli.notices import say
from tramontane.hub.meter import OnBytes

if TYPE_CHECKING:
    from tramontane.checkpoint.intake import Checkpoint
    from tramontane.tokenizer.tokenizer import Tokenizer

# Beside the tokenizer's own files, what belongs to a model whatever its layout.
_KEPT_FILES = ("generation_config.json", "training.json")
_BYTES_PER_VALUE = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def convert(
    source: str,
    out: Path,
    /,
    *,
    to: Literal["hf", "mistral", "gguf"],
    type: Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"] | None = None,
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
    stored = type or _name_dtype(checkpoint)
    tokenizer = _load_tokenizer(checkpoint)
    count = checkpoint.config.count_parameters().total
    with show_byte_bar(f"{source} -> {to} {stored}") as on_bytes:
        _write(checkpoint, out, tokenizer, to=to, stored=stored, on_bytes=on_bytes)
    say(f"wrote {out}: {count:,} parameters as {stored}; tramontane run {out}")


def _write(
    checkpoint: "Checkpoint",
    out: Path,
    tokenizer: "Tokenizer | None",
    *,
    to: str,
    stored: str,
    on_bytes: OnBytes,
) -> None:
    import torch

    from tramontane.checkpoint.gguf_writer import write_gguf
    from tramontane.checkpoint.parameters import StoredParameters
    from tramontane.checkpoint.writer import write_hf, write_mistral
    from tramontane.engine.vocabulary import find_template
    from tramontane.tokenizer.chat_loading import GGUF_TEMPLATE_KEY, TEMPLATE_FILE
    from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf

    config, num_done = checkpoint.config, 0
    total = math.ceil(config.count_parameters().total * _BYTES_PER_VALUE[stored])

    def on_tensor(name: str, num_bytes: int) -> None:
        nonlocal num_done
        num_done += num_bytes
        on_bytes(num_done, max(total, num_done))

    parameters, template = StoredParameters(checkpoint.pairs), find_template(checkpoint)
    if to == "gguf":
        metadata = {} if tokenizer is None else describe_for_gguf(tokenizer)
        if template is not None:
            metadata[GGUF_TEMPLATE_KEY] = template
        write_gguf(parameters, config, out, encoding=stored, metadata=metadata, on_tensor=on_tensor)
        return
    extra_files = _read_kept_files(checkpoint)
    if template is not None:
        extra_files[TEMPLATE_FILE] = template.encode()
    write = write_hf if to == "hf" else write_mistral
    write(
        parameters,
        config,
        out,
        dtype=getattr(torch, _DTYPES[stored]),
        tokenizer=tokenizer,
        extra_files=extra_files,
        on_tensor=on_tensor,
    )


def _name_dtype(checkpoint: "Checkpoint") -> str:
    from tramontane.checkpoint.files.stored_tensor import DTYPE_NAMES

    return DTYPE_NAMES[checkpoint.dtype]


def _load_tokenizer(checkpoint: "Checkpoint") -> "Tokenizer | None":
    """The model's tokenizer, if there is one; a note if not."""
    from tramontane.engine.vocabulary import find_tokenizer

    tokenizer = find_tokenizer(checkpoint)
    if tokenizer is None:
        say(f"{checkpoint.contents.path} has no tokenizer: the copy has none either")
    return tokenizer


def _read_kept_files(checkpoint: "Checkpoint") -> dict[str, bytes]:
    folder = checkpoint.contents.folder
    return {n: (folder / n).read_bytes() for n in _KEPT_FILES if (folder / n).is_file()}
