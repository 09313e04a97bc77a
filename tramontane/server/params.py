"""From the fields of a request to the engine's SamplingParams: defaults, aliases, constraints.

What a request leaves out comes from the model's generation_config.json, then from OpenAI.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tramontane.engine.constraint import Constraint, ConstraintKind
from tramontane.engine.sampling_params import SamplingParams
from tramontane.server.errors import blame, invalid, unsupported
from tramontane.server.ports import ServedModel, ServingEngine
from tramontane.server.protocol.sampling import SamplingFields

_OPENAI_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}
_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "ignore_eos", "n", "experts_per_token",
)  # fmt: skip
_OTHER_NAME = {"include_stop_str_in_output": "include_stop"}
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice",
           "guided_grammar": "grammar"}  # fmt: skip
_KIND_OF_FIELD: dict[str, ConstraintKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def find_defaults(engine: ServingEngine) -> SamplingParams:
    """What applies where a request says nothing: the model's recommendation, then OpenAI's."""
    set_by_model = engine.generation_overrides
    ours: dict[str, Any] = {k: v for k, v in _OPENAI_DEFAULTS.items() if k not in set_by_model}
    return replace(engine.default_params, **ours)


def build_params(
    fields: SamplingFields, defaults: SamplingParams, model: ServedModel, *,
    max_tokens: int, logprobs: int | None, constraint: Constraint | None,
    echoes_logprobs: bool = False,
) -> SamplingParams:  # fmt: skip
    """The engine's settings. Raises ApiError 400 and RequestError, naming the field.

    `echoes_logprobs`: those of the prompt's tokens are wanted too.
    """
    _check_combinations(fields, model, max_tokens)
    given: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs, "n": 1}
    for name in (*_SAME_NAME, *_OTHER_NAME):
        if (value := getattr(fields, name)) is not None:
            given[_OTHER_NAME.get(name, name)] = value
    if given.get("top_p") == 0:  # OpenAI's clients say so for "the likeliest alone"
        given["top_p"] = math.ulp(0.0)
    given["min_tokens"] = given.get("min_tokens", 0)
    given["seed"] = fields.random_seed if fields.seed is None else fields.seed
    given["stop"] = () if fields.stop is None else fields.stop
    for name in ("stop_token_ids", "allowed_token_ids"):
        given[name] = _check_ids(getattr(fields, name) or (), name, model)
    given["logit_bias"] = _read_bias(fields.logit_bias or {}, model)
    given["prompt_logprobs"] = logprobs if echoes_logprobs else _read_prompt_logprobs(fields)
    given["constraint"] = constraint
    return replace(defaults, **given)


def list_deprecated(fields: SamplingFields) -> list[str]:
    """The old names that a request used."""
    return [name for name in (*_GUIDED, "safe_mode") if getattr(fields, name) is not None]


def build_constraint(fields: SamplingFields) -> tuple[str, Constraint] | tuple[None, None]:
    """What the answer must be, and the field that says so. Raises ApiError 400, RequestError."""
    found = [*_from_response_format(fields), *_from_structured_outputs(fields)]
    found += [
        _make(kind, getattr(fields, name), name)
        for name, kind in _GUIDED.items()
        if getattr(fields, name) is not None
    ]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise invalid(f"{names} are both set: an answer has one form", found[1][0])
    return found[0] if found else (None, None)


def _check_combinations(fields: SamplingFields, model: ServedModel, max_tokens: int) -> None:
    if (fields.min_tokens or 0) > max_tokens:
        raise invalid(
            f"min_tokens is {fields.min_tokens}; it must be at most max_tokens, which is "
            f"{max_tokens}",
            "min_tokens",
        )
    if None not in (fields.seed, fields.random_seed) and fields.seed != fields.random_seed:
        raise invalid("seed and random_seed are two names of one number, and differ", "random_seed")
    if fields.stream_options is not None and not fields.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    if fields.prompt_logprobs not in (None, False) and fields.stream:
        raise unsupported("prompt_logprobs", "it cannot be streamed; set stream to false")
    _check_experts(fields, model)


def _check_experts(fields: SamplingFields, model: ServedModel) -> None:
    wants = {
        "experts_per_token": fields.experts_per_token is not None,
        "return_routing": fields.return_routing not in (None, "none"),
    }
    for name, is_wanted in wants.items():
        if is_wanted and model.num_experts is None:
            raise invalid(f"{name} needs a mixture of experts; this model is dense", name)
    if model.num_experts is not None and (fields.experts_per_token or 0) > model.num_experts:
        raise invalid(
            f"experts_per_token is {fields.experts_per_token}; this model has "
            f"{model.num_experts} experts in a layer",
            "experts_per_token",
        )


def _check_ids(ids: Any, name: str, model: ServedModel) -> tuple[int, ...]:
    for token_id in ids:
        if token_id >= model.vocab_size:
            raise invalid(
                f"{name} holds {token_id}; this model's ids are 0 to {model.vocab_size - 1}", name
            )
    return tuple(ids)


def _read_bias(bias: Mapping[str, float], model: ServedModel) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(
                f"logit_bias holds the key {key[:60]!r}; keys are token ids", "logit_bias"
            )
    ids = _check_ids([int(key) for key in bias], "logit_bias", model)
    return dict(zip(ids, bias.values(), strict=True))


def _read_prompt_logprobs(fields: SamplingFields) -> int | None:
    """A number (vLLM), or a switch with the number beside it (Mistral)."""
    if isinstance(fields.prompt_logprobs, bool):
        return (fields.top_prompt_logprobs or 0) if fields.prompt_logprobs else None
    return fields.prompt_logprobs


def _from_response_format(fields: SamplingFields) -> list[tuple[str, Constraint]]:
    wanted = fields.response_format
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [("response_format", Constraint("json_object"))]
    assert wanted.json_schema is not None, "the model's validator requires it"
    return [_make("json", wanted.json_schema.json_schema, "response_format")]


def _from_structured_outputs(fields: SamplingFields) -> list[tuple[str, Constraint]]:
    wanted = fields.structured_outputs
    if wanted is None:
        return []
    wanted.require_supported({"structural_tag": "use json, regex, choice or grammar"})
    values = {"json": wanted.json_document, "regex": wanted.regex, "choice": wanted.choice,
              "grammar": wanted.grammar}  # fmt: skip
    found = [
        _make(kind, value, f"structured_outputs.{kind}")
        for kind, value in values.items()
        if value is not None
    ]
    if wanted.json_object:
        found.append(("structured_outputs.json_object", Constraint("json_object")))
    if not found:
        raise invalid("structured_outputs holds none of json, regex, choice, grammar, json_object",
                      "structured_outputs")  # fmt: skip
    return found


def _make(kind: str, value: Any, param: str) -> tuple[str, Constraint]:
    """`kind` is vLLM's name, `param` the field that holds the value: a text, or JSON."""
    try:
        source = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise invalid("the JSON schema is nested too deeply", param) from None
    with blame(param):
        return param, Constraint(_KIND_OF_FIELD[kind], source)
