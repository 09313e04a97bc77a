"""The only place where foreign tensor names live: one table per layout."""

import re
from dataclasses import replace

from tramontane.checkpoint.name_table import NameTable
from tramontane.config.moe import RESIDUAL, ROUTERS

# Published Mixtral checkpoints, and what transformers 4 and 5 read.
HF = NameTable(
    title="Hugging Face",
    tok_embeddings="model.embed_tokens.weight",
    norm="model.norm.weight",
    output="lm_head.weight",
    layer="model.layers.{layer}.",
    attention={
        "wq": "self_attn.q_proj.weight", "wk": "self_attn.k_proj.weight",
        "wv": "self_attn.v_proj.weight", "wo": "self_attn.o_proj.weight",
    },
    attention_norm="input_layernorm.weight",
    ffn_norm="post_attention_layernorm.weight",
    dense={"w1": "mlp.gate_proj.weight", "w2": "mlp.down_proj.weight", "w3": "mlp.up_proj.weight"},
    gate="block_sparse_moe.gate.weight",
    experts={w: f"block_sparse_moe.experts.{{expert}}.{w}.weight" for w in ("w1", "w2", "w3")},
    expert_form="each",
    rope_pairs="halves",
    fields={
        "dim": "hidden_size", "vocab_size": "vocab_size", "head_dim": "head_dim",
        "hidden_dim": "intermediate_size", "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads", "n_layers": "num_hidden_layers",
        "num_experts": "num_local_experts", "tie_embeddings": "tie_word_embeddings",
    },
    derived=".rotary_emb.inv_freq",
)  # fmt: skip

# Transformers 5 in memory, and in folders that were saved as they lay there.
HF_FUSED = replace(
    HF,
    title="Hugging Face, fused experts",
    gate="mlp.gate.weight",
    experts={"w1": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj"},
    expert_form="fused",
)

# consolidated.safetensors, and consolidated.00.pth of the dense models.
MISTRAL = NameTable(
    title="Mistral",
    tok_embeddings="tok_embeddings.weight",
    norm="norm.weight",
    output="output.weight",
    layer="layers.{layer}.",
    attention={w: f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")},
    attention_norm="attention_norm.weight",
    ffn_norm="ffn_norm.weight",
    dense={w: f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")},
    gate="feed_forward.gate.weight",
    experts={w: f"feed_forward.experts.{{expert}}.{w}.weight" for w in ("w1", "w2", "w3")},
    expert_form="each",
    rope_pairs="neighbours",
    fields={
        "dim": "dim", "vocab_size": "vocab_size", "head_dim": "head_dim",
        "hidden_dim": "hidden_dim", "n_heads": "n_heads", "n_kv_heads": "n_kv_heads",
        "n_layers": "n_layers", "num_experts": "moe.num_experts",
        "tie_embeddings": "tied_embeddings",
    },
)  # fmt: skip

# The torrent of December 2023: consolidated.00.pt to consolidated.07.pt.
TORRENT = replace(
    MISTRAL,
    title="Mistral, as in the torrent",
    gate="block_sparse_moe.gate.weight",
    experts={w: f"block_sparse_moe.{w}" for w in ("w1", "w2", "w3")},
    expert_form="flat",
)

# llama.cpp's architecture "llama", which all of this family are written as.
GGUF = NameTable(
    title="GGUF",
    tok_embeddings="token_embd.weight",
    norm="output_norm.weight",
    output="output.weight",
    layer="blk.{layer}.",
    attention={
        "wq": "attn_q.weight", "wk": "attn_k.weight", "wv": "attn_v.weight",
        "wo": "attn_output.weight",
    },
    attention_norm="attn_norm.weight",
    ffn_norm="ffn_norm.weight",
    dense={"w1": "ffn_gate.weight", "w2": "ffn_down.weight", "w3": "ffn_up.weight"},
    gate="ffn_gate_inp.weight",
    experts={
        "w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight",
    },
    expert_form="stacked",
    rope_pairs="neighbours",
    fields={
        "dim": "llama.embedding_length", "vocab_size": "llama.vocab_size",
        "head_dim": "llama.attention.key_length", "hidden_dim": "llama.feed_forward_length",
        "n_heads": "llama.attention.head_count", "n_kv_heads": "llama.attention.head_count_kv",
        "n_layers": "llama.block_count", "num_experts": "llama.expert_count",
        "tie_embeddings": "that the embeddings are tied",
    },
    factors="rope_freqs.weight",
)  # fmt: skip

# Files that llama.cpp wrote before April 2024.
GGUF_EACH = replace(
    GGUF,
    title="GGUF, one tensor per expert",
    experts={
        "w1": "ffn_gate.{expert}.weight", "w2": "ffn_down.{expert}.weight",
        "w3": "ffn_up.{expert}.weight",
    },
    expert_form="each",
)  # fmt: skip

# Our own folder, of models that are no Mixtral: see ours.py.
_ROUTERS = [
    f"gate.{name}" for kind in ROUTERS.values() for name in (*kind.parameters, *kind.buffers)
]
OURS = replace(
    MISTRAL,
    title="tramontane",
    experts={w: f"feed_forward.experts.{w}" for w in ("w1", "w2", "w3")},
    expert_form="stacked",
    rope_pairs="halves",
    fields={**HF.fields, "num_experts": "moe.num_experts"},
    extras={name: f"feed_forward.{name}" for name in (*_ROUTERS, *RESIDUAL)},
)

# StripedHyena-7B (github.com/togethercomputer/stripedhyena), which is known by its name alone yet.
STRIPED_HYENA = re.compile(
    r"(.*\.)?blocks\.\d+\.(filter\.(poles|residues|short_filter_weight)|inner_mha_cls\.\S+)"
)
