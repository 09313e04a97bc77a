"""What lies in a file as it is needed is not copied: stacks of experts are views with strides.

A view gives the results of a copy wherever in the file it begins, and is one of the model's weights
like any other.
"""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.checkpoint.layouts import (
    list_tensors,
    save_gguf,
    save_gguf_each,
    save_hf,
    save_hf_fused,
    save_hf_published,
    save_torrent,
)
from tests.engine.paged import PagedSequences
from tests.tiny import make_config, make_model, make_tokens
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.mistral import write_params
from tramontane.checkpoint.names import MISTRAL
from tramontane.checkpoint.writer import save_model
from tramontane.engine.native_model import build_native_model
from tramontane.errors import CheckpointError
from tramontane.kernels import extension, native
from tramontane.kernels.dispatch import get_kernels
from tramontane.models.transformer import Transformer
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe

DTYPES = [torch.float32, torch.bfloat16]
STACKS = {"experts.w1", "experts.w2", "experts.w3"}
needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")


@pytest.fixture(
    params=[
        "fused", "native avx512_bf16", "native avx512", "native avx2", "native portable",
    ]
)  # fmt: skip
def _kernels(
    request: pytest.FixtureRequest, choose_kernels: Callable[[str], None]
) -> Iterator[None]:
    backend, _, name = request.param.partition(" ")
    choose_kernels(backend)
    if not name:
        yield
        return
    before = extension.get_instruction_set()
    if not extension.native_kernels.choose_kernels(name):
        pytest.skip(f"this processor has no {name}")
    yield
    extension.native_kernels.choose_kernels(before)


def save_mistral_published(model: Transformer, folder: Path) -> Path:
    folder.mkdir()
    tensors = list_tensors(model, MISTRAL)
    safetensors.torch.save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(write_params(model.config)))
    return folder


def list_copied(model: Transformer, path: Path) -> set[str]:
    """The parameters that lie in no mapped file at `path`, or not wholly."""
    maps = Path("/proc/self/maps").read_text()
    found = re.findall(rf"^(\w+)-(\w+) .* {re.escape(str(path))}", maps, re.MULTILINE)
    spans = [(int(begin, 16), int(end, 16)) for begin, end in found]

    def is_mapped(value: Tensor) -> bool:
        last = sum(
            (size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)
        )
        begin = value.data_ptr()
        end = begin + (last + 1) * value.element_size()
        return any(low <= begin and end <= high for low, high in spans)

    return {name for name, value in model.named_parameters() if not is_mapped(value)}


def name_matrices(parameters: set[str]) -> set[str]:
    """layers.0.attention.wq.weight -> wq, layers.0.feed_forward.experts.w1 -> experts.w1."""
    return {re.sub(r"^layers\.\d+\.\w+\.|\.weight$", "", name) for name in parameters}


