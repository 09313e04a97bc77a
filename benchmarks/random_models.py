"""Mixtrals of random weights for benchmarks, in every form that a contender reads."""

import shutil
from pathlib import Path
from typing import NamedTuple

import mistral_common
import torch

from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.parameters import StoredParameters
from tramontane.checkpoint.writer import save_model
from tramontane.config import ModelConfig, MoeConfig
from tramontane.engine.vocabulary import require_tokenizer
from tramontane.models.transformer import Transformer, build_model
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf

VOCABULARY = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
GGUF_TYPES = ("BF16", "Q8_0", "Q4_0")


class Size(NamedTuple):
    """The shapes that differ."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int


SIZES = {
    "S": Size(512, 1792, 8, 8, 4),
    "M": Size(1024, 3584, 16, 16, 4),
    "L": Size(4096, 14336, 2, 32, 8),  # two layers of Mixtral 8x7B
}


def write_model(name: str, folder: Path, *, bundled: Path) -> None:
    """FOLDER/NAME/hf and FOLDER/NAME/TYPE.gguf, unless they are there; `bundled` is copied."""
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "hf").exists():
        if name == "bundled":
            shutil.copytree(bundled, out / "hf")
        else:
            save_model(build_random_model(SIZES[name]), out / "hf")
            shutil.copy(VOCABULARY, out / "hf" / "tokenizer.model")
    checkpoint = open_checkpoint(out / "hf")
    metadata = describe_for_gguf(require_tokenizer(checkpoint))
    for encoding in GGUF_TYPES:
        path = out / f"{encoding}.gguf"
        if not path.exists():
            parameters = StoredParameters(checkpoint.pairs)
            write_gguf(parameters, checkpoint.config, path, encoding=encoding, metadata=metadata)


def build_random_model(size: Size) -> Transformer:
    """Weights of deviation 1 / sqrt(inputs), so that activations and the router behave."""
    config = ModelConfig(
        dim=size.dim,
        hidden_dim=size.hidden_dim,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        n_kv_heads=size.n_kv_heads,
        head_dim=size.dim // size.n_heads,
        vocab_size=32000,
        moe=MoeConfig(),
    )
    model = build_model(config, device="meta").to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1234)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            deviation = 1.0 if name.startswith("tok_") else weight.shape[-1] ** -0.5
            for row in weight.flatten(0, -2).split(2**14):
                row.copy_(torch.randn(row.shape, generator=generator) * deviation)
    return model
