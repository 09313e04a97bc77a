"""`tramontane perplexity`: how well a model predicts held-out text."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def perplexity(
    model: str | None = None,
    /,
    *,
    source: Annotated[list[str], Parameter(consume_multiple=True)],
    data_dir: Path = Path(),
    seq_len: int | None = None,
    max_tokens: int = 100_000,
    json: bool = False,
) -> None:
    """Score a model on the held-out part of texts: bits per byte of each domain, in fp32.

    Bits per byte count the bytes of the text, not the tokens of a vocabulary, so that models with
    different tokenizers compare. Example: tramontane perplexity --source stories.jsonl.gz

    Parameters
    ----------
    model
        A folder or file in any layout, or the id of a model that has been pulled; without it, the
        bundled model.
    source
        Text files as [DOMAIN=]PATH: .jsonl, .txt, .jsonl.gz or .txt.gz. Records whose "split" is
        "valid" are scored, or the last part of a plain text.
    data_dir
        Folder that source paths are relative to.
    seq_len
        Tokens of context at most; by default the model's context length.
    max_tokens
        Tokens per domain, about; whole documents are taken.
    json
        Print one JSON object, with the load of each expert.
    """
    import tempfile
    from dataclasses import asdict, replace
    from json import dumps

    import torch

    from tramontane.data.sources import parse_source
    from tramontane.data.token_files import prepare_token_files
    from tramontane.engine.llm import LLM
    from tramontane.errors import ConfigError
    from tramontane.hub.cache import resolve_model
    from tramontane.train.held_out import measure_held_out

    llm = LLM(None if model is None else resolve_model(model), dtype=torch.float32)
    length = llm.config.max_seq_len if seq_len is None else seq_len
    if not 1 <= length <= llm.config.max_seq_len:
        raise ConfigError(
            f"--seq-len is {length}; it must be from 1 to the model's context, "
            f"{llm.config.max_seq_len}"
        )
    parsed = [replace(s, path=str(data_dir / s.path)) for s in map(parse_source, source)]
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_token_files(parsed, llm.tokenizer, folder, splits=("valid",))
        files = {domain: file for (domain, _), file in prepared.items()}
        scores = measure_held_out(llm.model, files, seq_len=length, max_tokens=max_tokens)
    mean = sum(score.bits_per_byte for score in scores.values()) / len(scores)
    if json:
        print(dumps({"mean": mean, "domains": {d: asdict(s) for d, s in scores.items()}}))
        return
    for domain, score in scores.items():
        print(f"{domain:<24} {score.bits_per_byte:.4f} bits per byte  {score.num_bytes:>9,} bytes")
    print(f"{'mean of domains':<24} {mean:.4f}")
