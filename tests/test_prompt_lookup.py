"""Prompt lookup: what is proposed, and that a text gets what was drawn whatever is proposed."""

import numpy as np

from scalegpt.data import tokenizer
from scalegpt.data.calculator import Results
from scalegpt.inference.prompt_lookup import Growing, proposed


def test_what_followed_the_longest_likeness_is_proposed_and_of_equals_the_last():
    for text, most, want in (
        ([0, 1, 2, 3, 9, 1, 2, 3, 8, 2, 3, 7, 1, 2, 3], 3, [8, 2, 3]),  # the later of two
        ([0, 1, 2, 3, 9, 1, 2, 3, 8, 0, 1, 2, 3], 2, [9, 1]),  # 0 1 2 3 stood only there
        ([6, 5, 6, 5, 6], 5, [5, 6, 5, 6, 5]),  # beyond the text's end
        ([5, 5, 5, 5], 2, [5, 5]),
        ([1, 2, 7, 1, 2], 4, []),  # two are too few
        ([1, 2, 3], 4, []),
        ([4], 4, []),
    ):
        assert proposed(np.array(text), most).tolist() == want


def test_a_text_gets_what_is_drawn_as_far_as_the_tokens_before_are_those_proposed():
    begun = [1, 2, 3, 1, 2, 3]
    text = Growing(begun, 6, 4, None)
    assert text.propose() and text.end(2, 5).tolist() == [1, 2, 3, 1, 2, 3, 1]
    text.add([1, 2, 7, 9])  # 7 is not 3, and 9 was drawn after that
    assert text.ids[: text.length].tolist() == [*begun, 1, 2, 7] and text.new == 3
    assert not text.propose()
    text.add([3, 5, 5, 5, 5])
    text.add([1, 1, 1, 1, 1])  # proposed at first, and no longer after another token
    assert text.new == 5 and not text.propose()
    text.add([2, 3, 1, 2, 3])  # six at most
    assert text.new == 6 and text.ids[: text.length].tolist() == [*begun, 1, 2, 7, 3, 1, 2]
    assert not text.propose()  # it has all


def test_the_result_of_a_calculation_is_certain_whatever_is_drawn():
    codec = tokenizer.load({"kind": "byte"}).chat()
    call, result, back = (codec.marks[name] for name in ("call", "result", "back"))
    drawn = [call, *b"6*7", result]
    text = Growing([1], len(drawn) + 4, 2, Results(codec))
    for token in drawn:
        text.add([token, 0, 0])
    for _ in range(4):
        text.add([9, 9, 9])
    assert text.ids[1 : text.length].tolist() == [*drawn, *b"42", back, 9]
