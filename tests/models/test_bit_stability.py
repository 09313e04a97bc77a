"""A token's logits are the same bits however the batch around it is cut (docs/numerics.md).

With torch's products in fp32 they are not: MKL sums a product of up to 7 rows in another order than
one of more. In bf16 they are where oneDNN has kernels.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.engine.paged import PagedSequences
from tests.tiny import make_config, make_model, make_tokens
from tramontane.models.transformer import Transformer

TOKENS = make_tokens(70)
WAYS = [
    ("native", torch.float32, {}),
    ("native", torch.float32, {"n_kv_heads": 1}),
    ("native", torch.bfloat16, {}),
    ("fused", torch.bfloat16, {}),
]


@pytest.fixture(params=WAYS, ids=str)
def model(request: pytest.FixtureRequest, choose_kernels: Callable[[str], None]) -> Transformer:
    kernels, dtype, changes = request.param
    if kernels == "fused" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 kernels here")
    choose_kernels(kernels)
    return make_model(make_config(**changes)).to(dtype)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def compute_alone(model: Transformer) -> Tensor:
    return model.compute_logits(model.forward_packed(TOKENS, (len(TOKENS),)).hidden)


@torch.inference_mode()
@pytest.mark.parametrize("before", [1, 5, 37, 64, 200])
def test_other_sequences_in_the_batch(model: Transformer, before: int) -> None:
    others = make_tokens(before + 3, seed=1)
    batch = torch.cat((others[:before], TOKENS, others[before:]))
    output = model.forward_packed(batch, (before, len(TOKENS), 3))
    logits = model.compute_logits(output.hidden)[before : before + len(TOKENS)]
    assert torch.equal(logits, compute_alone(model))


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 2, 3, 16, 33, 64])
def test_chunks_of_the_prompt(model: Transformer, chunk: int) -> None:
    cache, parts = PagedSequences(model), []
    for tokens in TOKENS.split(chunk):
        output = cache.run(tokens, [len(tokens)])
        parts.append(model.compute_logits(output.hidden))
    assert torch.equal(torch.cat(parts), compute_alone(model))


@pytest.mark.usefixtures("_two_threads")
def test_number_of_threads(model: Transformer) -> None:
    on_two = compute_alone(model)
    torch.set_num_threads(1)
    assert torch.equal(compute_alone(model), on_two)
