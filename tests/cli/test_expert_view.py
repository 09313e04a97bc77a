import numpy as np
import pytest

from tramontane.cli.expert_view import ExpertPainter, count_expert_load, draw_expert_load
from tramontane.engine.completion import TextPiece
from tramontane.errors import RequestError


def make_painter(layer=None, *, num_experts=8, use_color=True):
    return ExpertPainter(layer, n_layers=4, num_experts=num_experts, use_color=use_color)


def make_piece(*first_experts, text="word"):
    return TextPiece(text, 5, np.array([[expert, 7] for expert in first_experts], dtype=np.int16))


def test_colours_follow_the_first_expert_of_the_layer():
    painter = make_painter(1)
    assert painter.paint(make_piece(0, 3, 0, 0)) == "\x1b[34mword\x1b[0m"
    assert painter.paint(TextPiece("end", 5, None)) == "end"
    assert "layer 1: \x1b[31m0\x1b[0m" in painter.build_legend()


def test_markers_without_colour():
    painter = make_painter(use_color=False)
    assert painter.paint(make_piece(0, 0, 6, 0)) == "[e6]word"
    assert painter.paint(TextPiece("end", 5, None)) == "[e-]end"
    assert "layer 2" in painter.build_legend()


def test_colours_repeat_beyond_eight():
    painter = make_painter(0, num_experts=16)
    assert painter.paint(make_piece(9)) == painter.paint(make_piece(1))
    assert "colours repeat" in painter.build_legend()


@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_that_do_not_exist_are_refused(layer):
    with pytest.raises(RequestError, match="layers 0 to 3"):
        make_painter(layer)


def test_load_counts_choices_per_layer_and_expert():
    experts = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 0]]], dtype=np.int16)  # (T, L, K)
    load = count_expert_load(experts, num_experts=4)
    assert load.tolist() == [[2, 1, 1, 0], [1, 0, 2, 1]]


def test_slots_that_a_router_left_empty_are_nobodys():
    experts = np.array([[[0, -1]], [[2, 0]], [[-1, -1]]], dtype=np.int16)  # (T, L, K)
    assert count_expert_load(experts, num_experts=3).tolist() == [[2, 0, 1]]
    assert draw_expert_load(np.zeros((1, 3), dtype=int), use_unicode=False).isascii()
    painter = make_painter(0, use_color=False)
    assert painter.paint(make_piece(-1, 3, 3, 3)) == "[e-]word"


def test_picture_has_a_row_per_layer_and_marks_the_busiest():
    picture = draw_expert_load(np.array([[4, 2, 1, 1], [2, 2, 2, 2]]), use_unicode=True)
    rows = picture.splitlines()
    assert rows[-2].startswith("layer  0  \u2588\u2588 \u2584\u2584 \u2582\u2582")
    assert rows[-2].endswith("most: 0 (50%)")
    assert "even 25.0%" in rows[0]


def test_picture_in_ascii_and_with_many_experts():
    assert draw_expert_load(np.ones((1, 4), dtype=int), use_unicode=False).isascii()
    wide = draw_expert_load(np.ones((2, 64), dtype=int), use_unicode=True)
    assert "\u2588" * 64 in wide
