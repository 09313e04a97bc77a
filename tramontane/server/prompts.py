"""From what a client sends to the ids that the model reads, and whether they fit its context."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from tramontane.server.errors import ApiError, blame, invalid, unsupported
from tramontane.server.ports import ServedModel, ServingEngine
from tramontane.server.protocol.base import MAX_ENCODED
from tramontane.server.protocol.chat import ChatMessage
from tramontane.server.safety import SAFE_PROMPT, prefix_messages
from tramontane.tokenizer.chat import PlainFormat

_INLINE_CHARACTERS = 16_384  # a longer text is encoded in a thread, and holds up nobody
# Encoding takes a hundred bytes of memory for a token: no more than two long texts at a time.
_ENCODERS = ThreadPoolExecutor(2, thread_name_prefix="encode")
_Result = TypeVar("_Result")


class Prompt(NamedTuple):
    """`text` is what a client may see again (`echo`); `starts_text` is the engine's.

    The first `num_fixed` ids hold the safety prefix: they are never cut off.
    """

    ids: list[int]
    text: str = ""
    starts_text: bool = False
    num_fixed: int = 0


async def write_chat_prompt(
    messages: Sequence[ChatMessage], engine: ServingEngine, *,
    is_prefixed: bool, continue_final: bool, must_fit: bool,
) -> Prompt:  # fmt: skip
    """The conversation in the model's format. Raises ApiError 400, RequestError, TokenizerError.

    With `must_fit` one that cannot fit the context is refused before it is encoded.
    """
    plain = read_messages(messages)
    if is_prefixed:
        plain = prefix_messages(plain)
    continue_final = _wants_continuation(messages, continue_final)
    size = sum(len(message["content"]) for message in plain)
    _require_length(size, engine, "messages", must_fit=must_fit)
    chat_format = engine.chat_format or PlainFormat()
    ids = await run_aside(
        size, lambda: chat_format.encode(plain, engine.tokenizer, continue_final=continue_final)
    )
    return Prompt(
        ids,
        starts_text=engine.chat_format is not None and not continue_final,
        num_fixed=len(ids) if is_prefixed else 0,  # the format has it within a message
    )


async def write_completion_prompts(
    prompt: str | list[Any], engine: ServingEngine, *,
    is_prefixed: bool, add_special_tokens: bool, must_fit: bool, param: str,
) -> list[Prompt]:  # fmt: skip
    """One prompt, or several: texts or ids. Raises ApiError 400 and TokenizerError.

    `param` is where they stand in the request. With `must_fit` what cannot fit the context is
    refused before it is encoded.
    """
    tokenizer = engine.tokenizer
    has_bos = add_special_tokens and tokenizer.adds_bos
    several: list[Any] = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    prefix = SAFE_PROMPT + "\n\n" if is_prefixed else ""
    size = sum(len(one) for one in several)
    if isinstance(several[0], str):
        texts = [prefix + text for text in several]
        longest = max(map(len, texts)) if must_fit else size
        _require_length(longest, engine, param, must_fit=must_fit)
        with blame(param):
            all_ids = await run_aside(size, lambda: tokenizer.encode_batch(texts))
        start = [tokenizer.bos_id] if has_bos else []
        return [
            Prompt(start + ids, text, num_fixed=_count_prefix(start + ids, prefix, engine))
            for ids, text in zip(all_ids, texts, strict=True)
        ]
    require_ids(several, engine.model.vocab_size, param)
    if must_fit and (count := max(map(len, several))) > engine.model.max_seq_len:
        raise _too_long(f"{count} tokens", engine.model, param)
    if prefix:
        prefix_ids = tokenizer.encode(prefix)
        several = [_insert_prefix(prefix_ids, ids, tokenizer.bos_id) for ids in several]
    texts = await run_aside(size, lambda: [_decode(ids, engine) for ids in several])
    return [
        Prompt(list(ids), text, num_fixed=_count_prefix(ids, prefix, engine))
        for ids, text in zip(several, texts, strict=True)
    ]


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Role and text of each. Raises ApiError 400, naming the part that is no text."""
    plain = []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        is_call = message.tool_calls or (message.model_extra or {}).get("function_call")
        if message.role == "tool" or is_call:
            raise unsupported(where, "this model has no format for tools")
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": _read_content(message, f"{where}.content")})
    return plain


def fit(
    prompt: Prompt, engine: ServingEngine, *, max_tokens: int | None, default: int | None,
    truncate: int | None, param: str,
) -> tuple[Prompt, int]:  # fmt: skip
    """The prompt, cut at its beginning only if the client asks, and how long the answer may be.

    What the client does not say is `default`, or all the room. `truncate` is how many ids to keep;
    -1: those that fit beside the answer. Raises ApiError 400, blaming `param`: nothing is shortened
    in silence.
    """
    model = engine.model
    size = model.max_seq_len
    if truncate is not None:
        wanted = default if max_tokens is None else max_tokens
        if truncate == -1 and wanted is None and len(prompt.ids) >= size:
            raise invalid(
                "truncate_prompt_tokens is -1, so max_tokens must say for how many tokens of the "
                "answer the prompt has to leave room",
                "max_tokens",
            )
        keep = max(1, size - (wanted or 1)) if truncate == -1 else truncate
        prompt = _cut(prompt, keep, engine)
    room = size - len(prompt.ids)
    if room < (1 if max_tokens is None else max_tokens):
        answer = "" if max_tokens is None else f" and max_tokens is {max_tokens}"
        raise _too_long(f"{len(prompt.ids)} tokens{answer}", model, param)
    if max_tokens is None:
        max_tokens = room if default is None else min(default, room)
    return prompt, max_tokens


