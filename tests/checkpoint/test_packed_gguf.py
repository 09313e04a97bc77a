"""GGUF's Q4_0 and Q8_0 run as they are packed: exactly the file's values, in the kernels' order."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bounds import measure_error
from tests.checkpoint.layouts import list_tensors, save_gguf
from tests.oracles.quantized import dequantize_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane.checkpoint.files import gguf_values
from tramontane.checkpoint.gguf import describe_for_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.name_table import NameTable
from tramontane.checkpoint.names import GGUF, GGUF_EACH
from tramontane.config import MoeConfig
from tramontane.engine.loading import load_for_running
from tramontane.errors import CheckpointError
from tramontane.kernels.packing import dequantize
from tramontane.models.transformer import Transformer
from tramontane.quant.formats import QuantFormat
from tramontane.quant.modules import PackedMatrix

FORMATS = {"Q4_0": QuantFormat(4), "Q8_0": QuantFormat(8)}
ENCODINGS = pytest.mark.parametrize("encoding", FORMATS)
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"moe": MoeConfig(3, 3)},  # all experts work: rounding cannot choose others
    "mistral": {"moe": None},
    "tied": {"moe": None, "tie_embeddings": True},
    "odd rows": {"moe": None, "vocab_size": 131, "n_heads": 6, "n_kv_heads": 3, "head_dim": 32},
}
_ROUNDING = 0.04  # of logits, relative to the largest: what 8 bits of the activations cost


def make(kind: str = "mixtral") -> Transformer:
    model = make_model(make_config(**KINDS[kind]))
    if model.config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


def save_mixed(model: Transformer, path: Path, encodings: dict[str, str], table: NameTable) -> Path:
    """A GGUF as others write them: each tensor whose name contains a key in that encoding."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in describe_for_gguf(model.config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, tensor in list_tensors(model, table).items():
        values = tensor.detach().float().numpy()
        found = [encoding for part, encoding in encodings.items() if part in name]
        if found and tensor.ndim > 1:
            kind = gguf.GGMLQuantizationType[found[0]]
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path, **options: Any) -> Transformer:
    return load_for_running(open_checkpoint(path), **options)


def list_packed(model: Transformer) -> dict[str, PackedMatrix]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedMatrix)}


@torch.no_grad()
def compute_logits(model: Transformer) -> Tensor:
    tokens = make_tokens(24)
    return model.compute_logits(model.forward_packed(tokens, [15, 9]).hidden)


def assert_same_values(packed: Transformer, plain: Transformer) -> None:
    """What is packed equals, to the bit, what the gguf library makes of the file."""
    state = plain.state_dict()
    for name, module in list_packed(packed).items():
        expected = state.get(f"{name}.weight", state.get(name))
        assert torch.equal(dequantize(module.packed), expected), name
    for name, value in packed.state_dict().items():
        if name in state:
            assert torch.equal(value, state[name]), name


@ENCODINGS
@pytest.mark.parametrize("kind", KINDS)
def test_packed_values_are_exactly_those_of_the_file(
    tmp_path: Path, kind: str, encoding: str
) -> None:
    """RoPE's order of rows included: every value where the dequantised load has it."""
    path = save_gguf(make(kind), tmp_path / "m", encoding=encoding)
    packed, plain = load(path, dtype=torch.float32), load_model(path, dtype=torch.float32)
    modules = list_packed(packed)
    num_matrices = 2 * (4 + 3) + (not packed.config.tie_embeddings)
    assert len(modules) == num_matrices
    head = {"output": QuantFormat(8)} if "output" in modules else {}  # as llama.cpp has it
    assert {n: m.format for n, m in modules.items()} == dict.fromkeys(
        modules, FORMATS[encoding]
    ) | head
    assert_same_values(packed, plain)


@ENCODINGS
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_model_but_for_rounded_activations(
    tmp_path: Path, kind: str, encoding: str
) -> None:
    path = save_gguf(make(kind), tmp_path / "m", encoding=encoding)
    logits = compute_logits(load(path, dtype=torch.float32))
    expected = compute_logits(load_model(path, dtype=torch.float32))
    assert measure_error(logits, expected) < _ROUNDING
    rounding = dequantize_model(load(path, dtype=torch.float32), rounds=True)
    assert measure_error(logits, compute_logits(rounding)) < 5e-3


