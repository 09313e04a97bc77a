"""Who runs next: order, chunks, preemption, forks, turns of tenants (rows E12, E14 in part)."""

import random

import pytest

from tramontane.engine.block_manager import BlockManager
from tramontane.engine.request import Request
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import Sequence
from tramontane.engine.text_output import TextOutput
from tramontane.errors import CapacityError, OverloadError


class LetterDecoder:
    def push(self, token_id):
        return "x"

    def finish(self):
        return ""


class NoSampler:
    is_exhausted = False

    def close(self) -> None:
        pass


def make_sequence(length, *, max_tokens=8, tenant="", first=0, max_seq_len=1000):
    """A prompt of `length` ids from `first` on."""
    request = Request(
        prompt_ids=range(first, first + length),
        params=SamplingParams(max_tokens=max_tokens),
        tenant=tenant,
    )
    return Sequence(
        request,
        text_output=TextOutput(LetterDecoder()),
        sampler=NoSampler(),
        eos_ids=frozenset(),
        max_seq_len=max_seq_len,
    )


class Simulation:
    """The engine without a model: whatever is scheduled runs, and gives token 5."""

    def __init__(self, num_blocks=64, *, block_size=4, window=None, **limits):
        self.blocks = BlockManager(num_blocks, block_size=block_size, window=window)
        values = {"max_num_seqs": 8, "max_num_batched_tokens": 16, **limits}
        self.budget = values["max_num_batched_tokens"]
        self.max_num_seqs = values["max_num_seqs"]
        self.scheduler = Scheduler(self.blocks, **values)
        self.finished = []

    def step(self):
        shares = self.scheduler.schedule()
        assert sum(share.num_tokens for share in shares) <= self.budget
        assert len(self.scheduler.running) <= self.max_num_seqs
        assert len({id(share.sequence) for share in shares}) == len(shares)
        self.blocks.take_copies()
        for sequence, num_tokens in shares:
            assert sequence in self.scheduler.running
            capacity = len(sequence.block_table) * self.blocks.block_size
            assert sequence.num_computed_tokens + num_tokens <= capacity
            sequence.num_computed_tokens += num_tokens
            self.blocks.commit(sequence)
            if sequence.num_pending_tokens == 0:
                for sibling in sequence.take_siblings():
                    if self.scheduler.fork(sequence, sibling):
                        sibling.append_token(5)
                sequence.append_token(5)
            if sequence.is_finished:
                self.scheduler.remove(sequence)
                self.finished.append(sequence)
        self.blocks.check_integrity(self.scheduler.running)
        return [(share.sequence, share.num_tokens) for share in shares]

    def run(self, *sequences, most=10_000):
        for sequence in sequences:
            self.scheduler.add(sequence)
        for _ in range(most):
            if not self.scheduler.num_unfinished:
                return
            self.step()
        raise AssertionError("it does not end")


def test_decoding_goes_first_and_prompts_fill_the_rest_in_chunks():
    simulation = Simulation()
    short, long = make_sequence(3), make_sequence(40, first=100)
    simulation.scheduler.add(short)
    assert simulation.step() == [(short, 3)]
    simulation.scheduler.add(long)
    assert simulation.step() == [(short, 1), (long, 15)]
    assert simulation.step() == [(short, 1), (long, 15)]
    assert simulation.step() == [(short, 1), (long, 10)]
    assert simulation.step() == [(short, 1), (long, 1)]


def test_a_request_that_can_never_fit_is_refused_with_both_numbers():
    simulation = Simulation(num_blocks=4)
    with pytest.raises(CapacityError, match=r"18 tokens \(5 blocks of 4\).*holds 16 \(4 blocks\)"):
        simulation.scheduler.add(make_sequence(10))
    simulation.run(make_sequence(8))


def test_a_full_queue_is_refused():
    simulation = Simulation(max_num_seqs=1, max_waiting=2)
    simulation.scheduler.add(make_sequence(4))
    simulation.step()
    for _ in range(2):
        simulation.scheduler.add(make_sequence(4))
    with pytest.raises(OverloadError, match="2 requests wait"):
        simulation.scheduler.add(make_sequence(4))


