"""One answer of a request on its way: its tokens, how many have run, what came out so far."""

from typing import TYPE_CHECKING

from tramontane.engine.answer import Answer
from tramontane.engine.completion import Completion, FinishReason, TextPiece, TokenLogprob
from tramontane.engine.request import Request
from tramontane.engine.text_output import TextOutput
from tramontane.errors import ContextError, RequestError, TramontaneError

if TYPE_CHECKING:
    from tramontane.engine.block_manager import CachedBlock
    from tramontane.engine.drafts import DraftSource
    from tramontane.engine.sampler import Sampler


class Sequence:
    """Prompt and answer. `num_computed_tokens` of `token_ids` have run.

    `sampler` is the state of its choices. `siblings` are the other answers of the same request,
    which start from this one's prompt. Raises RequestError if the prompt has no token, and
    ContextError if it leaves no room for an answer within `max_seq_len`.
    """

    def __init__(
        self,
        request: Request,
        *,
        text_output: TextOutput,
        sampler: "Sampler",
        eos_ids: frozenset[int],
        max_seq_len: int,
        choice: int = 0,
    ) -> None:
        params = request.params
        _check_prompt_length(len(request.prompt_ids), params.max_tokens, max_seq_len)
        self.request, self.params, self.choice = request, params, choice
        self.tenant = request.tenant
        self.token_ids = list(request.prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_len = min(max_seq_len, self.num_prompt_tokens + params.max_tokens)
        self.sampler = sampler
        self.siblings: list[Sequence] = []
        self.draft_ids: list[int] = []  # guesses of the next tokens, which may run along
        self.draft_source: DraftSource | None = None
        self.finish_reason: FinishReason | None = None
        self.error: TramontaneError | None = None
        # What the scheduler and the block manager know of it.
        self.number = 0
        self.is_running = False
        self.num_starts = 0
        self.num_computed_tokens = 0
        self.block_table: list[int] = []
        self.num_freed_blocks = 0
        self.cache_chain: list[CachedBlock] = []
        self.cache_root = _find_cache_root(request)
        self.answer = Answer(request, text_output, eos_ids=eos_ids, choice=choice)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that have not run yet: the rest of the prompt, then one at a time."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None

    def start(self, num_kept: int) -> None:
        """It runs from now on; so many of its tokens need not, a kept block has them."""
        self.is_running = True
        self.num_starts += 1
        self.answer.note_start(num_kept)

    def preempt(self) -> None:
        """It waits again, and will have to run from the start."""
        self.is_running = False
        self.draft_ids = []

    def count_rows(self, num_tokens: int) -> int:
        """Of the next `num_tokens` (drafts included), how many need scores: the last ones do.

        The last token there is, each draft after it, and, for the log-probabilities of a prompt,
        each of its tokens.
        """
        num_drafts = max(0, num_tokens - self.num_pending_tokens)
        is_last = num_tokens >= self.num_pending_tokens
        if self.wants_prompt_logprobs:
            return num_tokens
        return num_drafts + 1 if is_last and self.params.max_tokens else 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether scores of the prompt's tokens are wanted that are not known yet."""
        if self.params.prompt_logprobs is None:
            return False
        return len(self.answer.prompt_logprobs) < self.num_prompt_tokens

    def take_siblings(self) -> "list[Sequence]":
        """Those that wait for this one's prompt to have run, and have not been given up."""
        siblings, self.siblings = self.siblings, []
        return [sibling for sibling in siblings if not sibling.is_finished]

    def append_token(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Add a token of the answer and see whether it ends here."""
        assert not self.is_finished, self.finish_reason
        self.token_ids.append(token_id)
        if self.answer.add_token(token_id, logprob) or self.sampler.is_exhausted:
            self.finish("stop")
        elif len(self.token_ids) >= self.max_len:
            self.finish("length")

    def finish(self, reason: FinishReason, error: TramontaneError | None = None) -> None:
        """End the answer; text that was held back comes out."""
        # A stop text may have been completed by the last bytes.
        self.finish_reason = "stop" if self.answer.finish() else reason
        self.error = error
        self.sampler.close()

    def take_pieces(self, *, with_experts: bool = False) -> list[TextPiece]:
        """The tokens whose text has become certain since the last call.

        With experts, a token waits until it has run itself, one pass after it was chosen.
        """
        num_ran = self.num_computed_tokens - self.num_prompt_tokens
        limit = num_ran if with_experts and not self.is_finished else None
        return self.answer.take_pieces(with_experts=with_experts, limit=limit)

    def build_completion(self) -> Completion:
        """The answer as it stands; one that has not ended counts as aborted."""
        return self.answer.build_completion(self.finish_reason or "abort", self.error)


def _find_cache_root(request: Request) -> tuple | None:
    """Equal for requests that compute the same for the same tokens, and may share them.

    None where every token of the prompt has to run, because something of each is wanted.
    """
    if (
        request.routing == "all"
        or request.wants_embedding
        or request.params.prompt_logprobs is not None
    ):
        return None
    return (request.tenant, request.cache_salt, request.params.experts_per_token)


def _check_prompt_length(num_prompt_tokens: int, max_tokens: int, max_seq_len: int) -> None:
    if num_prompt_tokens == 0:
        raise RequestError("the prompt has no token; it needs at least one")
    longest = max_seq_len if max_tokens == 0 else max_seq_len - 1
    if num_prompt_tokens > longest:
        raise ContextError(
            f"the prompt has {num_prompt_tokens} tokens, but the context of this model holds "
            f"{max_seq_len}, answer included; shorten the prompt to at most {longest}"
        )
