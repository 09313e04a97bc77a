"""A sample of training text in the proportions of the mixture, for the tokenizer to learn from."""

from collections.abc import Iterable, Iterator, Sequence

from tramontane.data.sources import Source, read_documents, require_distinct_domains
from tramontane.errors import DataError


def sample_documents(sources: Sequence[Source], *, max_chars: int) -> Iterator[str]:
    """Yields about `max_chars` characters of training text, or as many as the sources hold.

    Each domain has its share by weight: whole documents are taken evenly over its file, and a
    domain that is too small is repeated, as training does. Deterministic. Raises ConfigError and
    DataError.
    """
    require_distinct_domains(sources)
    sizes = [_count_chars(source) for source in sources]
    budget = min(max_chars, sum(sizes))
    total_weight = sum(source.weight for source in sources)
    for source, size in zip(sources, sizes, strict=True):
        share = int(budget * source.weight / total_weight)
        repeats, rest = divmod(share, size)
        for _ in range(repeats):
            yield from read_documents(source, split="train")
        yield from _spread(read_documents(source, split="train"), share=rest / size)


def _count_chars(source: Source) -> int:
    size = sum(len(text) for text in read_documents(source, split="train"))
    if size == 0:
        raise DataError(f"{source.path}: no training text; domain {source.domain} is empty")
    return size


def _spread(texts: Iterable[str], *, share: float) -> Iterator[str]:
    """Takes a text when the `share` of the characters seen so far has room for it whole.

    What the share still lacks at the end is cut from a text left out.
    """
    seen = taken = 0
    skipped = ""
    for text in texts:
        seen += len(text)
        if taken + len(text) <= share * seen:
            taken += len(text)
            yield text
        else:
            skipped = text
    if rest := skipped[: int(share * seen) - taken]:
        yield rest
