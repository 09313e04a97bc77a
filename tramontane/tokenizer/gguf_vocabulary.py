"""Vocabularies of GGUF files: the metadata keys tokenizer.ggml.*, both ways.

Model "llama" is SentencePiece's BPE (tokens, scores, types), "gpt2" is BPE over bytes (tokens,
merges, and the name `pre` of the expression that cuts a text before merging).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tramontane.errors import TokenizerError
from tramontane.tokenizer.chat_loading import format_version_from_gguf
from tramontane.tokenizer.gguf_padding import add_padding, count_tokens
from tramontane.tokenizer.json_tokenizer import GPT2_PATTERN, JsonTokenizer
from tramontane.tokenizer.model_proto import Piece, PieceType, write_model
from tramontane.tokenizer.sentence_piece import SentencePieceTokenizer
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import TRAINED_PATTERN

GGML_PREFIX = "tokenizer.ggml."
EOT_KEY = GGML_PREFIX + "eot_token_id"  # a second id that ends an answer
_JSON_KEY = "tokenizer.huggingface.json"  # GGUF's own name for a whole tokenizer.json

# How llama.cpp cuts a text, by the value of tokenizer.ggml.pre: one expression after the other.
_GPT2 = (GPT2_PATTERN,)
_DIGITS_ALONE = (r"\p{N}", *_GPT2)
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = (_LLAMA3[0].replace(r"\p{N}{1,3}", r"\p{N}"),)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "smollm": _DIGITS_ALONE,
    "starcoder": _DIGITS_ALONE,
    "refact": _DIGITS_ALONE,
    "command-r": _DIGITS_ALONE,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
}
# The nearest that llama.cpp has to the pieces of `trainer._PIECES`; see `describe_for_gguf`.
_NEAREST_PRE = "qwen2"


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, origin: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes. Raises TokenizerError, naming `origin`.

    Values may be lists or arrays, texts str or UTF-8 bytes. Where the file holds a whole
    tokenizer.json ("tokenizer.huggingface.json", as ours do), that one counts: it is exact. Tokens
    that only fill up the rows of the embeddings are no part of it.
    """
    model = _read_text(metadata, "model", origin)
    tokens = [_to_text(token, origin) for token in _read_list(metadata, "tokens", origin)]
    if (count := count_tokens(tokens, metadata.get(GGML_PREFIX + "token_type"))) < len(tokens):
        metadata, tokens = _cut_padding(metadata, count, origin), tokens[:count]
    if model == "llama":
        tokenizer: Tokenizer = _read_sentence_piece(metadata, tokens, origin)
    elif model == "gpt2":
        tokenizer = _read_byte_level(metadata, tokens, origin)
    else:
        raise TokenizerError(
            f"{origin} has tokenizer.ggml.model {model!r}; supported are 'llama' and 'gpt2'"
        )
    tokenizer.adds_bos = bool(metadata.get(GGML_PREFIX + "add_bos_token", True))
    return tokenizer


def describe_for_gguf(tokenizer: Tokenizer, *, num_rows: int = 0) -> dict[str, Any]:
    """The keys tokenizer.ggml.* for `tokenizer`: scores are float32, types and ids int32 in GGUF.

    Where the embeddings have more rows (`num_rows`), unused tokens fill up (gguf_padding.py).

    A byte-level BPE also gets its whole tokenizer.json, so that it comes back exactly. llama.cpp
    reads `pre` instead and knows no expression equal to that of `trainer._PIECES`. "qwen2" is the
    nearest: it gave the bundled model's ids for 448 of 450 documents ("default": 12). It cuts
    otherwise in three places: before a combining mark within a word, not between a word and the
    sign before it ("(word"), and not between a full stop and the line end behind it. For other
    expressions `pre` is the name of an equal one, or else "default".
    """
    if isinstance(tokenizer, JsonTokenizer) and tokenizer.is_byte_level:
        described = _describe_byte_level(tokenizer)
    else:
        described = _describe_sentence_piece(tokenizer)
    add_padding(described, num_rows)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if tokenizer.unk_id is not None:
        ids["unknown_token_id"] = tokenizer.unk_id
    flags = {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    return {
        key if key == _JSON_KEY else GGML_PREFIX + key: value
        for key, value in (described | ids | flags).items()
    }


def _cut_padding(metadata: Mapping[str, Any], count: int, origin: str) -> Mapping[str, Any]:
    keys = [key for key in ("token_type", "scores") if GGML_PREFIX + key in metadata]
    cut = {GGML_PREFIX + key: _read_list(metadata, key, origin)[:count] for key in keys}
    return {**metadata, **cut}


def _read_sentence_piece(
    metadata: Mapping[str, Any], tokens: Sequence[str], origin: str
) -> SentencePieceTokenizer:
    scores = _read_list(metadata, "scores", origin)
    types = _read_list(metadata, "token_type", origin)
    try:
        pieces = [
            Piece(text, float(score), PieceType(int(kind)))
            for text, score, kind in zip(tokens, scores, types, strict=True)
        ]
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{origin}: tokens, scores and types disagree ({error})") from error
    adds_space = bool(metadata.get(GGML_PREFIX + "add_space_prefix", True))
    bos_id = _read_id(metadata, "bos_token_id", origin, default=1)
    eos_id = _read_id(metadata, "eos_token_id", origin, default=2)
    return SentencePieceTokenizer(
        write_model(pieces, bos_id=bos_id, eos_id=eos_id, adds_prefix_space=adds_space),
        origin=origin,
        unk_id=_read_id(metadata, "unknown_token_id", origin, default=0),
        bos_id=bos_id,
        eos_id=eos_id,
        format_version=format_version_from_gguf(metadata),
    )


def _read_byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], origin: str
) -> JsonTokenizer:
    names = _read_names(metadata, tokens, origin)
    if _JSON_KEY in metadata:
        text = _to_text(metadata[_JSON_KEY], origin)
        tokenizer = JsonTokenizer.from_json(text, origin=origin, names=names)
        if tokenizer.describe_pieces() != list(tokens):
            raise TokenizerError(
                f"{origin}: tokenizer.ggml.tokens and {_JSON_KEY} hold different vocabularies; "
                f"convert the model again"
            )
        return tokenizer
    return JsonTokenizer.from_json(
        json.dumps(_build_tokenizer_json(metadata, tokens, names, origin)),
        origin=origin, names=names,
    )  # fmt: skip


