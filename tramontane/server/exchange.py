"""One request for text on its way through the server: what chat and completions have in common."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.requests import Request as HttpRequest

from tramontane import __version__
from tramontane.engine.completion import Completion
from tramontane.engine.constraint import Constraint
from tramontane.engine.request import Request, RoutingWanted
from tramontane.engine.sampling_params import SamplingParams
from tramontane.server.errors import invalid
from tramontane.server.generation import Generation
from tramontane.server.logprobs import TokenNames
from tramontane.server.params import (
    build_constraint,
    build_params,
    find_defaults,
    list_deprecated,
)
from tramontane.server.ports import ServingEngine
from tramontane.server.prompts import Prompt, fit
from tramontane.server.protocol.answers import Safety, Usage
from tramontane.server.protocol.base import ApiRequest
from tramontane.server.protocol.sampling import SamplingFields
from tramontane.server.routing_json import describe_prompt, encode_npy
from tramontane.server.safety import build_header, describe_safety, needs_prefix
from tramontane.server.state import ServerState

MAX_ANSWERS = 256  # of one request: prompts times n
MAX_SCORES = 1_000_000  # likeliest tokens of prompts, each a few hundred bytes of memory
MAX_ROUTED = 4_000_000  # experts of prompts
FINGERPRINT = f"tramontane-{__version__}"
IGNORED_HEADER = "x-tramontane-ignored-fields"
_MAX_NAMES = 20  # in a header


@dataclass
class Exchange:
    """`add_prompts` comes first, then `generate`; then answers are written."""

    state: ServerState
    http: HttpRequest
    fields: SamplingFields
    param: str  # where the prompt stands in the request
    prompts: list[Prompt] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine: ServingEngine = self.state.require_engine(self.fields.model)
        self.created = int(time.time())
        self.names = TokenNames(self.engine.tokenizer)
        self.is_prefixed = needs_prefix(self.fields, self.state.settings.safe_prompt)
        self._constraint_param: str | None
        self._constraint: Constraint | None
        self._constraint_param, self._constraint = build_constraint(self.fields)

    def add_prompts(
        self, prompts: Sequence[Prompt], *, max_tokens: int | None, default: int | None,
        logprobs: int | None, echoes_logprobs: bool = False,
    ) -> None:  # fmt: skip
        """Check and keep. Raises ApiError 400 and RequestError."""
        if len(prompts) * (self.fields.n or 1) > MAX_ANSWERS:
            raise invalid(
                f"{len(prompts)} prompts with n = {self.fields.n or 1} ask for more than "
                f"{MAX_ANSWERS} answers: send several requests",
                "n",
            )
        defaults = find_defaults(self.engine)
        if "max_tokens" in self.engine.generation_overrides:
            default = self.engine.default_params.max_tokens
        for prompt in prompts:
            fitted, room = fit(
                prompt, self.engine, max_tokens=max_tokens, default=default,
                truncate=self.fields.truncate_prompt_tokens, param=self.param,
            )  # fmt: skip
            params = build_params(
                self.fields, defaults, self.engine.model, max_tokens=room, logprobs=logprobs,
                constraint=self._constraint, echoes_logprobs=echoes_logprobs,
            )  # fmt: skip
            self.prompts.append(fitted)
            self.params.append(params)
        self._bound_answer("logprobs" if echoes_logprobs else "prompt_logprobs")

    def generate(self) -> Generation:
        """Ask the engine; see Generation."""
        requests = [
            Request(
                prompt_ids=prompt.ids, params=params, starts_text=prompt.starts_text,
                routing=self._find_routing(), tenant=self.http.state.tenant,
                cache_salt=self.fields.cache_salt or "",
            )
            for prompt, params in zip(self.prompts, self.params, strict=True)
        ]  # fmt: skip
        return Generation(
            self.state, requests, receive=self.http.receive,
            started_at=self.http.state.started_at, param=self.param,
            constraint_param=self._constraint_param,
        )  # fmt: skip

    @property
    def num_answers(self) -> int:
        """Answers to all prompts."""
        return sum(params.n for params in self.params)

    def find_prompt(self, index: int) -> Prompt:
        """The prompt of answer number `index`."""
        return self.prompts[index // self.params[0].n]

    @property
    def wants_routing(self) -> bool:
        """Whether tokens come with their experts."""
        return self.fields.return_routing in ("answer", "all")

    def build_head(self, kind: str, prefix: str) -> dict[str, Any]:
        """The beginning of an answer or of a stream's chunks: OpenAI's `object` is `kind`."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": self.created,
            "model": self.state.model_name, "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def build_usage(self, completions: Sequence[Completion]) -> Usage:
        """Tokens and cost of all answers."""
        return self.state.cost_meter.build_usage(
            completions, experts_per_token=self.fields.experts_per_token
        )

    def build_safety(self) -> Safety:
        """Which prefix was in force, and what the model read."""
        return describe_safety(
            self.state.settings.safe_prompt, is_prefixed=self.is_prefixed,
            prompts=[prompt.ids for prompt in self.prompts],
        )  # fmt: skip

    def build_extras(self, completion: Completion, prompt: Prompt) -> dict[str, Any]:
        """The fields of a choice that were asked for and that its end brings."""
        extras: dict[str, Any] = {}
        if self.fields.return_routing == "all":
            names = self.names.name_all(prompt.ids)
            extras["prompt_routing"] = describe_prompt(completion, prompt.ids, names)
        if self._returns_routed_experts:
            start = self.fields.routed_experts_prompt_start or 0
            extras["routed_experts"] = encode_npy(completion, prompt_start=start)
        return extras

    def build_headers(self) -> dict[str, str]:
        """What the answer says beside its body."""
        policy = self.state.settings.safe_prompt
        headers = build_header(policy, is_prefixed=self.is_prefixed)
        headers |= note_unknown(self.state, self.fields)
        if old := list_deprecated(self.fields):
            text = f"{', '.join(old)}: use structured_outputs, safe_prompt"
            headers["warning"] = f'299 tramontane "deprecated {text}"'
        return headers

    @property
    def _returns_routed_experts(self) -> bool:
        is_moe = self.engine.model.num_experts is not None
        return self.state.settings.enable_return_routed_experts and is_moe

    def _bound_answer(self, param: str) -> None:
        """Raises ApiError 400 if what is wanted of the prompts' tokens would fill the memory.

        Each answer lists those of its prompt.
        """
        num_tokens = self.params[0].n * sum(len(prompt.ids) for prompt in self.prompts)
        top, model = self.params[0].prompt_logprobs, self.engine.model
        if top is not None and num_tokens * (top + 1) > MAX_SCORES:
            raise invalid(
                f"{num_tokens} tokens of prompts with {top} others each are more than {MAX_SCORES} "
                f"scores: lower {param}, or send several requests",
                param,
            )
        per_token = self.params[0].experts_per_token or model.num_experts_per_tok or 0
        num_routed = num_tokens * model.n_layers * per_token
        if self._find_routing() == "all" and num_routed > MAX_ROUTED:
            raise invalid(
                f"the {num_tokens} tokens of prompts have {num_routed} experts; at most "
                f"{MAX_ROUTED} are listed: send several requests",
                "return_routing",
            )

    def _find_routing(self) -> RoutingWanted:
        if self._returns_routed_experts:
            return "all"
        return self.fields.return_routing or "none"


def note_unknown(state: ServerState, fields: ApiRequest) -> dict[str, str]:
    """Log the fields that nobody knows, and name them in a header, percent-encoded."""
    names = fields.list_unknown()
    if not names:
        return {}
    state.log_unknown(names)
    shown = [quote(name[:100], safe="", errors="replace") or '""' for name in names[:_MAX_NAMES]]
    return {IGNORED_HEADER: ", ".join(shown)}


def build_timings(completion: Completion) -> dict[str, float]:
    """llama-server's `timings`: tokens, milliseconds and tokens per second, of one answer."""
    timings = completion.timings
    return {
        "cache_n": completion.num_cached_tokens,
        "prompt_n": completion.num_prompt_tokens - completion.num_cached_tokens,
        "prompt_ms": round(1000 * timings.time_to_first_token, 3),
        "prompt_per_second": round(completion.prefill_tokens_per_second, 3),
        "predicted_n": completion.num_completion_tokens,
        "predicted_ms": round(1000 * timings.decode_seconds, 3),
        "predicted_per_second": round(completion.decode_tokens_per_second, 3),
        "queue_ms": round(1000 * timings.queue_seconds, 3),
    }
