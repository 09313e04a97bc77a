"""Our own quantised folder: mapped as it lies, complete or refused by name (C08, C32)."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from tests.checkpoint.quantized_folder import INT4, save_quantized
from tests.checkpoint.test_fuzz_folders import mutate
from tests.tiny import make_config, make_model, make_tokens
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_config, load_model
from tramontane.checkpoint.quantized import list_parameters
from tramontane.checkpoint.writer import save_model
from tramontane.engine.loading import load_for_running
from tramontane.errors import CheckpointError, ConfigError
from tramontane.models.transformer import Transformer, build_model
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe

WEIGHTS = "quantized.safetensors"
RECIPES = {
    "int4": INT4,
    "int8 and a head": QuantRecipe.from_format(QuantFormat(8), head=True),
    "asymmetric": QuantRecipe.from_format(QuantFormat(4, 32, False), head=True),
    "experts alone": QuantRecipe(experts=QuantFormat(4)),
    "of each kind": QuantRecipe(
        experts=QuantFormat(4), attention=QuantFormat(8, 64), head=QuantFormat(4, 64, False)
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mistral": {"moe": None},
    "tied": {"tie_embeddings": True},
    "odd rows": {"vocab_size": 131, "n_heads": 6, "n_kv_heads": 3, "head_dim": 32},
}
Tensors = dict[str, torch.Tensor]


def make(kind: str = "mixtral") -> Transformer:
    model = make_model(make_config(**KINDS[kind]))
    if model.config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


def load(folder: Path, **options: Any) -> Transformer:
    return load_for_running(open_checkpoint(folder), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model in int4."""
    return save_quantized(make(), tmp_path / "m")


