"""Sequences for an engine without a tokenizer, and engines that are looked at after each pass."""

from collections.abc import Iterable

from tramontane.engine.completion import Completion
from tramontane.engine.engine import Engine
from tramontane.engine.limits import EngineLimits
from tramontane.engine.request import Request, RoutingWanted
from tramontane.engine.sampler import Sampler
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.sequence import Sequence
from tramontane.engine.text_output import TextOutput
from tramontane.models.transformer import Transformer

EOS = 2
VOCAB_SIZE = 128
GREEDY = SamplingParams(temperature=0, max_tokens=12)


class LetterDecoder:
    """Token n is the letter n + 100."""

    def push(self, token_id: int) -> str:
        return chr(100 + token_id)

    def finish(self) -> str:
        return ""


def make_sequences(
    prompt: Iterable[int],
    params: SamplingParams = GREEDY,
    *,
    eos_ids: frozenset[int] = frozenset({EOS}),
    max_seq_len: int = 256,
    routing: RoutingWanted = "none",
    tenant: str = "",
    wants_embedding: bool = False,
) -> list[Sequence]:
    """The `n` sequences of one request, the others siblings of the first."""
    request = Request(
        prompt_ids=[int(token) for token in prompt],
        params=params,
        routing=routing,
        tenant=tenant,
        wants_embedding=wants_embedding,
    )
    sequences = [
        Sequence(
            request,
            text_output=TextOutput(
                LetterDecoder(),
                stop=params.stop,
                include_stop=params.include_stop,
                min_tokens=params.min_tokens,
            ),
            sampler=Sampler(
                params,
                prompt_ids=request.prompt_ids,
                vocab_size=VOCAB_SIZE,
                eos_ids=eos_ids,
                index=choice,
            ),
            eos_ids=eos_ids,
            max_seq_len=max_seq_len,
            choice=choice,
        )
        for choice in range(params.n)
    ]
    sequences[0].siblings = sequences[1:]
    return sequences


def make_sequence(prompt: Iterable[int], params: SamplingParams = GREEDY, **options) -> Sequence:
    [sequence] = make_sequences(prompt, params, **options)
    return sequence


def make_engine(model: Transformer, **limits: int) -> Engine:
    return Engine(model, vocab_size=VOCAB_SIZE, limits=EngineLimits(**limits))


def count_pool_bytes(model: Transformer, num_blocks: int) -> int:
    """What `kv_cache_memory_bytes` has to be for so many blocks of 16 tokens."""
    size = model.tok_embeddings.weight.dtype.itemsize
    return model.config.count_kv_bytes_per_token(bytes_per_value=size) * 16 * num_blocks


def run_to_end(engine: Engine, *sequences: Sequence) -> None:
    """All passes that the engine needs, its blocks counted after each, and all free at the end."""
    for sequence in sequences:
        engine.add(sequence)
    while engine.num_unfinished:
        engine.step()
        engine.check_integrity()
    assert engine.num_cache_bytes == 0


def finish_all(engine: Engine, *sequences: Sequence) -> list[Completion]:
    """Their answers; the first error is raised."""
    run_to_end(engine, *sequences)
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return [sequence.build_completion() for sequence in sequences]


def generate(
    model: Transformer, prompt: Iterable[int], params: SamplingParams = GREEDY, **options
) -> list[int]:
    """The ids of an answer to a prompt that runs alone in an engine of its own."""
    [completion] = finish_all(make_engine(model), make_sequence(prompt, params, **options))
    return list(completion.token_ids)
