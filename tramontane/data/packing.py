"""Token files to training batches: rows of exactly seq_len tokens, filled with pieces of documents.

A document of n + 2 ids (<s>, n tokens, </s>) gives n + 1 inputs, each with the next id as target.
What does not fit into a row is continued later as a segment of its own: no target is lost.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from tramontane.data.token_files import TokenFile
from tramontane.errors import ConfigError, DataError


class PackedBatch(NamedTuple):
    """T tokens of several segments, one after another; attention must not cross segments."""

    tokens: np.ndarray  # (T,) int64
    targets: np.ndarray  # (T,) int64, the id that follows each token; -100 would not be counted
    seqlens: tuple[int, ...]  # of the segments; their sum is T
    domains: tuple[str, ...]  # of the segments


class HeldOutBatch(NamedTuple):
    """At most seq_len tokens of held-out text, and the bytes of the documents that end in it."""

    batch: PackedBatch
    num_bytes: int


@dataclass
class _Cursor:
    """How far one domain is read: next comes token `offset` of the epoch's document `position`."""

    epoch: int = 0
    position: int = 0
    offset: int = 0
    tokens: int = 0  # given so far, over all epochs


class _DomainReader:
    """Gives the documents of one file in pieces, each once per epoch, in shuffled order."""

    def __init__(self, file: TokenFile, *, seed: int) -> None:
        self.file = file
        self._seed = seed
        self.cursor = _Cursor()
        self._order = self._shuffle()

    def restore(self, cursor: _Cursor) -> None:
        self.cursor = cursor
        self._order = self._shuffle()

    def take(self, room: int) -> np.ndarray:
        """The next piece, 2 to room + 1 ids: its inputs are [:-1], its targets [1:]."""
        cursor = self.cursor
        document = self.file.document(self._order[cursor.position])
        piece = document[cursor.offset : cursor.offset + room + 1]
        cursor.tokens += len(piece) - 1
        cursor.offset += len(piece) - 1
        if cursor.offset == len(document) - 1:
            self._go_to_next_document()
        return piece

    def _go_to_next_document(self) -> None:
        cursor = self.cursor
        cursor.position, cursor.offset = cursor.position + 1, 0
        if cursor.position == self.file.num_documents:
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
            self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        """(documents,) an order that depends on seed, domain and epoch alone.

        Raw random words are sorted because numpy promises their values for all its versions, which
        it does not for `permutation`.
        """
        entropy = [self._seed, zlib.crc32(self.file.domain.encode()), self.cursor.epoch]
        words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(self.file.num_documents)
        return np.argsort(words, kind="stable")


class PackedStream:
    """An endless, deterministic stream of batches in which each domain has its share of the tokens.

    Each segment comes from the domain that is furthest below its share, so shares are exact up to a
    row at any time. The stream is a function of files, weights, seed, and the tokens given so far.
    """

    def __init__(
        self,
        files: Mapping[str, TokenFile],
        weights: Mapping[str, float],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """`files` and `weights` by domain. Raises ConfigError, and DataError for an empty file."""
        _require_usable(files, weights)
        total = sum(weights.values())
        self._shares = {domain: weights[domain] / total for domain in sorted(files)}
        self._readers = {
            domain: _DomainReader(files[domain], seed=seed) for domain in sorted(files)
        }
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Tokens given so far."""
        return {domain: reader.cursor.tokens for domain, reader in self._readers.items()}

    def next_batch(self) -> PackedBatch:
        """`batch_size` rows of `seq_len` tokens each, end to end; no segment crosses a row."""
        pieces: list[tuple[str, np.ndarray]] = []
        for _ in range(self._batch_size):
            room = self._seq_len
            while room > 0:
                domain = self._choose_domain()
                piece = self._readers[domain].take(room)
                pieces.append((domain, piece))
                room -= len(piece) - 1
        return _join(pieces)

    def state(self) -> dict[str, Any]:
        """All that `load_state` needs to go on with the same next batch; plain JSON values."""
        return {
            "seed": self._seed,
            "domains": {
                domain: {"fingerprint": reader.file.fingerprint, "cursor": asdict(reader.cursor)}
                for domain, reader in self._readers.items()
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. Raises DataError if seed, domains or data differ."""
        saved = state["domains"]
        ours = {domain: reader.file.fingerprint for domain, reader in self._readers.items()}
        theirs = {domain: entry["fingerprint"] for domain, entry in saved.items()}
        if changed := sorted(d for d in ours | theirs if ours.get(d) != theirs.get(d)):
            raise DataError(
                f"the run was saved with other text or another tokenizer in {', '.join(changed)}: "
                f"restore them, or start a new run"
            )
        if state["seed"] != self._seed:
            raise DataError(f"the run was saved with seed {state['seed']}, not {self._seed}")
        for domain, reader in self._readers.items():
            reader.restore(_Cursor(**saved[domain]["cursor"]))

    def _choose_domain(self) -> str:
        """The domain that will lack most after the next token; of equals, the first by name."""
        given = self.tokens_by_domain
        total = sum(given.values()) + 1
        return max(self._shares, key=lambda domain: self._shares[domain] * total - given[domain])


def iterate_held_out(file: TokenFile, *, seq_len: int, max_tokens: int) -> Iterator[HeldOutBatch]:
    """Whole documents in file order, until the next would exceed `max_tokens` (at least one).

    Bits per byte are the negative log2-likelihoods of all targets, </s> included, over all bytes. A
    document longer than `seq_len` is cut, and each piece is predicted without the ones before it.
    """
    pieces: list[tuple[str, np.ndarray]] = []
    room, num_bytes = seq_len, 0
    for index in range(_count_documents(file, max_tokens)):
        document = file.document(index)
        for start in range(0, len(document) - 1, seq_len):
            piece = document[start : start + seq_len + 1]
            if len(piece) - 1 > room:
                yield HeldOutBatch(_join(pieces), num_bytes)
                pieces, room, num_bytes = [], seq_len, 0
            pieces.append((file.domain, piece))
            room -= len(piece) - 1
        num_bytes += int(file.byte_counts[index])
    yield HeldOutBatch(_join(pieces), num_bytes)


def _count_documents(file: TokenFile, max_tokens: int) -> int:
    num_inputs = file.offsets[1:] - np.arange(1, file.num_documents + 1)  # (documents,) cumulated
    return max(1, int(np.searchsorted(num_inputs, max_tokens, side="right")))


def _join(pieces: list[tuple[str, np.ndarray]]) -> PackedBatch:
    return PackedBatch(
        tokens=np.concatenate([piece[:-1] for _, piece in pieces]).astype(np.int64),
        targets=np.concatenate([piece[1:] for _, piece in pieces]).astype(np.int64),
        seqlens=tuple(len(piece) - 1 for _, piece in pieces),
        domains=tuple(domain for domain, _ in pieces),
    )


def _require_usable(files: Mapping[str, TokenFile], weights: Mapping[str, float]) -> None:
    if not files:
        raise ConfigError("there is no token file to read batches from")
    if files.keys() != weights.keys():
        raise ConfigError(
            f"weights are given for {sorted(weights)}, but there are files for {sorted(files)}"
        )
    for domain, file in files.items():
        if weights[domain] <= 0:
            raise ConfigError(f"domain {domain}: weight is {weights[domain]}, but must be positive")
        if file.num_documents == 0:
            raise DataError(f"domain {domain} holds no {file.split} document")
