"""Tokens on disk, one folder per domain and split, memory-mapped: any number of them costs no RAM.

A folder's name ends in a fingerprint of the text file and the tokenizer: it is made once and found
again. `tokens.bin` holds the documents one after another, each as <s> tokens </s>.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tramontane.atomic import atomic_folder
from tramontane.data.sources import Source, Split, read_documents, require_distinct_domains
from tramontane.errors import DataError
from tramontane.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_FORMAT = 1  # part of the fingerprint: raise it when the files change in form or meaning
_REMEDIES = {
    "train": "give text to train on",
    "valid": 'give more text, or mark some records with "split": "valid"',
}
_CHARS_PER_BATCH = 4_000_000  # the library needs about 100 bytes per token while it encodes


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The documents of one domain and split, as token ids."""

    domain: str
    split: Split
    fingerprint: str  # of the text and the tokenizer, in hex
    tokens: np.ndarray  # (all tokens,) uint16 or uint32, memory-mapped
    offsets: np.ndarray  # (documents + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]]
    byte_counts: np.ndarray  # (documents,) int64: UTF-8 bytes of each text

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.byte_counts)

    @property
    def num_targets(self) -> int:
        """Tokens to predict in one pass: all but each document's <s>."""
        return len(self.tokens) - self.num_documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.byte_counts.sum())

    def document(self, index: int) -> np.ndarray:
        """<s>, tokens, </s> of one document; at least 3 ids."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def prepare_token_files(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    splits: Sequence[Split] = ("train", "valid"),
) -> dict[tuple[str, Split], TokenFile]:
    """Encodes what `folder` does not hold yet, and opens these splits of every source's domain.

    Raises ConfigError (two sources of one domain), DataError (a source cannot be read or has an
    empty split; a token file is damaged or cannot be written), CapacityError (the disk is full).
    """
    require_distinct_domains(sources)
    files = {}
    for source in sources:
        fingerprint = _compute_fingerprint(source, tokenizer)
        for split in splits:
            path = Path(folder) / f"{source.domain}-{split}-{fingerprint[:16]}"
            if not path.exists():
                _write(path, source, split=split, tokenizer=tokenizer, fingerprint=fingerprint)
            files[source.domain, split] = open_token_file(path)
    return files


def open_token_file(path: str | Path) -> TokenFile:
    """Maps one prepared folder. Raises DataError if a file of it is missing or cut."""
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        file = TokenFile(
            domain=meta["domain"],
            split=meta["split"],
            fingerprint=meta["fingerprint"],
            tokens=np.memmap(path / "tokens.bin", dtype=meta["dtype"], mode="r"),
            offsets=np.load(path / "offsets.npy", allow_pickle=False),
            byte_counts=np.load(path / "byte_counts.npy", allow_pickle=False),
        )
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it, it will be made again") from error
    if len(file.offsets) != file.num_documents + 1 or file.offsets[-1] != len(file.tokens):
        raise DataError(f"{path} is damaged (its sizes differ): delete it, it will be made again")
    return file


def _compute_fingerprint(source: Source, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, source.text_field]).encode())
    digest.update(hashlib.sha256(tokenizer.to_json().encode()).digest())
    try:
        with open(source.path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error})") from error
    return digest.hexdigest()


def _write(
    path: Path, source: Source, *, split: Split, tokenizer: Tokenizer, fingerprint: str
) -> None:
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    lengths, byte_counts = [], []
    with atomic_folder(path) as temporary:
        with open(temporary / "tokens.bin", "wb") as file:
            for text, document in _encode_documents(read_documents(source, split=split), tokenizer):
                file.write(np.array(document, dtype=dtype).tobytes())
                lengths.append(len(document))
                byte_counts.append(len(text.encode("utf-8")))
        if not lengths:
            raise DataError(f"{source.path} holds no {split} document: {_REMEDIES[split]}")
        np.save(temporary / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        np.save(temporary / "byte_counts.npy", np.array(byte_counts, dtype=np.int64))
        meta = {"domain": source.domain, "split": split, "fingerprint": fingerprint, "dtype": dtype}
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    log.info("%s: %d %s documents, %d tokens", source.path, len(lengths), split, sum(lengths))


def _encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[str, list[int]]]:
    """Yields each text with its ids, from <s> to </s>."""
    for group in _group(texts):
        for text, ids in zip(group, tokenizer.encode_batch(group), strict=True):
            yield text, [tokenizer.bos_id, *ids, tokenizer.eos_id]


def _group(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups of whole texts, each group at least _CHARS_PER_BATCH long but for the last."""
    group: list[str] = []
    num_chars = 0
    for text in texts:
        group.append(text)
        num_chars += len(text)
        if num_chars >= _CHARS_PER_BATCH:
            yield group
            group, num_chars = [], 0
    if group:
        yield group