@pytest.mark.parametrize("table", [GGUF, GGUF_EACH], ids=lambda table: table.title)
@ENCODINGS
def test_blocks_that_others_wrote(tmp_path: Path, table: NameTable, encoding: str) -> None:
    """Random bytes as blocks: q of -128, scales of both signs and of every size."""
    model = make()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in describe_for_gguf(model.config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    kind = gguf.GGMLQuantizationType[encoding]
    num_bytes = {"Q4_0": 18, "Q8_0": 34}[encoding]
    for name, tensor in list_tensors(model, table).items():
        if tensor.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, tensor.detach().numpy())
            continue
        shape = (*tensor.shape[:-1], tensor.shape[-1] // 32, num_bytes)
        blocks = rng.integers(0, 256, shape, dtype=np.uint8)
        scales = rng.standard_normal((*shape[:-1], 1)) * 2.0 ** rng.integers(-20, 3)
        blocks[..., :2] = scales.astype(np.float16).view(np.uint8)
        rows = blocks.reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "m.gguf"
    packed, plain = load(path, dtype=torch.float32), load_model(path, dtype=torch.float32)
    assert len(list_packed(packed)) == 15
    assert_same_values(packed, plain)


def test_only_these_two_types_stay_packed(tmp_path: Path) -> None:
    """A file of many types, as those named Q4_0 are: the others are dequantised as ever."""
    model = make("mistral")
    types = {"blk.0.attn_q": "Q4_0", "blk.0.attn_k": "Q8_0", "blk.0.attn_v": "Q5_0",
             "blk.1.ffn_up": "Q4_0", "blk.1.ffn_down": "Q4_1", "token_embd": "Q8_0",
             "output.weight": "Q5_1"}  # fmt: skip
    path = save_mixed(model, tmp_path / "m.gguf", types, GGUF)
    packed = load(path, dtype=torch.float32)
    assert set(list_packed(packed)) == {
        "layers.0.attention.wq", "layers.0.attention.wk", "layers.1.feed_forward.w3",
    }  # fmt: skip
    assert_same_values(packed, load_model(path, dtype=torch.float32))


@pytest.mark.parametrize("table", [GGUF, GGUF_EACH], ids=lambda table: table.title)
def test_experts_of_two_types_may_be_packed_but_not_in_part(
    tmp_path: Path, table: NameTable
) -> None:
    first, second = ("ffn_down_exps", "ffn_up_exps") if table is GGUF else ("ffn_down.", "ffn_up.")
    gate = "ffn_gate_exps" if table is GGUF else "ffn_gate."
    types = {f"blk.0.{first}": "Q8_0", f"blk.0.{second}": "Q4_0", f"blk.0.{gate}": "Q4_0",
             f"blk.1.{second}": "Q4_0", f"blk.1.{gate}": "Q4_0"}  # fmt: skip
    path = save_mixed(make(), tmp_path / "m.gguf", types, table)
    packed = load(path, dtype=torch.float32)
    stack = "layers.0.feed_forward.experts"
    assert {name: module.format.bits for name, module in list_packed(packed).items()} == {
        f"{stack}.w1": 4, f"{stack}.w2": 8, f"{stack}.w3": 4,
    }  # fmt: skip
    assert_same_values(packed, load_model(path, dtype=torch.float32))


def test_experts_of_one_matrix_in_several_types_are_dequantised(tmp_path: Path) -> None:
    types = {"blk.0.ffn_down.1": "Q8_0", "blk.0.ffn_": "Q4_0"}
    path = save_mixed(make(), tmp_path / "m.gguf", types, GGUF_EACH)
    assert not list_packed(load(path, dtype=torch.float32))


@ENCODINGS
def test_packed_weights_are_unpacked_when_asked_and_rounded_again_too(
    tmp_path: Path, encoding: str
) -> None:
    path = save_gguf(make(), tmp_path / "m", encoding=encoding)
    plain = load(path, keep_packed=False)
    assert not list_packed(plain)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    same = load(path, quant=FORMATS[encoding].name, dtype=torch.float32)
    assert_same_values(same, load_model(path, dtype=torch.float32))
    other = load(path, quant="int4-g32-asym")
    assert {m.format.name for m in list_packed(other).values()} == {"int4-g32-asym"}


@ENCODINGS
def test_scales_that_are_not_finite_are_found(tmp_path: Path, encoding: str) -> None:
    path = save_gguf(make(), tmp_path / "m", encoding=encoding)
    place = open_checkpoint(path).contents.stored["blk.1.attn_q.weight"].begin
    with path.open("r+b") as file:
        file.seek(place)
        file.write(np.array([np.nan], dtype=np.float16).tobytes())
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_q\.weight: rows 0 .* not finite"):
        load(path)


def test_neither_type_takes_the_gguf_library(tmp_path: Path, monkeypatch: Any) -> None:
    """Only what is dequantised does, here embeddings of Q8_0."""

    def refuse(wanted_for: object) -> None:
        raise CheckpointError(f"{wanted_for}: no library here")

    types = {"attn": "Q4_0", "ffn_up": "Q8_0"}
    path = save_mixed(make("mistral"), tmp_path / "m.gguf", types, GGUF)
    monkeypatch.setattr(gguf_values, "load_gguf_library", refuse)
    load(path)
    with pytest.raises(CheckpointError, match="no library here"):
        load_model(path)