def edit_tensors(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_the_model_that_was_quantised(
    tmp_path: Path, kind: str, recipe: QuantRecipe
) -> None:
    """To the bit, but that plain weights are bf16 now."""
    model = make(kind)
    loaded = load(save_quantized(model, tmp_path / "m", recipe))
    quantize_model(model, recipe)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        plain = expected[name].bfloat16() if expected[name].dtype == torch.float32 else None
        assert torch.equal(value, expected[name] if plain is None else plain), name
    assert loaded.config == model.config
    assert not loaded.training
    tokens = make_tokens(9)
    with torch.no_grad():
        assert loaded.compute_logits(loaded.forward_packed(tokens, [9]).hidden).isfinite().all()


def test_plain_weights_take_the_dtype_asked_for(folder: Path) -> None:
    model = load(folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {b.dtype for b in model.buffers()} == {torch.uint8, torch.float16}


def test_a_tied_head_stays_the_embeddings_unless_it_is_quantised(tmp_path: Path) -> None:
    plain = load(save_quantized(make("tied"), tmp_path / "a"))
    assert plain.output.weight is plain.tok_embeddings.weight
    recipe = QuantRecipe.from_format(QuantFormat(8), head=True)
    packed = load(save_quantized(make("tied"), tmp_path / "b", recipe))
    assert "output.weight" not in packed.state_dict()
    assert "output.qweight" in packed.state_dict()


def list_mapped(path: Path) -> list[range]:
    """The addresses at which this process sees a file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            begin, end = line.split()[0].split("-")
            ranges.append(range(int(begin, 16), int(end, 16)))
    return ranges


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc tells what is mapped")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_nothing_is_copied(tmp_path: Path, recipe: QuantRecipe) -> None:
    """Every tensor is a view of the mapped file, at a multiple of 64 bytes."""
    path = save_quantized(make(), tmp_path / "m", recipe) / WEIGHTS
    model = load(path.parent)
    mapped = list_mapped(path)
    for name, tensor in model.state_dict().items():
        assert any(tensor.data_ptr() in addresses for addresses in mapped), name
        assert tensor.data_ptr() % 64 == 0, name
    assert all(tensor.begin % 64 == 0 for tensor in open_checkpoint(path).contents.stored.values())


def test_tensors_of_odd_sizes_come_last(tmp_path: Path) -> None:
    """16 rows and one group are 32 bytes of scales: after those, nothing lies at 64 bytes."""
    config = make_config(dim=32, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=32, vocab_size=5)
    model = make_model(config)
    path = save_quantized(model, tmp_path / "m", QuantRecipe.from_format(QuantFormat(4, 32, False)))
    stored = open_checkpoint(path).contents.stored
    sizes = {name: tensor.end - tensor.begin for name, tensor in stored.items()}
    odd = [name for name, size in sizes.items() if size % 64]
    assert any(name.endswith("wk.zeros") for name in odd)
    for name, size in sizes.items():
        assert stored[name].begin % min(64, size & -size) == 0, name
    loaded, expected = load(path).state_dict(), model
    quantize_model(expected, QuantRecipe.from_format(QuantFormat(4, 32, False)))
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded[name], value.to(loaded[name].dtype)), name


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    whole = load(save_quantized(make(), tmp_path / "whole"))
    folder = save_quantized(make(), tmp_path / "shards", max_shard_bytes=50_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"quantized-00001-of-{len(files):05d}.safetensors"
    assert json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    sharded = load(folder).state_dict()
    assert all(torch.equal(sharded[name], value) for name, value in whole.state_dict().items())


def test_the_safetensors_library_reads_it_too(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    stored = open_checkpoint(folder).contents.stored
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(stored[name].read(), value) for name, value in tensors.items())


def test_c08_each_missing_tensor_is_named(folder: Path) -> None:
    original = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    for name in original:
        edit_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError, match="incomplete download") as error:
            load(folder)
        assert f"1 missing tensors: {name}" in str(error.value)
        safetensors.torch.save_file(original, folder / WEIGHTS)


def test_c08_unexpected_tensors_are_named(folder: Path) -> None:
    name = "layers.0.attention.wq.zeros"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(4, 2, 16, dtype=torch.uint8)}))
    with pytest.raises(CheckpointError, match=f"1 unexpected tensors: {name}"):
        load(folder)


# What is changed in config.json, and what the error has to say.
_DISAGREEMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "experts": (
        lambda c: c.update(num_local_experts=4),
        "num_local_experts is 4, the tensors have",
    ),
    "layers": (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, the"),
    "dim": (
        lambda c: c.update(hidden_size=32, head_dim=16),
        "hidden_size is 32 in the configuration, 64 in",
    ),
    "heads": (
        lambda c: c.update(num_attention_heads=8),
        "num_attention_heads * head_dim / 16, rounded up, is 8 in the configuration, 4 in the",
    ),
    "hidden": (
        lambda c: c.update(intermediate_size=64),
        "intermediate_size / 16, rounded up, is 4 in the configuration, 6 in the tensor",
    ),
    "bits": (
        lambda c: c["quantization_config"]["attention"].update(bits=8),
        "hidden_size / 4 is 16 in the configuration, 8 in the tensor",
    ),
    "groups": (
        lambda c: c["quantization_config"]["attention"].update(group_size=64),
        "hidden_size / 64 is 1 in the configuration, 2 in the tensor",
    ),
    "zero points": (
        lambda c: c["quantization_config"]["experts"].update(symmetric=False),
        "6 missing tensors: layers.0.feed_forward.experts.w1.zeros (quantization_config says int4-",
    ),
    "a part less": (
        lambda c: c["quantization_config"].pop("attention"),
        "layers.0.attention.wq.weight, layers.0.attention.wk.weight",
    ),
    "a part more": (
        lambda c: c["quantization_config"].update(head=c["quantization_config"]["experts"]),
        "2 missing tensors: output.qweight (quantization_config says int4-g32), output.scales",
    ),
}


@pytest.mark.parametrize(("edit", "said"), _DISAGREEMENTS.values(), ids=_DISAGREEMENTS.keys())
def test_c32_disagreement_names_the_field_and_both_values(
    folder: Path, edit: Callable[[Any], Any], said: str
) -> None:
    edit_config(folder, edit)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda c: c.pop("quantization_config"),
            "packed by tramontane, but quantization_config is",
        ),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "packed by tramontane"),
        (lambda c: c.update(quantization_config=[4]), "packed by tramontane"),
        (lambda c: c["quantization_config"].update(version=2), "version is 2; 1 is read"),
        (lambda c: c["quantization_config"].pop("version"), "version is None"),
        (lambda c: c["quantization_config"].update(router={"bits": 4}), "unknown parts"),
        (lambda c: c["quantization_config"]["experts"].update(bits=3), "experts: bits is 3"),
        (lambda c: c["quantization_config"]["experts"].pop("bits"), "experts is .* belongs there"),
        (
            lambda c: c["quantization_config"]["experts"].update(group_size=128),
            "experts.w1: rows of 64 values are not a multiple of the group size, 128",
        ),
        (lambda c: c.update(auto_map={"AutoModel": "canary.Model"}), "auto_map"),
        (lambda c: c.update(num_experts_per_tok=9), "num_experts_per_tok is 9"),
    ],
)
def test_c32_impossible_configuration_names_file_and_field(
    folder: Path, edit: Callable[[Any], Any], said: str
) -> None:
    edit_config(folder, edit)
    with pytest.raises(ConfigError, match=said) as error:
        load(folder)
    assert f"{folder / 'config.json'}: " in str(error.value)


def test_bytes_in_the_place_of_weights_are_refused_and_the_reverse(
    tmp_path: Path, folder: Path
) -> None:
    """U8 is for this layout alone, and there for whole numbers and zero points alone."""
    scales = "layers.1.attention.wv.scales"
    for name, dtype, said in (
        (scales, torch.bfloat16, "stored as BF16; it must be F16"),
        ("layers.1.attention.wv.qweight", torch.float32, "stored as F32; it must be U8"),
        ("norm.weight", torch.uint8, "stored as U8; it must be F32 or F16 or BF16"),
    ):
        original = (folder / WEIGHTS).read_bytes()
        edit_tensors(folder, lambda t, n=name, d=dtype: t.update({n: t[n].float().to(d)}))
        with pytest.raises(CheckpointError, match=f"{name} is {said}"):
            load(folder)
        (folder / WEIGHTS).write_bytes(original)
    save_model(make(), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["lm_head.weight"] = torch.ones(128, 64, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is stored as U8; it must be F32"):
        load_model(tmp_path / "hf", dtype=torch.float32)


@pytest.mark.parametrize(
    "name", ["layers.1.feed_forward.experts.w2.scales", "norm.weight", "tok_embeddings.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(folder: Path, name: str, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[name].flatten()[-1:].fill_(value))
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        load(folder)


def test_only_running_takes_a_quantised_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantised, which is for running; loading plain"):
        load_model(folder)
    assert load_config(folder) == make_config()
    with pytest.raises(ConfigError, match="is quantised already"):
        load(folder, quant="int8")


def test_transformers_refuses_it_rather_than_inventing_weights(folder: Path) -> None:
    for model in (AutoModelForCausalLM, MixtralForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            model.from_pretrained(folder)


def test_a_plain_folder_with_our_configuration_is_refused(tmp_path: Path, folder: Path) -> None:
    save_model(make(), tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="load the unquantised weights"):
        load_model(tmp_path / "hf")


def test_c06_mutated_configurations_load_or_are_refused(folder: Path) -> None:
    random, accepted = Random(5), 0
    content = (folder / "config.json").read_text()
    for number in range(150):
        mutated = mutate(content, random)
        (folder / "config.json").write_bytes(mutated)
        try:
            load(folder)
            accepted += 1
        except (CheckpointError, ConfigError):
            pass
        except Exception as error:
            error.add_note(f"mutation {number}: {mutated[:600]!r}")
            raise
    assert accepted > 0


def test_our_names_are_those_of_the_model() -> None:
    for kind in KINDS.values():
        config = make_config(**kind)
        state = build_model(config, device="meta").state_dict()
        assert list_parameters(config) == {name: tuple(v.shape) for name, v in state.items()}