def _cut(prompt: Prompt, keep: int, engine: ServingEngine) -> Prompt:
    """Its last `keep` ids, the safety prefix among them. Raises ApiError 400 if that is longer."""
    ids, num_fixed = prompt.ids, prompt.num_fixed
    if len(ids) <= keep:
        return prompt
    if keep <= num_fixed:
        raise invalid(
            f"truncate_prompt_tokens leaves {keep} tokens of {len(ids)}, but the first {num_fixed} "
            f"hold the safety prefix, which is never cut off: shorten the prompt",
            "truncate_prompt_tokens",
        )
    ids = ids[:num_fixed] + ids[len(ids) - keep + num_fixed :]
    return prompt._replace(ids=ids, text=_decode(ids, engine) if prompt.text else "")


def require_ids(prompts: Sequence[Sequence[int]], vocab_size: int, param: str) -> None:
    """Raises ApiError 400 for an id that the model does not have."""
    for ids in prompts:
        if max(ids) >= vocab_size:
            raise invalid(
                f"{param} holds the token id {max(ids)}; this model's ids are 0 to "
                f"{vocab_size - 1}",
                param,
            )


def _too_long(found: str, model: ServedModel, param: str) -> ApiError:
    return invalid(
        f"the prompt has {found}; this model's context holds {model.max_seq_len}, answer included: "
        f"shorten the prompt or the answer",
        param,
        code="context_length_exceeded",
    )


def _require_length(size: int, engine: ServingEngine, param: str, *, must_fit: bool) -> None:
    """Raises ApiError 400 for a text of `size` characters that is too long to be encoded."""
    least = -(-size // engine.tokenizer.max_token_bytes)
    if must_fit and size > _INLINE_CHARACTERS and least > engine.model.max_seq_len:
        raise _too_long(
            f"{size} characters, which are at least {least} tokens", engine.model, param
        )
    if not must_fit and size > MAX_ENCODED:
        raise invalid(
            f"{param} has {size} characters; at most {MAX_ENCODED} are encoded at a time",
            param,
            code="request_too_large",
        )


def _read_content(message: ChatMessage, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for number, part in enumerate(message.content or ()):
        if part.type != "text" or part.text is None:
            raise invalid(
                f"the part is of type {part.type!r}; this server reads parts of type 'text', and "
                f"opens no address",
                f"{where}.{number}",
                code="unsupported_content",
            )
        texts.append(part.text)
    if not texts and message.role != "assistant":
        raise invalid("the message has no text", where)
    return "".join(texts)


def _wants_continuation(messages: Sequence[ChatMessage], continue_final: bool) -> bool:
    """Whether the last message is to be continued. Raises ApiError 400."""
    for number, message in enumerate(messages[:-1]):
        if message.prefix:
            raise invalid("only the last message can be a prefix", f"messages.{number}.prefix")
    last, where = messages[-1], f"messages.{len(messages) - 1}"
    continue_final = continue_final or bool(last.prefix)
    if last.role == "assistant" and not continue_final:
        raise invalid(
            "the last message is the assistant's: end with one of the user, or set prefix on it "
            "(or continue_final_message) to have it continued",
            where,
        )
    if last.role != "assistant" and continue_final:
        raise invalid("only a message of the assistant can be continued", where)
    return continue_final


def _is_ids(prompt: list[Any]) -> bool:
    return isinstance(prompt[0], int)


def _insert_prefix(prefix: list[int], ids: list[int], bos_id: int) -> list[int]:
    """Behind the token that begins the text, if the client sent it."""
    at = 1 if ids[0] == bos_id else 0
    return [*ids[:at], *prefix, *ids[at:]]


def _count_prefix(ids: Sequence[int], prefix: str, engine: ServingEngine) -> int:
    """How many of the first ids hold the safety prefix."""
    if not prefix:
        return 0
    count = len(engine.tokenizer.encode(prefix)) - 1  # its last token may have merged with the text
    while count < len(ids) and not _decode(ids[:count], engine).startswith(prefix):
        count += 1
    return count


def _decode(ids: Sequence[int], engine: ServingEngine) -> str:
    """A model's head may be larger than its vocabulary; such ids have no text."""
    return engine.tokenizer.decode([i for i in ids if i < engine.tokenizer.vocab_size])


async def run_aside(size: int, work: Callable[[], _Result]) -> _Result:
    """Do work on so many characters or ids, in a thread if they are many."""
    if size <= _INLINE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_ENCODERS, work)
