"""Answers written without a model: any allowed token is as good as another."""

import random

from tramontane.engine.constraints import Matcher
from tramontane.tokenizer.tokenizer import Tokenizer


def write(matcher: Matcher, tokenizer: Tokenizer, *, seed: int = 0, limit: int = 400) -> str | None:
    """A whole answer, ended as soon as it may end; None if it did not end within the limit."""
    dice = random.Random(seed)
    ids: list[int] = []
    for _ in range(limit):
        allowed = matcher.allowed_mask().nonzero()[:, 0].tolist()
        if tokenizer.eos_id in allowed:
            return tokenizer.decode_bytes(ids).decode("utf-8")
        ids.append(dice.choice(allowed))
        matcher.accept(ids[-1])
        if matcher.is_exhausted:
            return tokenizer.decode_bytes(ids).decode("utf-8")
    return None
