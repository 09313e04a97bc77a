"""What goes along with the weights into another layout, and what that has no place for."""

from typing import Any, NamedTuple

from tramontane.checkpoint.intake import Checkpoint
from tramontane.engine.generation_config import FILE_NAME, load_generation_config
from tramontane.engine.vocabulary import (
    find_mistral_version,
    find_side_file,
    find_template,
    find_token_ids,
)
from tramontane.tokenizer.chat_loading import GGUF_TEMPLATE_KEY
from tramontane.tokenizer.gguf_vocabulary import EOT_KEY, GGML_PREFIX, describe_for_gguf
from tramontane.tokenizer.json_tokenizer import JsonTokenizer
from tramontane.tokenizer.mistral_format import GGUF_VERSION_KEY
from tramontane.tokenizer.tokenizer import Tokenizer

_BOS_KEY, _EOS_KEY = GGML_PREFIX + "bos_token_id", GGML_PREFIX + "eos_token_id"
_HISTORY_FILE = "training.json"


class Companions(NamedTuple):
    """Keys for a GGUF's metadata, and by name what has no key."""

    metadata: dict[str, Any]
    lost: list[str]


def describe_companions(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Companions:
    """Vocabulary, ids and chat format of a model that becomes a GGUF; sampling defaults are lost.

    Where generation_config.json ends answers at another id than the tokenizer's, that is the end
    of a turn; for a third one there is no key. Raises ConfigError if that file is damaged.
    """
    num_rows = checkpoint.config.vocab_size
    ids = find_token_ids(checkpoint, tokenizer)
    metadata: dict[str, Any] = {}
    if tokenizer is not None:
        metadata |= describe_for_gguf(tokenizer, num_rows=num_rows)
    elif "bos_token_id" in ids:
        metadata[_BOS_KEY] = ids["bos_token_id"]
    eos = ids.get("eos_token_id", [])
    own = eos if isinstance(eos, list) else [eos]
    asked = load_generation_config(find_side_file(checkpoint, FILE_NAME), eos_ids=frozenset(own))
    wanted = [*own[:1], *sorted(asked.eos_ids - set(own[:1]))]
    kept = [i for i in wanted if i < num_rows][:2]
    metadata |= dict(zip((_EOS_KEY, EOT_KEY), kept, strict=False))
    if (template := find_template(checkpoint)) is not None:
        metadata[GGUF_TEMPLATE_KEY] = template
    if (version := find_mistral_version(checkpoint)) is not None:
        metadata[GGUF_VERSION_KEY] = version
    lost = [f"{name} {value}" for name, value in asked.overrides.items()]
    lost += [f"eos_token_id {i}" for i in wanted if i not in kept]
    lost += [_HISTORY_FILE] * (find_side_file(checkpoint, _HISTORY_FILE) is not None)
    return Companions(metadata, lost)


def list_lost_in_folder(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> list[str]:
    """What a folder has no place for: Mistral's chat format beside a tokenizer.json alone."""
    version = find_mistral_version(checkpoint)
    is_lost = isinstance(tokenizer, JsonTokenizer) and find_template(checkpoint) is None
    if version is None or not is_lost:
        return []
    return [f"Mistral's chat format v{version}, which the name of a tokenizer.model would say"]
