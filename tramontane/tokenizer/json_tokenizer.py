"""Vocabularies of a `tokenizer.json`: BPE over bytes (ours, GPT-2's), and the BPE that the hub's
Mistral and Mixtral folders hold, SentencePiece's pieces with bytes for all other characters.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from tramontane.errors import TokenizerError
from tramontane.tokenizer.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    SPACE_MARK,
    UNK_TOKEN,
    Tokenizer,
)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADD_BOS_KEY = "add_bos_token"  # in that file: whether texts start with bos_token
# What the library's ByteLevel cuts a text with, if nothing else is named.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ROLES = {"unk_token": UNK_TOKEN, "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}
_TRANSFORMERS_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    # Control-token names in a text stay plain text in transformers too.
    "split_special_tokens": True,
}


class JsonTokenizer(Tokenizer):
    """A BPE vocabulary of the `tokenizers` library, byte-level or SentencePiece's."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, origin: str = "tokenizer",
        names: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Wraps `backend`; `origin` names it in errors. Raises TokenizerError.

        `names` says what its unk_token, bos_token and eos_token are called if not <unk>, <s>, </s>.
        """
        # Names of control tokens in a text are text; tokenizer.json does not keep this setting.
        backend.encode_special_tokens = True
        backend.no_truncation()  # a text is encoded whole, whatever the file says
        backend.no_padding()
        self._stored, self._names = backend, _ROLES | dict(names or {})
        self._backend, self._inner = _space_like_sentence_piece(backend)
        self.is_byte_level = _is_byte_level(backend, origin)
        control_ids = _find_control_ids(backend, self._names, origin)
        super().__init__(
            _list_token_bytes(backend, control_ids, origin, is_byte_level=self.is_byte_level),
            control_ids,
            unk_id=control_ids.get(self._names["unk_token"]),
            bos_id=control_ids[self._names["bos_token"]],
            eos_id=control_ids[self._names["eos_token"]],
        )
        self.adds_prefix_space = not self.is_byte_level and self._adds_space()

    @classmethod
    def from_json(cls, text: str, *, origin: str, names: Mapping[str, str] | None = None) -> Self:
        """From the content of a `tokenizer.json`. Raises TokenizerError."""
        content = _parse(text, origin)
        backend = _build_backend(_without_control_merges(content), origin)
        return cls(backend, origin=origin, names=names)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a `tokenizer.json`, and the control tokens' names from `tokenizer_config.json`.

        Nothing else of that file is used: its `auto_map`, which names Python files, never is.
        Raises TokenizerError.
        """
        path = Path(path)
        names = read_control_names(path.with_name(TOKENIZER_CONFIG_FILE))
        return cls.from_json(read_text(path), origin=str(path), names=names)

    def to_json(self) -> str:
        """The content of `tokenizer.json`: tokenizers are the same exactly when this is equal."""
        return self._stored.to_str(pretty=True)

    def save(self, folder: str | Path) -> None:
        """Writes into `folder` what `transformers.AutoTokenizer` needs to give equal ids."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        names = {role: name for role, name in self._names.items() if name in self.control_ids}
        config = _TRANSFORMERS_CONFIG | ({} if self.adds_bos else {ADD_BOS_KEY: False})
        files = {
            TOKENIZER_FILE: self.to_json(),
            TOKENIZER_CONFIG_FILE: json.dumps(names | config, indent=2),
            "special_tokens_map.json": json.dumps(names, indent=2),
        }
        for name, content in files.items():
            (target / name).write_text(content + "\n", encoding="utf-8")

    def encode_after_control(self, text: str) -> list[int]:
        """Token ids of `text` where a control token precedes it. Raises TokenizerError."""
        return self._require_text(self._inner.encode(text, add_special_tokens=False).ids)

    def describe_pieces(self) -> list[str]:
        """Each id's piece as `tokenizer.json` writes it."""
        pieces = [""] * self.vocab_size
        for piece, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            pieces[token_id] = piece
        return pieces

    def list_merges(self) -> list[tuple[str, str]]:
        """The pairs of pieces that become one, in order of precedence."""
        merges = json.loads(self._stored.to_str())["model"]["merges"]
        return [tuple(merge) if isinstance(merge, list) else _halve(merge) for merge in merges]

    def list_split_patterns(self) -> tuple[str, ...]:
        """The expressions that cut a text before merging, in order; a byte-level BPE has some."""
        splitter = json.loads(self._stored.to_str())["pre_tokenizer"] or {}
        steps = splitter.get("pretokenizers", [splitter])
        patterns = [
            GPT2_PATTERN if step.get("use_regex") else step.get("pattern", {}).get("Regex")
            for step in steps
        ]
        return tuple(pattern for pattern in patterns if pattern is not None)

    def is_byte_piece(self, token_id: int) -> bool:
        """Whether the piece stands for one byte that is no character's piece ("<0x0A>")."""
        return self._backend.id_to_token(token_id) in _BYTE_PIECES

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _adds_space(self) -> bool:
        ids = self._backend.encode("a", add_special_tokens=False).ids
        return b"".join(self._bytes_of_token[i] for i in ids) == b" a"

    def _is_spaced(self, token_id: int) -> bool:
        piece = self._backend.id_to_token(token_id)
        return piece is not None and piece.startswith((SPACE_MARK, " "))


