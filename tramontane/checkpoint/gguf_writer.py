"""A model into one GGUF file that llama.cpp reads: configuration, vocabulary, tensors.

As llama.cpp's own converter does: norms and routers stay in fp32, the rows of queries and keys are
interleaved, experts are stacked. Embeddings and head of a Q4_0 file are Q8_0: they matter most.
"""

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tramontane.atomic import atomic_file
from tramontane.checkpoint.assembly import Assembly, convert_values
from tramontane.checkpoint.files.gguf_values import PACKINGS, load_gguf_library
from tramontane.checkpoint.files.stored_tensor import DTYPES
from tramontane.checkpoint.gguf import ARCHITECTURE, VOCABULARY, describe_for_gguf
from tramontane.checkpoint.names import GGUF
from tramontane.checkpoint.parameters import Parameters
from tramontane.checkpoint.writer import OnTensor
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError

ENCODINGS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # LLAMA_FTYPE of llama.h
_PACKING_OF_NAME = {packing.name: packing for packing in PACKINGS.values()}
_LARGEST_SCALE = 65504.0  # fp16's largest number: a block's scale is one
_STEPS = {"Q8_0": 127, "Q4_0": 8}  # that a block's largest value is away from zero


def write_gguf(
    parameters: Parameters,
    config: ModelConfig,
    path: Path | str,
    *,
    encoding: str,
    metadata: Mapping[str, Any] = {},
    on_tensor: OnTensor | None = None,
) -> None:
    """Write a GGUF whose matrices are in `encoding`; `metadata` describes the vocabulary.

    The file is whole or not there. Raises CheckpointError on an encoding that is not one of
    ENCODINGS, on a matrix whose rows do not fit its blocks, and on a vocabulary that has not a
    token for each row of the embeddings; CapacityError on a full disk.
    """
    if encoding not in ENCODINGS:
        raise CheckpointError(f"GGUF cannot be written as {encoding!r}; choose one of {ENCODINGS}")
    num_tokens = len(metadata.get(VOCABULARY, ())) or config.vocab_size
    if num_tokens != config.vocab_size:
        raise CheckpointError(
            f"{VOCABULARY} has {num_tokens} tokens, the embeddings {config.vocab_size} rows, which "
            "llama.cpp counts by the tokens; describe the vocabulary with num_rows="
        )
    library = load_gguf_library(path)
    assembly = Assembly(GGUF, config, parameters)
    shapes = assembly.list_shapes()
    encodings = {name: _choose_encoding(name, shape, encoding) for name, shape in shapes.items()}
    sizes = {name: _count_bytes(name, shapes[name], encodings[name]) for name in shapes}
    with (
        atomic_file(Path(path), bytes_needed=sum(sizes.values()) + 2**24) as new,
        closing(library.GGUFWriter(new, ARCHITECTURE)) as writer,
    ):
        writer.add_file_type(_FILE_TYPES[encoding])
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
        for key, value in (describe_for_gguf(config) | dict(metadata)).items():
            _add_value(writer, key, value)
        for name, shape in shapes.items():
            kind = library.GGMLQuantizationType[encodings[name]]
            packed = library.quants.quant_shape_to_byte_shape(shape, kind)
            is_plain = encodings[name] in ("F32", "F16")
            writer.add_tensor_info(
                name,
                shape if is_plain else packed,
                np.dtype({"F32": "f4", "F16": "f2"}.get(encodings[name], "u1")),
                sizes[name],
                raw_dtype=kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in shapes:
            writer.write_tensor_data(_encode(assembly, name, encodings[name], library))
            if on_tensor is not None:
                on_tensor(name, sizes[name])


def _choose_encoding(name: str, shape: tuple[int, ...], encoding: str) -> str:
    if len(shape) == 1 or name.endswith(GGUF.gate):
        return "F32"
    if encoding == "Q4_0" and name in (GGUF.tok_embeddings, GGUF.output):
        return "Q8_0"
    return encoding


def _count_bytes(name: str, shape: tuple[int, ...], encoding: str) -> int:
    packing = _PACKING_OF_NAME[encoding]
    if shape[-1] % packing.block_size:
        raise CheckpointError(
            f"{name} has rows of {shape[-1]} values, and {encoding} packs {packing.block_size} at "
            "a time; write F16 or BF16"
        )
    return prod(shape) // packing.block_size * packing.block_bytes


def _encode(assembly: Assembly, name: str, encoding: str, library: Any) -> np.ndarray:
    """The bytes of one tensor, as an array of its shape."""
    values = assembly.build(name)
    if encoding in DTYPES:
        converted = convert_values(values, DTYPES[encoding], name=name).contiguous()
        if encoding == "BF16":
            return converted.view(torch.uint8).numpy()
        return converted.numpy()
    kind = library.GGMLQuantizationType[encoding]
    quantize = partial(library.quants.quantize, qtype=kind)
    rows = values.reshape(-1, values.shape[-1])
    largest = float(values.abs().max())
    if largest > _STEPS[encoding] * _LARGEST_SCALE:
        raise CheckpointError(f"{name} has values beyond {encoding} ({largest:g}); write F32")
    parts = [quantize(part.float().numpy()) for part in rows.split(max(1, 2**22 // rows.shape[1]))]
    packed = np.concatenate(parts)
    return packed.reshape(*values.shape[:-1], packed.shape[-1])


def _add_value(writer: Any, key: str, value: Any) -> None:
    """Under the type that llama.cpp expects: counts as uint32, other numbers as float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
