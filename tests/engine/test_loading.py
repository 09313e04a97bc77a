"""Quantised while it is read, from every layout: the same bits as quantised afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import LAYOUTS, save_hf
from tests.checkpoint.quantized_folder import save_quantized
from tests.model_folder import save_tiny_model
from tests.tiny import make_config, make_model
from tramontane import LLM, SamplingParams
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.writer import save_model
from tramontane.config import ModelConfig
from tramontane.engine.estimate import count_weight_bytes
from tramontane.engine.loading import load_for_running
from tramontane.errors import CheckpointError, ConfigError
from tramontane.models.transformer import Transformer
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe
from tramontane.quant.modules import PackedMatrix, QuantizedLinear

RECIPE = QuantRecipe(
    experts=QuantFormat(4), attention=QuantFormat(8, 64, False), head=QuantFormat(8)
)


def load(path: Path, **options: Any) -> Transformer:
    return load_for_running(open_checkpoint(path), **options)


def count_bytes(model: Transformer) -> int:
    """Of all weights; those of tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("changes", [{}, {"moe": None}], ids=["mixtral", "mistral"])
def test_on_load_is_as_after_it(tmp_path: Path, save: Any, changes: dict[str, Any]) -> None:
    model = make_model(make_config(**changes))
    loaded = load(save(model, tmp_path / "m"), quant=RECIPE)
    quantize_model(model, RECIPE)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[n]) for n, value in loaded.state_dict().items())


def test_bf16_weights_are_rounded_from_what_they_are(tmp_path: Path) -> None:
    """Not from what they become: the dtype asked for is that of the others."""
    save_model(make_model(), tmp_path / "m")
    low, high = (
        load(tmp_path / "m", quant="int4"),
        load(tmp_path / "m", quant="int4", dtype=torch.float32),
    )
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in high.parameters()} == {torch.float32}
    theirs = dict(high.named_buffers())
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in low.named_buffers())


def test_a_tied_head_is_rounded_from_the_embeddings(tmp_path: Path) -> None:
    model = make_model(make_config(tie_embeddings=True))
    model.output.weight = model.tok_embeddings.weight
    save_model(model, tmp_path / "m", dtype=torch.float32)
    loaded = load(tmp_path / "m", quant=RECIPE)
    quantize_model(model, RECIPE)
    assert isinstance(loaded.output, QuantizedLinear)
    assert torch.equal(loaded.output.qweight, model.output.qweight)
    assert torch.equal(loaded.tok_embeddings.weight, model.tok_embeddings.weight)
    plain = load(tmp_path / "m", quant="int8")
    assert plain.output.weight is plain.tok_embeddings.weight


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_hf(make_model(make_config(hidden_dim=40)), tmp_path / "m")
    with pytest.raises(ConfigError, match=r"experts.w2: rows of 40 values .* group size, 32"):
        load(tmp_path / "m", quant="int4")
    with pytest.raises(ConfigError, match="bits is 5; the kernels have"):
        load(tmp_path / "m", quant="int5")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = make_model()
    model.layers[1].feed_forward.experts.w2.data[7, 5, 3] = float("inf")
    save_hf(model, tmp_path / "m")
    name = r"model\.layers\.1\.block_sparse_moe\.experts\.7\.w2\.weight: rows 0 .* not finite"
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path / "m", quant="int4")


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe": None}, {"tie_embeddings": True}, {"n_heads": 6, "n_kv_heads": 1, "head_dim": 32}],
    ids=["mixtral", "mistral", "tied", "odd rows"],
)
def test_the_estimate_is_what_a_model_holds(
    tmp_path: Path, quant: Any, changes: dict[str, Any]
) -> None:
    """To the byte, loaded from a plain folder or from a quantised one."""
    config: ModelConfig = make_config(dim=96, **changes)
    model = make_model(config)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    save_model(model, tmp_path / "m")
    estimated = count_weight_bytes(config, quant=quant)
    assert count_bytes(load(tmp_path / "m", quant=None if quant == "none" else quant)) == estimated
    if quant != "none":
        recipe = QuantRecipe.from_format(QuantFormat.parse(quant))
        assert count_bytes(load(save_quantized(model, tmp_path / "q", recipe))) == estimated


def test_answers_of_a_quantised_llm(tmp_path: Path) -> None:
    """From Python: on load, from a folder, and the same either way."""
    folder = save_tiny_model(tmp_path / "m")
    params = SamplingParams(temperature=0, max_tokens=12)
    llm = LLM(folder, quant="int8", dtype=torch.bfloat16)
    answer = llm.generate("Once", params)
    assert len(answer.token_ids) == 12
    recipe = QuantRecipe.from_format(QuantFormat(8))
    quantised = save_quantized(load(folder), tmp_path / "q", recipe)
    (quantised / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert LLM(quantised).generate("Once", params).token_ids == answer.token_ids


def test_a_list_of_prompts_gives_each_its_own_answer(tmp_path: Path) -> None:
    llm = LLM(save_tiny_model(tmp_path / "m"), quant="int8", dtype=torch.float32)
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts = ["Once upon a time", "x", "the second of two"]
    alone = [llm.generate(prompt, params).token_ids for prompt in prompts]
    assert [c.token_ids for c in llm.generate(prompts, params)] == alone


def test_the_bundled_model_takes_it_too() -> None:
    llm = LLM(quant="int4")
    assert sum(isinstance(m, PackedMatrix) for m in llm.model.modules()) == 6 * (4 + 3)
    assert llm.generate("Once upon", SamplingParams(temperature=0, max_tokens=3)).text