def read_text(path: Path) -> str:
    """The text of a tokenizer's file. Raises TokenizerError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot read the tokenizer ({error})") from error


def read_control_names(path: Path) -> dict[str, str]:
    """What `tokenizer_config.json` calls unk, bos and eos; empty without one.

    Raises TokenizerError if it is no JSON object.
    """
    if not path.is_file():
        return {}
    content = _load_json(read_text(path), str(path))
    names = {}
    for role in _ROLES:
        value = content.get(role)
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str) and name:
            names[role] = name
    return names


def read_adds_bos(path: Path) -> bool:
    """Whether `tokenizer_config.json` lets texts start with bos; they do unless it says no.

    Raises TokenizerError if it is no JSON object.
    """
    content = _load_json(read_text(path), str(path)) if path.is_file() else {}
    return content.get(ADD_BOS_KEY) is not False


def _load_json(text: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{origin} is not JSON ({error}): get the file again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{origin} holds a {type(content).__name__}, not a JSON object")
    return content


def _parse(text: str, origin: str) -> dict[str, Any]:
    """Checks what the library would take on trust: a BPE whose ids are 0 to n-1, once each."""
    content = _load_json(text, origin)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise TokenizerError(f"{origin} has model {kind}; only BPE is supported")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):  # neither form of BPE has them, and the library trips over some
            raise TokenizerError(f"{origin} has {affix} {model[affix]!r}, which is not supported")
    vocab: Any = model.get("vocab")
    added = content.get("added_tokens") or []
    try:
        ids = set(vocab.values()) | {token["id"] for token in added}
        is_named = all(isinstance(token["content"], str) for token in added)
        is_dense = ids == set(range(len(ids))) and not any(isinstance(i, bool) for i in ids)
        is_once = len(vocab) == len(set(vocab.values()))
    except (AttributeError, TypeError, KeyError) as error:
        raise TokenizerError(f"{origin} is not a tokenizer.json: its vocabulary is none") from error
    if not (is_dense and is_once and is_named):
        raise TokenizerError(f"{origin} has ids with gaps, twice or unnamed: get the file again")
    return content


def _without_control_merges(content: dict[str, Any]) -> dict[str, Any]:
    """Drops merges that would spell a control token ("<s" and ">"), so that no text can."""
    control = {t.get("content") for t in content.get("added_tokens") or [] if t.get("special")}
    merges = content["model"].get("merges")
    if isinstance(merges, list):
        content["model"]["merges"] = [m for m in merges if _join_merge(m) not in control]
    return content


def _join_merge(merge: object) -> str | None:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    is_pair = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    return "".join(parts) if is_pair else None  # type: ignore[arg-type]


def _halve(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _build_backend(content: dict[str, Any], origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing more specific than Exception
        raise TokenizerError(f"{origin} is not a tokenizer.json: {error}") from error


def _is_byte_level(backend: tokenizers.Tokenizer, origin: str) -> bool:
    model, decoder = type(backend.model).__name__, type(backend.decoder).__name__
    if model == "BPE" and decoder == "ByteLevel":
        return True
    if model == "BPE" and decoder in ("Sequence", "Metaspace") and backend.model.byte_fallback:
        return False
    raise TokenizerError(
        f"{origin} has model {model} and decoder {decoder}; only byte-level BPE (BPE and "
        f"ByteLevel) and SentencePiece's BPE with byte_fallback are supported"
    )


def _find_control_ids(
    backend: tokenizers.Tokenizer, names: Mapping[str, str], origin: str
) -> dict[str, int]:
    added = backend.get_added_tokens_decoder()
    control = {token.content: i for i, token in sorted(added.items()) if token.special}
    for role, name in names.items():
        token_id = backend.token_to_id(name)
        if token_id is not None:
            control[name] = token_id
        elif role != "unk_token":
            raise TokenizerError(
                f"{origin} lacks the control token {name!r}: name its {role} in "
                f"{TOKENIZER_CONFIG_FILE} beside it"
            )
    return control


def _list_token_bytes(
    backend: tokenizers.Tokenizer, control_ids: Mapping[str, int], origin: str, *,
    is_byte_level: bool,
) -> list[bytes]:  # fmt: skip
    """The bytes of each id; a control token has none, an added one those of its content."""
    added = backend.get_added_tokens_decoder()
    decode_piece = _byte_level_decoder() if is_byte_level else decode_sentence_piece
    token_bytes = [b""] * backend.get_vocab_size()
    silent = set(control_ids.values())
    try:
        for piece, token_id in backend.get_vocab(with_added_tokens=False).items():
            if token_id not in added and token_id not in silent:
                token_bytes[token_id] = decode_piece(piece)
        for token_id, token in added.items():
            token_bytes[token_id] = b"" if token_id in silent else token.content.encode("utf-8")
    except (KeyError, IndexError) as error:
        raise TokenizerError(f"{origin} has ids with gaps, or pieces that are not bytes") from error
    if missing := set(range(256)) - {piece[0] for piece in token_bytes if len(piece) == 1}:
        if not is_byte_level and all(_byte_piece(b) in backend.get_vocab() for b in missing):
            return token_bytes
        raise TokenizerError(
            f"{origin} has no token for byte {min(missing)}, so that it cannot write every text: "
            f"use a vocabulary with all 256 bytes"
        )
    return token_bytes


def _byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


_BYTE_PIECES = {_byte_piece(byte): bytes([byte]) for byte in range(256)}


def decode_sentence_piece(piece: str) -> bytes:
    """The bytes of one of SentencePiece's pieces: "<0x0A>" is a byte, U+2581 a space."""
    return _BYTE_PIECES.get(piece) or piece.replace(SPACE_MARK, " ").encode("utf-8")


def _byte_level_decoder() -> Callable[[str], bytes]:
    byte_of = _map_characters_to_bytes()
    return lambda piece: bytes(byte_of[character] for character in piece)


def _map_characters_to_bytes() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own character, the other 68 follow U+00FF."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def _space_like_sentence_piece(
    backend: tokenizers.Tokenizer,
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Two backends: one for a text, one for a text that stands after a control token.

    They differ where `backend` puts its space before the first text alone. The library's Metaspace
    puts none before a text that starts with a space itself, so that " a" would come back as "a";
    SentencePiece and so Mistral's training always did, and so does the first of the two.
    """
    splitter = backend.pre_tokenizer
    if not isinstance(splitter, pre_tokenizers.Metaspace) or splitter.prepend_scheme == "never":
        return backend, backend
    unspaced = _copy(backend)
    unspaced.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=splitter.replacement, prepend_scheme="never", split=splitter.split
    )
    spaced = _copy(unspaced)
    steps = [normalizers.Prepend(splitter.replacement)]
    spaced.normalizer = normalizers.Sequence(
        [spaced.normalizer, *steps] if spaced.normalizer else steps
    )
    return spaced, unspaced if splitter.prepend_scheme == "first" else spaced


def _copy(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    return copy
