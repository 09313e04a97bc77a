"""C06 for what stands beside the weights: configurations, the index, a GGUF's metadata.

A mutated folder either loads as a whole or is refused by an error of ours; nothing hangs.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.layouts import save_gguf, save_hf_sharded, save_mistral
from tests.tiny import make_config, make_model
from tramontane.checkpoint.gguf import describe_for_gguf, parse_gguf_config
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.summary import summarize
from tramontane.checkpoint.writer import save_model
from tramontane.config import MoeConfig
from tramontane.errors import CheckpointError, ConfigError
from tramontane.models.transformer import Transformer

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 9, 64, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x",
    "mixtral", "../x", "\ud800", [], [1], {}, {"a": 1}, [[]] * 3,
    "model-00001-of-00002.safetensors",
]  # fmt: skip
_ARRAYS = [np.array([1, 2]), np.array([8, 8], dtype="<u4"), np.array([]), np.array([True]), ["a"]]
_OTHER_KEYS = ["llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.scale",
               "llama.logit_scale", "llama.new", "tokenizer.ggml.tokens"]  # fmt: skip


def mutate(content: str, random: Random) -> bytes:
    """Some values, keys or bytes of a JSON object changed."""
    values: Any = json.loads(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        target = values
        while isinstance(target.get("weight_map", None), dict) and random.random() < 0.8:
            target = target["weight_map"]
        if isinstance(target.get("moe"), dict) and random.random() < 0.5:
            target = target["moe"]
        key = random.choice([*target, "sliding_window", "auto_map", "new"])
        kind = random.randrange(4)
        if kind == 0:
            target.pop(key, None)
        elif kind == 1:
            target[random.choice([*target, "weight_map"])] = target.pop(key, 1)
        else:
            target[key] = random.choice(_VALUES)
    encoded = bytearray(json.dumps(values).encode())
    if random.random() < 0.3:
        at = random.randrange(len(encoded))
        encoded[at : at + random.choice((0, 1, 5))] = random.randbytes(random.choice((1, 3)))
    return bytes(encoded)


def save_ours(model: Transformer, folder: Path) -> Path:
    """A model of the same size that is no Mixtral."""
    moe = MoeConfig(8, 2, router="st_moe", residual=True, layer_experts=(4, 8))
    save_model(make_model(replace(model.config, moe=moe)), folder, dtype=torch.float32)
    return folder


SAVERS: dict[str, tuple[Callable[..., Path], str]] = {
    "config.json": (save_hf_sharded, "config.json"),
    "index": (save_hf_sharded, "model.safetensors.index.json"),
    "params.json": (save_mistral, "params.json"),
    "config.json, ours": (save_ours, "config.json"),
}


def fuzz(folder: Path, file: str, *, count: int) -> tuple[int, set[str]]:
    """How many were accepted, and the beginnings of the messages."""
    random, kinds, accepted = Random(3), set(), 0
    content = (folder / file).read_text()
    for number in range(count):
        mutated = mutate(content, random)
        (folder / file).write_bytes(mutated)
        try:
            load_model(folder, check_finite=False)
            accepted += 1
        except (CheckpointError, ConfigError) as error:
            kinds.add("".join(c for c in str(error) if c.isalpha())[-30:])
        except Exception as error:
            error.add_note(f"{file}, mutation {number}: {mutated[:600]!r}")
            raise
    return accepted, kinds


@pytest.mark.parametrize(("save", "file"), SAVERS.values(), ids=SAVERS.keys())
def test_c06_side_files(tmp_path: Path, save: Any, file: str) -> None:
    accepted, kinds = fuzz(save(make_model(), tmp_path / "m"), file, count=250)
    assert accepted > 0
    assert len(kinds) > (10 if file.endswith("index.json") else 20), kinds


@pytest.mark.slow
@pytest.mark.parametrize(("save", "file"), SAVERS.values(), ids=SAVERS.keys())
def test_c06_ten_thousand_side_files(tmp_path: Path, save: Any, file: str) -> None:
    fuzz(save(make_model(), tmp_path / "m"), file, count=10_000)


def test_c06_metadata_of_a_gguf() -> None:
    good = describe_for_gguf(make_config()) | {"general.architecture": "llama"}
    random, refused = Random(5), set()
    for number in range(3000):
        metadata = dict(good)
        for _ in range(random.choice((1, 2))):
            metadata[random.choice([*good, *_OTHER_KEYS])] = random.choice([*_VALUES, *_ARRAYS])
        try:
            parse_gguf_config(metadata, has_output=True)
        except ConfigError as error:
            refused.add("".join(c for c in str(error) if c.isalpha())[:30])
        except Exception as error:
            error.add_note(f"mutation {number}: {metadata}")
            raise
    assert len(refused) > 20, refused


def test_c32_a_billion_experts_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    """C32: stacked experts have no names of their own; the router tells how many there are."""
    folder = save_mistral(make_model(), tmp_path / "m")
    params = json.loads((folder / "params.json").read_text())
    moe = {"num_experts": 10**9, "num_experts_per_tok": 2}
    for field, value in (("n_layers", 10**9), ("moe", moe)):
        (folder / "params.json").write_text(json.dumps(params | {field: value}))
        with pytest.raises(CheckpointError, match=r"is 1000000000, the tensors have [28]"):
            load_model(folder)
    path = save_gguf(make_model(), tmp_path / "g")
    assert summarize(str(path)).problems == ()
