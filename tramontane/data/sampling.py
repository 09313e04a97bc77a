"""A sample of training text in the proportions of the mixture, for the tokenizer to learn from."""

from collections.abc import Iterable, Iterator, Sequence

from tramontane.data.sources import Source, read_documents, require_distinct_domains
from tramontane.errors import DataError


def sample_documents(sources: Sequence[Source], *, max_chars: int) -> Iterator[str]:
    """Yields about `max_chars` characters of training text, each domain by its weight.

    Whole documents are taken evenly over each file; a domain that is too small for its share is
    repeated, as training does. Deterministic. Raises ConfigError and DataError.
    """
    require_distinct_domains(sources)
    total_weight = sum(source.weight for source in sources)
    for source in sources:
        yield from _sample_domain(source, max_chars=int(max_chars * source.weight / total_weight))


def _sample_domain(source: Source, *, max_chars: int) -> Iterator[str]:
    num_chars = sum(len(text) for text in read_documents(source, split="train"))
    if num_chars == 0:
        raise DataError(f"{source.path}: no training text; domain {source.domain} is empty")
    repeats, rest = divmod(max_chars, num_chars)
    for _ in range(repeats):
        yield from read_documents(source, split="train")
    yield from _spread(read_documents(source, split="train"), share=rest / num_chars)


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
