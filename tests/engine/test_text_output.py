import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.engine.text_output import TextOutput


class TextDecoder:
    """Token n is the n-th of these texts; `rest` is left at the end."""

    def __init__(self, texts, rest=""):
        self.texts, self.rest = texts, rest

    def push(self, token_id):
        return self.texts[token_id]

    def finish(self):
        return self.rest


def run(texts, *stop, rest="", **options):
    """What each token releases, and in the end."""
    output = TextOutput(TextDecoder(texts, rest), stop=stop, **options)
    steps = []
    for token_id in range(len(texts)):
        steps.append(output.push(token_id))
        if output.is_stopped:
            break
    return [*steps, output.finish()], output.found_stop


def join(steps):
    return "".join(text for step in steps for text in step)


def test_text_comes_at_once_without_stop():
    steps, found = run(["Once", " upon", ""], rest="\ufffd")
    assert steps == [["Once"], [" upon"], [""], ["\ufffd"]]
    assert found is None


def test_stop_across_tokens_is_cut_out():
    steps, found = run(["a sto", "ry. Th", "e E", "nd and more", "never"], "The End")
    assert steps == [["a sto"], [], [], ["ry. ", "", ""], []]
    assert found == "The End"


def test_a_stop_may_belong_to_the_answer():
    steps, found = run(["a", "b E", "nd more"], "End", include_stop=True)
    assert (join(steps), found) == ("ab End", "End")


def test_no_stop_is_looked_for_in_the_first_tokens():
    steps, found = run(["End", " End", " x End y"], "End", min_tokens=2)
    assert (join(steps), found) == ("End End x ", "End")


def test_held_text_comes_back_when_the_stop_does_not_follow():
    steps, found = run(["so ", "En", "ough"], "End")
    assert steps == [["so "], [], ["En", "ough"], []]
    assert found is None


def test_held_text_comes_back_at_the_end():
    assert join(run(["the E", "n"], "End")[0]) == "the En"


def test_the_earliest_of_several_stops_counts():
    steps, found = run(["one two three"], "three", "two")
    assert (join(steps), found) == ("one ", "two")


def test_stop_completed_by_the_last_bytes():
    steps, found = run(["ab"], "b\ufffd", rest="\ufffd")
    assert (join(steps), found) == ("a", "b\ufffd")


def test_stop_as_the_first_text_gives_nothing():
    assert run(["\n"], "\n") == ([[""], []], "\n")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_repetitive_beginnings(size):
    text = "aaaab"
    texts = [text[i : i + size] for i in range(0, len(text), size)]
    assert join(run(texts, "aab")[0]) == "aa"


@given(
    st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
def test_any_cutting_gives_the_text_before_the_first_stop(texts, stops):
    """A16: whole text up to a stop; which of overlapping stops wins may depend on the cutting."""
    steps, found = run(texts, *stops)
    text, whole = join(steps), "".join(texts)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert (found is not None) == any(stop in whole for stop in stops)
    assert found is not None or text == whole
    # A text for each token, whatever was held back.
    assert sum(map(len, steps)) == (len(texts) if found is None else len(steps) - 1)
