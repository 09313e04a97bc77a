"""`tramontane tokenizer train`: learn a vocabulary from text files, once for all."""

from pathlib import Path


def train(
    sources: list[str], /, *, out: Path, vocab_size: int = 8192, sample_chars: int = 50_000_000
) -> None:
    """Train a byte-level BPE tokenizer on a weighted mixture of texts.

    Parameters
    ----------
    sources
        Text files as [DOMAIN=]PATH[:WEIGHT], ending in .jsonl, .txt, .jsonl.gz or .txt.gz.
    out
        A new folder for tokenizer.json and the files that transformers reads beside it.
    vocab_size
        Tokens in the vocabulary, with 256 bytes and 3 control tokens.
    sample_chars
        Characters to learn from, shared among the domains by weight.
    """
    import sys

    from rich.console import Console

    from tramontane.atomic import atomic_folder
    from tramontane.data.sampling import sample_documents
    from tramontane.data.sources import parse_source, read_documents
    from tramontane.errors import TokenizerError
    from tramontane.tokenizer.trainer import measure_bytes_per_token, train_tokenizer

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TokenizerError(f"{out} is not an empty folder: name a new one with --out")
    console = Console(stderr=True)
    parsed = [parse_source(source) for source in sources]
    console.print(f"learning {vocab_size:,} tokens from {len(parsed)} domains ...")
    tokenizer = train_tokenizer(
        sample_documents(parsed, max_chars=sample_chars),
        vocab_size=vocab_size,
        show_progress=sys.stderr.isatty(),
    )
    with atomic_folder(out) as folder:
        tokenizer.save(folder)
    for source in parsed:
        ratio = measure_bytes_per_token(tokenizer, read_documents(source, split="valid"))
        console.print(f"  {source.domain:<24} {ratio:5.2f} bytes per token on held-out text")
    console.print(f"saved to {out}")