def test_the_youngest_is_preempted_and_comes_back_first():
    simulation = Simulation(num_blocks=9, max_num_seqs=4)
    old, young = make_sequence(12, max_tokens=8), make_sequence(12, max_tokens=8, first=50)
    later = make_sequence(4, first=90)
    for sequence in (old, young):
        simulation.scheduler.add(sequence)
    while young not in simulation.scheduler.running or not simulation.scheduler.num_preemptions:
        simulation.step()
        if simulation.scheduler.num_preemptions:
            break
    assert simulation.scheduler.running == [old]
    assert (young.num_computed_tokens, young.block_table) == (0, [])
    simulation.scheduler.add(later)
    simulation.run()
    assert simulation.finished[0] is old
    assert [s.num_prompt_tokens + 8 for s in (old, young)] == [
        len(s.token_ids) for s in (old, young)
    ]


def test_tenants_take_turns():
    simulation = Simulation(max_num_seqs=1)
    busy = [make_sequence(4, tenant="busy", first=i) for i in range(5)]
    quiet = make_sequence(4, tenant="quiet")
    simulation.run(*busy, quiet)
    assert simulation.finished.index(quiet) == 1
    assert [s for s in simulation.finished if s is not quiet] == busy


def test_siblings_fork_from_one_prompt():
    simulation = Simulation(max_num_seqs=3)
    parent, *siblings = (make_sequence(10) for _ in range(5))
    parent.siblings = siblings
    simulation.run(parent)
    assert len(simulation.finished) == 5
    assert simulation.blocks.num_free == simulation.blocks.num_blocks


def test_removal_wherever_it_is_leaves_nothing():
    """E14: in the queue, in a prompt, while decoding, preempted."""
    for steps in range(12):
        simulation = Simulation(num_blocks=10, max_num_seqs=3)
        sequences = [make_sequence(12, first=20 * i) for i in range(5)]
        for sequence in sequences:
            simulation.scheduler.add(sequence)
        for _ in range(steps):
            simulation.step()
        for sequence in sequences:
            simulation.scheduler.remove(sequence)
        assert simulation.scheduler.num_unfinished == simulation.scheduler.num_waiting == 0
        assert simulation.blocks.num_free == simulation.blocks.num_blocks
        simulation.blocks.check_integrity([])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_end_and_lose_nothing(seed, window):
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=rng.randint(16, 40),
        window=window,
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(6, 30),
    )
    sequences = []
    for _ in range(40):
        sequence = make_sequence(
            rng.randint(1, 40),
            max_tokens=rng.randint(1, 20),
            tenant=rng.choice("ab"),
            first=rng.choice((0, 0, 100)),
        )
        if rng.random() < 0.2:
            sequence.siblings = [
                make_sequence(sequence.num_prompt_tokens, first=sequence.token_ids[0])
                for _ in range(2)
            ]
        sequences += [sequence, *sequence.siblings]
        simulation.scheduler.add(sequence)
        if rng.random() < 0.2:
            victim = rng.choice(sequences)
            if not victim.siblings:
                simulation.scheduler.remove(victim)
                victim.is_finished or victim.finish("abort")
        for _ in range(rng.randint(0, 4)):
            if simulation.scheduler.num_unfinished:
                simulation.step()
    simulation.run()
    assert all(sequence.is_finished for sequence in sequences)
    assert simulation.blocks.num_free == simulation.blocks.num_blocks


def test_a_pool_at_half_of_the_need_serves_everyone_in_bounded_time():
    """E12: 32 long requests, half the blocks: bounded preemptions, nobody waits very long."""
    simulation = Simulation(num_blocks=160, max_num_seqs=32, max_num_batched_tokens=64)
    sequences = [make_sequence(20, max_tokens=20, first=100 * i) for i in range(32)]
    ends = {}
    for sequence in sequences:
        simulation.scheduler.add(sequence)
    for now in range(10_000):
        if not simulation.scheduler.num_unfinished:
            break
        simulation.step()
        for sequence in simulation.finished:
            ends.setdefault(id(sequence), now)
    assert len(ends) == 32
    assert simulation.scheduler.num_preemptions <= 3 * 32
    assert max(ends.values()) <= 3 * sum(ends.values()) / 32


def test_a_kept_beginning_counts_towards_what_a_prompt_holds():
    """Behind a window: the blocks that it has already are among the most that it ever needs."""
    simulation = Simulation(num_blocks=4, window=6)
    for sequence in (make_sequence(5, max_tokens=1), make_sequence(40, max_tokens=1)):
        simulation.scheduler.add(sequence)
        while simulation.scheduler.num_unfinished:
            simulation.step()
        assert sequence.is_finished
