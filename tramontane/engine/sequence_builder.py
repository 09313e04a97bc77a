"""From a request to its sequences: what it asks is held against the model that has to answer."""

from collections.abc import Sequence as Items

from tramontane.config import ModelConfig
from tramontane.engine.constraints import ConstraintCompiler, Matcher
from tramontane.engine.request import Request
from tramontane.engine.sampler import Sampler
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.sequence import Sequence
from tramontane.engine.text_output import TextOutput
from tramontane.errors import RequestError
from tramontane.tokenizer.stream import IncrementalDecoder
from tramontane.tokenizer.tokenizer import Tokenizer


class SequenceBuilder:
    """Builds sequences for one model; `eos_ids` end its answers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        eos_ids: frozenset[int],
        max_seq_len: int | None = None,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.max_seq_len = max_seq_len or config.max_seq_len
        self._eos_ids = eos_ids
        self._compiler = ConstraintCompiler(
            tokenizer, eos_ids=eos_ids, vocab_size=tokenizer.vocab_size
        )

    def build(self, request: Request) -> list[Sequence]:
        """A sequence for each answer that the request wants, the others siblings of the first.

        Compiling its constraint may take a while. Raises RequestError, ContextError.
        """
        self.check(request)
        params, matcher = request.params, None
        if params.constraint is not None:
            matcher = self._compiler.compile(params.constraint)
        copies = [matcher, *(matcher and matcher.copy() for _ in range(1, params.n))]
        sequences = [self._build_one(request, i, copy) for i, copy in enumerate(copies)]
        sequences[0].siblings = sequences[1:]
        return sequences

    def check(self, request: Request) -> None:
        """Raise RequestError if the request names what this model has not."""
        params = request.params
        self._check_ids("the prompt", request.prompt_ids)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids)
        self._check_ids("logit_bias", tuple(params.logit_bias))
        self._check_experts(params)

    def close(self) -> None:
        """End what compiling constraints has started."""
        self._compiler.close()

    def _check_ids(self, name: str, ids: Items[int]) -> None:
        size = self.tokenizer.vocab_size
        if len(ids) and not 0 <= min(ids) <= max(ids) < size:
            wrong = next(i for i in ids if not 0 <= i < size)
            raise RequestError(
                f"{name} holds token id {wrong}; the vocabulary of this model has 0 to {size - 1}"
            )

    def _check_experts(self, params: SamplingParams) -> None:
        asked, moe = params.experts_per_token, self.config.moe
        if asked is None:
            return
        if moe is None:
            raise RequestError(
                f"experts_per_token is {asked}, but this model is dense: it has no experts"
            )
        if moe.router != "top_k":
            raise RequestError(
                f"experts_per_token is {asked}, but this model's router is {moe.router!r}, whose "
                "number of experts is not to be chosen; leave it out"
            )
        if asked > moe.fewest_experts:
            raise RequestError(
                f"experts_per_token is {asked}; this model has {moe.fewest_experts} experts per "
                "layer"
            )

    def _build_one(self, request: Request, choice: int, matcher: Matcher | None) -> Sequence:
        params = request.params
        decoder = IncrementalDecoder(self.tokenizer, starts_text=request.starts_text)
        return Sequence(
            request,
            text_output=TextOutput(
                decoder,
                stop=params.stop,
                include_stop=params.include_stop,
                min_tokens=params.min_tokens,
            ),
            sampler=Sampler(
                params,
                prompt_ids=request.prompt_ids,
                vocab_size=self.tokenizer.vocab_size,
                eos_ids=self._eos_ids,
                index=choice,
                matcher=matcher,
            ),
            eos_ids=self._eos_ids,
            max_seq_len=self.max_seq_len,
            choice=choice,
        )
