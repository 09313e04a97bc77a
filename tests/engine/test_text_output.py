import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.engine.text_output import Segment, TextOutput


class TextDecoder:
    """Token n is the n-th of these texts; `rest` is left at the end."""

    def __init__(self, texts, rest=""):
        self.texts, self.rest = texts, rest

    def push(self, token_id):
        return self.texts[token_id]

    def finish(self):
        return self.rest


def run(texts, *stop, rest=""):
    """What each token releases, and in the end."""
    output = TextOutput(TextDecoder(texts, rest), stop=stop)
    steps = []
    for token_id in range(len(texts)):
        steps.append(output.push(token_id))
        if output.is_stopped:
            break
    return [*steps, output.finish()], output.is_stopped


def join(steps):
    return "".join(segment.text for step in steps for segment in step)


def test_text_comes_at_once_without_stop():
    steps, is_stopped = run(["Once", " upon", ""], rest="\ufffd")
    assert steps == [[Segment(0, "Once")], [Segment(1, " upon")], [], [Segment(2, "\ufffd")]]
    assert not is_stopped


def test_stop_across_tokens_is_cut_out():
    steps, is_stopped = run(["a sto", "ry. Th", "e E", "nd and more", "never"], "The End")
    assert steps == [[Segment(0, "a sto")], [Segment(1, "ry. ")], [], [], []]
    assert is_stopped


def test_held_text_comes_back_when_the_stop_does_not_follow():
    steps, is_stopped = run(["so ", "En", "ough"], "End")
    assert steps == [[Segment(0, "so ")], [], [Segment(1, "En"), Segment(2, "ough")], []]
    assert not is_stopped


def test_held_text_comes_back_at_the_end():
    assert join(run(["the E", "n"], "End")[0]) == "the En"


def test_the_earliest_of_several_stops_counts():
    assert join(run(["one two three"], "three", "two")[0]) == "one "


def test_stop_completed_by_the_last_bytes():
    steps, is_stopped = run(["ab"], "b\ufffd", rest="\ufffd")
    assert (join(steps), is_stopped) == ("a", True)


def test_stop_as_the_first_text_gives_nothing():
    assert run(["\n"], "\n") == ([[], []], True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_repetitive_beginnings(size):
    text = "aaaab"
    texts = [text[i : i + size] for i in range(0, len(text), size)]
    assert join(run(texts, "aab")[0]) == "aa"


@given(
    st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
def test_any_cutting_gives_the_text_before_the_first_stop(texts, stops):
    """Whole text up to a stop; which of overlapping stops wins may depend on the cutting."""
    steps, is_stopped = run(texts, *stops)
    text, whole = join(steps), "".join(texts)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert is_stopped == any(stop in whole for stop in stops)
    assert is_stopped or text == whole
