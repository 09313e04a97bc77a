"""C07: one model in every layout gives the same logits, and transformers' too."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors.torch
import torch

from tests.checkpoint.layouts import (
    LAYOUTS,
    list_tensors,
    save_gguf,
    save_gguf_each,
    save_hf,
    save_mistral,
    save_torrent,
)
from tests.oracles.hf import compute_hf_logits, to_hf_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane.checkpoint import loader
from tramontane.checkpoint.files.gguf_file import read_gguf
from tramontane.checkpoint.files.torch_file import read_torch_table
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.name_table import NameTable
from tramontane.checkpoint.names import GGUF, HF, MISTRAL, TORRENT
from tramontane.checkpoint.parameters import StoredParameters
from tramontane.checkpoint.writer import write_hf, write_mistral
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"max_seq_len": 32768, "rope_theta": 1e6},
    "mistral window": {"moe": None, "sliding_window": 9, "max_seq_len": 32768},
    "mixtral 3 experts of odd size": {"hidden_dim": 40, "max_seq_len": 512, "rope_theta": 5e5},
}
layouts = pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS.keys())
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


@torch.no_grad()
def compute_logits(model: Transformer) -> torch.Tensor:
    tokens = make_tokens(24)
    return model.compute_logits(model.forward_packed(tokens, [len(tokens)]).hidden)


@kinds
@layouts
def test_c07_every_layout_gives_the_same_model(
    tmp_path: Path, save: Any, changes: dict[str, Any]
) -> None:
    model = make_model(make_config(**changes))
    path = save(model, tmp_path / "m")
    loaded = load_model(path)
    assert loaded.config == model.config
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert (compute_logits(loaded) - compute_logits(model)).abs().max() <= 1e-6
    with torch.no_grad():
        oracle = compute_hf_logits(to_hf_model(model), make_tokens(24))
    assert (compute_logits(loaded) - oracle).abs().max() <= 1e-5


@pytest.mark.parametrize("table", [MISTRAL, TORRENT, GGUF], ids=lambda table: table.title)
def test_c07_a_load_without_the_permutation_of_rope_is_seen(table: NameTable) -> None:
    """Their pairs are neighbours, ours are halves: queries taken as they lie give other logits."""
    model = make_model()
    expected = compute_logits(model)
    tensors = list_tensors(model, table)
    for layer in range(2):
        name = table.layer.format(layer=layer) + table.attention["wq"]
        model.layers[layer].attention.wq.weight.data = tensors[name]
    assert (compute_logits(model) - expected).abs().max() > 0.01


@layouts
@pytest.mark.parametrize("chunk", [1, 5000])
def test_values_are_converted_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any, chunk: int
) -> None:
    """A row or a head at a time, or as many as fit: turned and transposed matrices too."""
    monkeypatch.setattr(loader, "_MAX_CHUNK_BYTES", chunk)
    model = make_model()
    loaded = load_model(save(model, tmp_path / "m"), dtype=torch.bfloat16)
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name].bfloat16()), name


def _drop_from_safetensors(path: Path, name: str) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    del tensors[name]
    safetensors.torch.save_file(tensors, path)


def _drop_from_torch(path: Path, name: str) -> None:
    table = {n: t.read().clone() for n, t in read_torch_table(path).items() if n != name}
    torch.save(table, path)


def _drop_from_gguf(path: Path, name: str) -> None:
    file = read_gguf(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for key, value in file.metadata.items():
        if key.startswith("llama."):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
    for other, tensor in file.tensors.items():
        if other != name:
            writer.add_tensor(other, tensor.read().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


ON_DISK: dict[str, tuple[Any, Any]] = {
    "Mistral": (save_mistral, _drop_from_safetensors),
    "torrent": (save_torrent, _drop_from_torch),
    "GGUF": (save_gguf, _drop_from_gguf),
    "GGUF, one tensor per expert": (save_gguf_each, _drop_from_gguf),
}


@pytest.mark.parametrize(("save", "drop"), ON_DISK.values(), ids=ON_DISK.keys())
def test_c08_each_tensor_that_is_missing_is_named(tmp_path: Path, save: Any, drop: Any) -> None:
    """C08: each in turn, by writing its file without it; it alone is listed (HF: test_loader)."""
    checkpoint = open_checkpoint(save(make_model(), tmp_path / "m"))
    for name, stored in checkpoint.contents.stored.items():
        if name == GGUF.output and checkpoint.layout.name == "gguf":
            continue  # a GGUF without a head has tied embeddings, by the format's definition
        whole = stored.path.read_bytes()
        drop(stored.path, name)
        with pytest.raises(CheckpointError, match=r"incomplete download") as error:
            load_model(checkpoint.contents.path)
        assert f"1 missing tensors: {name}" in str(error.value)
        assert "unexpected" not in str(error.value)
        stored.path.write_bytes(whole)
    load_model(checkpoint.contents.path)


@kinds
def test_round_trip_over_mistral_and_torrent_is_exact(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """hf -> mistral -> torrent -> hf, one tensor at a time."""
    first = save_hf(make_model(make_config(**changes)), tmp_path / "hf")
    steps: list[tuple[str, Any]] = [
        ("mistral", write_mistral),
        ("torrent", lambda *args, **kw: write_mistral(*args, table=TORRENT, **kw)),
        ("again", write_hf),
    ]
    path = first
    for name, write in steps:
        checkpoint = open_checkpoint(path)
        parameters = StoredParameters(checkpoint.pairs)
        write(parameters, checkpoint.config, tmp_path / name, dtype=torch.float32)
        path = tmp_path / name
    for file in ("model.safetensors", "config.json"):
        assert (path / file).read_bytes() == (first / file).read_bytes()
    stacked = safetensors.torch.load_file(tmp_path / "torrent" / "consolidated.safetensors")
    assert ("layers.0.block_sparse_moe.w2" in stacked) == (changes.get("moe", 1) is not None)


@kinds
def test_round_trip_over_gguf_is_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    first = save_hf(make_model(make_config(**changes)), tmp_path / "hf")
    checkpoint = open_checkpoint(first)
    write_gguf(
        StoredParameters(checkpoint.pairs), checkpoint.config, tmp_path / "m.gguf", encoding="F32"
    )
    back = open_checkpoint(tmp_path / "m.gguf")
    write_hf(StoredParameters(back.pairs), back.config, tmp_path / "again", dtype=torch.float32)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (first / file).read_bytes()


@pytest.mark.parametrize(
    ("encoding", "bound"), [("F16", 2e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_0", 0.12)]
)
def test_packed_gguf_holds_the_values_within_its_steps(
    tmp_path: Path, encoding: str, bound: float
) -> None:
    """Relative error of each matrix; norms and routers are exact."""
    model = make_model()
    loaded = load_model(save_gguf(model, tmp_path / "m", encoding=encoding), dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        if value.ndim == 1 or "gate" in name:
            assert torch.equal(value, expected), name
        else:
            assert (value - expected).norm() / expected.norm() < bound, name
            assert not torch.equal(value, expected), name


@pytest.mark.parametrize("encoding", ["F16", "BF16", "Q8_0"])
def test_dtype_of_a_gguf_is_that_of_its_matrices(tmp_path: Path, encoding: str) -> None:
    """Norms are fp32 in every GGUF; packed values become bfloat16."""
    path = save_gguf(make_model(), tmp_path / "m", encoding=encoding)
    expected = torch.float16 if encoding == "F16" else torch.bfloat16
    assert {p.dtype for p in load_model(path).parameters()} == {expected}


def test_rows_that_do_not_fit_the_blocks_are_refused(tmp_path: Path) -> None:
    model = make_model(make_config(hidden_dim=40))
    with pytest.raises(CheckpointError, match=r"ffn_down_exps.* rows of 40 values.*write F16"):
        save_gguf(model, tmp_path / "m", encoding="Q8_0")
    assert list((tmp_path / "m").iterdir()) == []


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.layers[0].feed_forward.experts.w1.data[3, 2, 1] = 1e5
    with pytest.raises(CheckpointError, match=r"ffn_gate_exps.* beyond fp16 \(100000\)"):
        save_gguf(model, tmp_path / "m", encoding="F16")


def test_stacks_of_our_own_folder_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """Experts follow one another in the file, so that a stack is a view of it."""
    loaded = load_model(save_hf(make_model(), tmp_path / "m"))
    stack = loaded.layers[1].feed_forward.experts.w2
    before = stack[2, 1, 0].item()
    path = tmp_path / "m" / "model.safetensors"
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    table = open_checkpoint(tmp_path / "m").contents.stored
    place = table[name].begin + 1 * 96 * 4
    with path.open("r+b") as file:  # a private mapping shows the file until it is written to
        file.seek(place)
        file.write(torch.tensor([before + 1]).numpy().tobytes())
    assert stack[2, 1, 0].item() == pytest.approx(before + 1)


def test_mistral_folder_without_parameters_of_the_model(tmp_path: Path) -> None:
    folder = save_mistral(make_model(), tmp_path / "m")
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no params\.json; incomplete download"):
        load_model(folder)


def test_parameters_are_read_one_expert_at_a_time(tmp_path: Path) -> None:
    model = make_model()
    for table_save in (save_hf, save_mistral):
        checkpoint = open_checkpoint(table_save(model, tmp_path / table_save.__name__))
        parameters = StoredParameters(checkpoint.pairs)
        name = "layers.1.feed_forward.experts.w2"
        assert torch.equal(parameters.read(name, 3), model.state_dict()[name][3])
        assert torch.equal(parameters.read(name), model.state_dict()[name])
    assert HF.count_matches(list_tensors(model, HF)) == len(list_tensors(model, HF))
