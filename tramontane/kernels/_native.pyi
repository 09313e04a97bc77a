"""The extension module of csrc/module.cpp. Addresses are those of tensors' first numbers.

Types: 0 is fp32, 1 is bf16. `bits` of a weight is 0 for plain numbers.
"""

class Weight:
    """A matrix (N, M), or the first of a stack."""

    def __init__(
        self, data: int, type: int, bits: int, scales: int, zeros: int, num_rows: int,
        num_columns: int, group: int, expert_stride: int, /,
    ) -> None: ...  # fmt: skip

class Decoder:
    """See csrc/decoder.h."""

    def __init__(
        self, sizes: tuple[int, ...], eps: float, type: int, embeddings: int, norm: int,
        output: Weight, /,
    ) -> None: ...  # fmt: skip
    def add_layer(
        self, type: int, attention_norm: int, ffn_norm: int, attention: tuple[Weight, ...],
        gate: int, experts: tuple[Weight, ...], /,
    ) -> None: ...  # fmt: skip
    def run(
        self, tokens: int, num_tokens: int, keys: int, values_offset: int, layer_offset: int,
        cache_type: int, block_size: int, num_sequences: int, num_queries: int, num_keys: int,
        block_tables: int, max_blocks: int, cos: int, sin: int, num_positions: int, rows: int,
        num_rows: int, counts: int, num_slots: int, temperature: int, top_k: int, top_p: int,
        min_p: int, numbers: int, hidden: int, slot_weights: int, experts: int, router_logits: int,
        logits: int, next_tokens: int, is_finite: int, num_steps: int, seconds: float,
        ends: int, num_ends: int, num_threads: int, /,
    ) -> int: ...  # fmt: skip
    def list_seconds(self) -> dict[str, float]: ...

def linear(
    x: int, type: int, num_tokens: int, weights: tuple[Weight, ...], outs: tuple[int, ...],
    num_threads: int, /,
) -> None: ...  # fmt: skip
def experts(
    x: int, type: int, num_tokens: int, num_experts: int, num_slots: int, slot_weights: int,
    experts: int, w1: Weight, w2: Weight, w3: Weight, out: int, num_threads: int, /,
) -> None: ...  # fmt: skip
def norm(
    x: int, type: int, weight: int, weight_type: int, num_tokens: int, dim: int, eps: float,
    out: int, num_threads: int, /,
) -> None: ...  # fmt: skip
def norm_grad(
    x: int, type: int, weight: int, weight_type: int, grad: int, num_tokens: int, dim: int,
    eps: float, grad_x: int, grad_weight: int, num_threads: int, /,
) -> None: ...  # fmt: skip
def swiglu(gate: int, up: int, type: int, count: int, out: int, num_threads: int, /) -> None: ...
def swiglu_grad(
    gate: int, up: int, grad: int, type: int, count: int, out: int, grad_gate: int, grad_up: int,
    num_threads: int, /,
) -> None: ...  # fmt: skip
def rotate(
    x: int, type: int, num_tokens: int, num_heads: int, head_dim: int, stride: int, cos: int,
    sin: int, out: int, num_threads: int, /,
) -> None: ...  # fmt: skip
def attention(
    q: int, type: int, k: int, v: int, cache_type: int, num_queries: int, num_keys: int,
    num_heads: int, num_kv_heads: int, head_dim: int, head_slots: int, window: int, out: int,
    num_threads: int, /,
) -> None: ...  # fmt: skip
def paged_attention(
    q: int, type: int, num_tokens: int, keys: int, values: int, cache_type: int, block_size: int,
    num_sequences: int, num_queries: int, num_keys: int, block_tables: int, max_blocks: int,
    num_heads: int, num_kv_heads: int, head_dim: int, window: int, out: int, num_threads: int, /,
) -> None: ...  # fmt: skip
def router(
    x: int, type: int, weight: int, weight_type: int, num_tokens: int, dim: int, num_experts: int,
    num_slots: int, counts: int, slot_weights: int, experts: int, logits: int, num_threads: int, /,
) -> None: ...  # fmt: skip
def sample(
    logits: int, num_rows: int, num_columns: int, stride: int, temperature: int, top_k: int,
    top_p: int, min_p: int, numbers: int, tokens: int, num_threads: int, /,
) -> None: ...  # fmt: skip
def is_finite(x: int, count: int, size: int, infinity: int, num_threads: int, /) -> bool: ...
def use_openmp(path: str, /) -> bool: ...
def choose_kernels(name: str, /) -> bool: ...
def get_name() -> str: ...
