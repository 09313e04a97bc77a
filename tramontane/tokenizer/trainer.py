"""Training of a byte-level BPE vocabulary on a stream of texts."""

import math
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tramontane.errors import ConfigError, TokenizerError
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.tokenizer import BOS_TOKEN, CONTROL_TOKENS, Tokenizer

MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS)  # every byte, so that every string has ids

# Texts are cut into these pieces, left to right, and no token spans two of them:
_PIECES = (
    "['\u2019](?i:s|t|m|d|ll|ve|re)(?![\\p{L}\\p{M}])",  # English endings; either apostrophe
    " ?[\\p{L}\\p{M}]+",  # a word with its space; accents may be marks of their own
    "\\p{N}",  # digits one by one: numbers are spelt alike wherever they stand
    " ?[^\\s\\p{L}\\p{M}\\p{N}]+",  # punctuation
    "\\s*[\\r\\n]+",  # line ends, with blanks before them
    "\\s+(?!\\S)",  # indentation, but for the space that belongs to the next word
    "\\s+",
)
TRAINED_PATTERN = "|".join(_PIECES)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, show_progress: bool = False
) -> JsonTokenizer:
    """Learns a vocabulary of exactly `vocab_size` tokens: control tokens, 256 bytes, and merges.

    Raises ConfigError if `vocab_size` is below MIN_VOCAB_SIZE, TokenizerError if the texts do not
    hold enough different words for it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size is {vocab_size}, but must be at least {MIN_VOCAB_SIZE}")
    backend = _build_backend()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    if (reached := backend.get_vocab_size()) < vocab_size:
        raise TokenizerError(
            f"the texts yield only {reached} tokens, but vocab_size is {vocab_size}: "
            f"give more text, or a vocab_size of at most {reached}"
        )
    backend.post_processor = _add_bos(CONTROL_TOKENS.index(BOS_TOKEN))
    return JsonTokenizer(backend)


def measure_bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes per token over all `texts` (more is better); nan if there are none."""
    num_bytes = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode("utf-8"))
        num_tokens += len(tokenizer.encode(text))
    return num_bytes / num_tokens if num_tokens else math.nan


def _build_backend() -> tokenizers.Tokenizer:
    """An empty tokenizer without normaliser: what comes in comes out."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(TRAINED_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_bos(bos_id: int) -> processors.TemplateProcessing:
    """Lets transformers start each text with <s>, as each training document starts."""
    return processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, bos_id)],
    )