def move_data(path: Path, num_bytes: int) -> None:
    """Make the header of a safetensors file so much longer."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * num_bytes
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@torch.no_grad()
def compute_logits(model: Transformer) -> list[Tensor]:
    """Of prompts of several lengths; once more as the whole model in one call, where that is."""
    runner = build_native_model(model)
    assert (runner is not None) == (get_kernels() is native)
    logits = []
    for count in (1, 2, 70):
        tokens = make_tokens(count, seed=count)
        hidden = model.forward_packed(tokens, [count]).hidden
        if runner is not None:
            output = PagedSequences(model).run_natively(runner, tokens, [count])
            assert output is not None
            assert torch.equal(output.hidden, hidden)
        logits.append(model.compute_logits(hidden))
    return logits


def assert_same_logits(model: Transformer, expected: Transformer) -> None:
    """The same bits, but for torch in fp32: MKL may sum in another order at another address."""
    is_exact = get_kernels() is native or model.norm.weight.dtype != torch.float32
    for ours, theirs in zip(compute_logits(model), compute_logits(expected), strict=True):
        if is_exact:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_same_values(model: Transformer, expected: Transformer) -> None:
    wanted = expected.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name].to(value.dtype)), name


LAYOUTS: dict[str, tuple[Callable[..., Path], set[str]]] = {
    "as we write": (save_hf, set()),
    "published": (save_hf_published, set()),
    "fused": (save_hf_fused, set()),
    "Mistral": (save_mistral_published, {"wq", "wk"}),
    "GGUF": (save_gguf, {"wq", "wk"}),
    "GGUF, one tensor per expert": (save_gguf_each, {"wq", "wk"}),
    "torrent": (save_torrent, {"wq", "wk", "experts.w2"}),
}


@needs_maps
@pytest.mark.parametrize(("save", "copied"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_nothing_is_copied_that_can_be_viewed(tmp_path: Path, save: Any, copied: set[str]) -> None:
    """RoPE's other order of rows and the torrent's transposed matrices cannot."""
    model = make_model()
    path = save(model, tmp_path / "m")
    loaded = load_model(path)
    assert name_matrices(list_copied(loaded, path)) == copied
    assert_same_values(loaded, model)
    own = load_model(path, use_views=False)
    assert list_copied(own, path) == set(dict(own.named_parameters()))
    assert all(value.is_contiguous() for value in own.parameters())
    assert_same_values(own, model)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", [save_hf_published, save_hf_fused, save_mistral_published])
def test_views_give_the_results_of_copies(tmp_path: Path, save: Any, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    path = save(model, tmp_path / "m", **({"dtype": dtype} if save is save_hf_published else {}))
    viewed, own = load_model(path), load_model(path, use_views=False)
    assert viewed.norm.weight.dtype == dtype
    assert not viewed.layers[0].feed_forward.experts.w1.is_contiguous()
    assert_same_logits(viewed, own)


@needs_maps
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bytes", [1, 2, 4, 6, 60])
def test_data_may_begin_anywhere(tmp_path: Path, dtype: torch.dtype, num_bytes: int) -> None:
    """What begins where the dtype cannot is copied; all else runs where it lies."""
    model = make_model()
    folder = save_hf_published(model, tmp_path / "m", dtype=dtype)
    move_data(folder / "model.safetensors", num_bytes)
    viewed, own = load_model(folder), load_model(folder, use_views=False)
    everything = set(dict(own.named_parameters()))
    assert list_copied(viewed, folder) == (everything if num_bytes % dtype.itemsize else set())
    assert_same_values(viewed, model.to(dtype))
    assert_same_logits(viewed, own)


@needs_maps
def test_experts_of_several_files_are_gathered(tmp_path: Path) -> None:
    """Those of a layer that lies in one file are not."""
    model = make_model(make_config(n_layers=3))
    folder = save_hf_published(model, tmp_path / "m", max_shard_bytes=900_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files: dict[str, set[str]] = {}
    for name, file in index.items():
        if match := re.search(r"layers\.(\d+)\.block_sparse_moe\.experts\.\d+\.(w\d)", name):
            files.setdefault("layers.{}.feed_forward.experts.{}".format(*match.groups()), set())
            files["layers.{}.feed_forward.experts.{}".format(*match.groups())].add(file)
    split = {name for name, where in files.items() if len(where) > 1}
    assert len(files) == 9
    assert 0 < len(split) < 9
    loaded = load_model(folder)
    assert list_copied(loaded, folder) == split
    assert_same_values(loaded, model)


@needs_maps
@pytest.mark.parametrize("num_experts", [1, 2, 12])
def test_any_number_of_experts(tmp_path: Path, num_experts: int) -> None:
    """In the order of names 10 and 11 come before 2: no even distances, so they are gathered."""
    moe = make_config().moe
    assert moe is not None
    config = make_config(moe=type(moe)(num_experts=num_experts, num_experts_per_tok=1))
    model = make_model(config)
    folder = save_hf_published(model, tmp_path / "m")
    loaded = load_model(folder)
    assert name_matrices(list_copied(loaded, folder)) == (STACKS if num_experts > 10 else set())
    assert_same_values(loaded, model)


@needs_maps
def test_experts_in_falling_order_are_gathered(tmp_path: Path) -> None:
    model = make_model()
    folder = save_hf(model, tmp_path / "m")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    turned = re.sub(rb"experts\.(\d)", lambda m: b"experts.%d" % (7 - int(m[1])), header)
    path.write_bytes(content[:8] + turned + content[8 + length :])
    loaded = load_model(folder)
    assert name_matrices(list_copied(loaded, folder)) == STACKS
    for layer, expected in zip(loaded.layers, model.layers, strict=True):
        assert torch.equal(layer.feed_forward.experts.w2, expected.feed_forward.experts.w2.flip(0))


@pytest.mark.parametrize("backend", ["native", "fused"])
@pytest.mark.parametrize("num_bytes", [0, 1])  # viewed, gathered
def test_nan_in_any_expert_is_named(
    tmp_path: Path, choose_kernels: Callable[[str], None], backend: str, num_bytes: int
) -> None:
    choose_kernels(backend)
    folder = save_hf_published(make_model(), tmp_path / "m", dtype=torch.bfloat16)
    path = folder / "model.safetensors"
    original = safetensors.torch.load(path.read_bytes())
    for expert in range(8):
        for matrix in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{matrix}.weight"
            damaged = original[name].clone()
            damaged[-1, -1] = float("nan")
            safetensors.torch.save_file(original | {name: damaged}, path)
            move_data(path, num_bytes)
            with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
                load_model(folder)
    safetensors.torch.save_file(original, path)
    load_model(folder)


@pytest.fixture
def viewed(tmp_path: Path) -> Transformer:
    """A model in bf16 whose stacks are not contiguous."""
    model = load_model(save_hf_published(make_model(), tmp_path / "viewed", dtype=torch.bfloat16))
    assert not model.layers[0].feed_forward.experts.w1.is_contiguous()
    return model


def test_a_cast_or_copied_model_is_contiguous(viewed: Transformer) -> None:
    for model in (copy.deepcopy(viewed), copy.deepcopy(viewed).float()):
        assert all(value.is_contiguous() for value in model.parameters())
        assert_same_values(viewed, model)
        assert_same_values(model, viewed)


def test_a_copied_stack_has_the_memory_of_its_values_alone(viewed: Transformer) -> None:
    weight = copy.deepcopy(viewed).layers[0].feed_forward.experts.w1
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_it_is_saved_and_quantised_as_any_other(tmp_path: Path, viewed: Transformer) -> None:
    save_model(viewed, tmp_path / "again")
    assert_same_values(load_model(tmp_path / "again"), viewed)
    own = copy.deepcopy(viewed)
    for model in (viewed, own):
        quantize_model(model, QuantRecipe.from_format(QuantFormat(4)))
    assert_same_values(viewed, own)


def test_state_dict_goes_there_and_back(viewed: Transformer) -> None:
    state = {name: value.clone() for name, value in viewed.state_dict().items()}
    viewed.load_state_dict({name: value * 2 for name, value in state.items()})
    assert all(torch.equal(v, state[name] * 2) for name, v in viewed.state_dict().items())


@pytest.mark.parametrize("backend", ["native", "fused", "reference"])
def test_gradients_are_those_of_a_copy(
    viewed: Transformer, choose_kernels: Callable[[str], None], backend: str
) -> None:
    choose_kernels(backend)
    gradients = []
    for model in (viewed, copy.deepcopy(viewed)):
        logits = model.compute_logits(model.forward_packed(make_tokens(40), [40]).hidden)
        logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)