def _read_names(metadata: Mapping[str, Any], tokens: Sequence[str], origin: str) -> dict[str, str]:
    """What the tokens of each role are called; a role that the file leaves out keeps its name."""
    keys = {"unk_token": "unknown_token_id", "bos_token": "bos_token_id",
            "eos_token": "eos_token_id"}  # fmt: skip
    names = {}
    for role, key in keys.items():
        if GGML_PREFIX + key in metadata:
            token_id = _read_id(metadata, key, origin, default=0)
            if not 0 <= token_id < len(tokens):
                raise TokenizerError(f"{origin}: {key} is {token_id} of {len(tokens)} tokens")
            names[role] = tokens[token_id]
    return names


def _build_tokenizer_json(
    metadata: Mapping[str, Any], tokens: Sequence[str], names: Mapping[str, str], origin: str
) -> dict[str, Any]:
    merges = [_to_text(merge, origin) for merge in _read_list(metadata, "merges", origin)]
    types = metadata.get(GGML_PREFIX + "token_type")
    kinds = [PieceType.NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]
    control = set(names.values())
    added = [
        _describe_added(i, text, special=kind == PieceType.CONTROL or text in control)
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN) or text in control
    ]
    pre = _to_text(metadata.get(GGML_PREFIX + "pre", "default"), origin)
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"{origin} has tokenizer.ggml.pre {pre!r}; supported are {', '.join(_PRE_TOKENIZERS)}"
        )
    splits = [_describe_split(pattern) for pattern in _PRE_TOKENIZERS[pre]]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                "use_regex": False}  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, to_bytes]},
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": merges,
        },
    }


def _describe_added(token_id: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, "special": special} | flags


def _describe_split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": False}  # fmt: skip


def _describe_byte_level(tokenizer: JsonTokenizer) -> dict[str, Any]:
    control = set(tokenizer.control_ids.values())
    pieces = tokenizer.describe_pieces()
    return {
        "model": "gpt2",
        "pre": _choose_pre(tokenizer),
        "tokens": pieces,
        "token_type": [
            int(PieceType.CONTROL if i in control else PieceType.NORMAL) for i in range(len(pieces))
        ],
        "merges": [f"{left} {right}" for left, right in tokenizer.list_merges()],
        _JSON_KEY: tokenizer.to_json(),
    }


def _choose_pre(tokenizer: JsonTokenizer) -> str:
    patterns = tokenizer.list_split_patterns()
    equal = [name for name, known in _PRE_TOKENIZERS.items() if known == patterns]
    if equal:
        return equal[0]
    return _NEAREST_PRE if patterns == (TRAINED_PATTERN,) else "default"


def _describe_sentence_piece(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.list_pieces()
    elif isinstance(tokenizer, JsonTokenizer):
        pieces = _derive_pieces(tokenizer)
    else:
        raise TokenizerError(f"a {type(tokenizer).__name__} has no form in GGUF")
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": [int(piece.type) for piece in pieces],
        "add_space_prefix": tokenizer.adds_prefix_space,
    }


def _derive_pieces(tokenizer: JsonTokenizer) -> list[Piece]:
    """Scores that rank pieces as the merges do: the first merge that makes a piece counts."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(tokenizer.list_merges()):
        rank.setdefault(left + right, i)
    control, last = set(tokenizer.control_ids.values()), len(rank)
    pieces = []
    for i, text in enumerate(tokenizer.describe_pieces()):
        if i == tokenizer.unk_id:
            pieces.append(Piece(text, 0.0, PieceType.UNKNOWN))
        elif i in control:
            pieces.append(Piece(text, 0.0, PieceType.CONTROL))
        elif tokenizer.is_byte_piece(i):
            pieces.append(Piece(text, 0.0, PieceType.BYTE))
        else:
            pieces.append(Piece(text, -float(rank.get(text, last)), PieceType.NORMAL))
    return pieces


def _read_list(metadata: Mapping[str, Any], key: str, origin: str) -> Sequence[Any]:
    value = metadata.get(GGML_PREFIX + key)
    if value is None or isinstance(value, str | bytes | int | float):
        raise TokenizerError(
            f"{origin} has no list {GGML_PREFIX}{key}: convert the model again, with its vocabulary"
        )
    return list(value)


def _read_text(metadata: Mapping[str, Any], key: str, origin: str) -> str:
    if GGML_PREFIX + key not in metadata:
        raise TokenizerError(
            f"{origin} has no {GGML_PREFIX}{key}: convert the model again, with its vocabulary"
        )
    return _to_text(metadata[GGML_PREFIX + key], origin)


def _read_id(metadata: Mapping[str, Any], key: str, origin: str, *, default: int) -> int:
    value = metadata.get(GGML_PREFIX + key, default)
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{origin}: {GGML_PREFIX}{key} is {value!r}, not an id") from error


def _to_text(value: object, origin: str) -> str:
    try:
        if isinstance(value, bytes | bytearray):
            return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{origin} holds a text that is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise TokenizerError(f"{origin} holds {value!r} where its vocabulary needs a text")
    return value
