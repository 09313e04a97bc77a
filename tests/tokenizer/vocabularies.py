"""Mistral's own 32,000 pieces (packaged with mistral-common) in each form that models come in."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers.tokenization_utils_base import generate_merges

DATA = Path(mistral_common.__file__).parent / "data"
V1_FILE = DATA / "tokenizer.model.v1"
V3_FILE = DATA / "mistral_instruct_tokenizer_240323.model.v3"
FILES = {1: V1_FILE, 2: DATA / "mistral_instruct_tokenizer_240216.model.v2", 3: V3_FILE}
CONTROL = ("<unk>", "<s>", "</s>")


@cache
def oracle() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(V1_FILE))


def list_pieces() -> list[str]:
    return [oracle().id_to_piece(i) for i in range(oracle().vocab_size())]


@cache
def make_hub_json() -> str:
    """A tokenizer.json as in the hub's Mixtral folders, its merges made by transformers."""
    vocab = {piece: i for i, piece in enumerate(list_pieces())}
    scores = {piece: oracle().get_score(i) for piece, i in vocab.items()}
    backend = Tokenizer(
        models.BPE(vocab, generate_merges(vocab, scores), unk_token="<unk>", fuse_unk=True,
                   byte_fallback=True)
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.add_special_tokens(list(CONTROL))
    return backend.to_str()


def make_modern_json() -> str:
    """As newer converters write it: the space before the first text alone."""
    content = json.loads(make_hub_json())
    content["normalizer"] = None
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581",
                                "prepend_scheme": "first", "split": False}  # fmt: skip
    return json.dumps(content)


@cache
def _types() -> tuple[int, ...]:
    model = oracle()
    return tuple(
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(model.vocab_size())
    )


def make_gguf_metadata() -> dict[str, Any]:
    """The vocabulary keys of a Mixtral GGUF file."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list_pieces(),
        "tokenizer.ggml.scores": [oracle().get_score(i) for i in range(oracle().vocab_size())],
        "tokenizer.ggml.token_type": list(_types()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
